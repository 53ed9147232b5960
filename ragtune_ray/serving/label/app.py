"""The labelling page as an ASGI application, under the same checks of host and origin as an endpoint without keys.

Only requests from this machine, addressed to this machine, are served, and bodies must be JSON, which a browser sends to another
origin only with a permission that this application never gives: so no web page can post labels.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from pydantic import Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as StarletteRoute

from ragtune_ray.evaluation.labelling.desk import Desk
from ragtune_ray.evaluation.labelling.labels import LabelError
from ragtune_ray.serving import requests
from ragtune_ray.serving.api_keys import Keys
from ragtune_ray.serving.middleware import AccessMiddleware, Route
from ragtune_ray.serving.requests import ApiError, RequestBody
from ragtune_ray.serving.telemetry import Telemetry

HOST = "127.0.0.1"
MAX_BODY_BYTES = 2**20
_FILES = {
    "/": ("ragtune_ray.serving.label", "index.html", "text/html; charset=utf-8"),
    "/page/label.js": ("ragtune_ray.serving.label", "label.js", "text/javascript; charset=utf-8"),
    "/page/label.css": ("ragtune_ray.serving.label", "label.css", "text/css; charset=utf-8"),
    "/page/style.css": ("ragtune_ray.serving", "style.css", "text/css; charset=utf-8"),
    "/page/icon.svg": ("ragtune_ray.serving", "icon.svg", "image/svg+xml"),
}

Handler = Callable[[Request], Awaitable[Response]]


class ItemRequest(RequestBody):
    """The body of POST /item."""

    place: int | None = None
    """Number of an item that was shown before; None: the next one."""
    skipped: list[int] = Field(default_factory=list)
    """Numbers of the items that the person skipped."""


class LabelRequest(RequestBody):
    """The body of POST /label."""

    place: int
    grades: list[float] = Field(max_length=2)
    """One per answer, in order."""


def build_app(desk: Desk) -> AccessMiddleware:
    """Build the ASGI application of a labelling page."""

    async def show(request: Request) -> Response:
        asked = requests.parse(ItemRequest, request.state.body)
        place = desk.next_place(asked.skipped) if asked.place is None else asked.place
        if place is not None and not 0 <= place < len(desk.items):
            raise requests.invalid("place", f"there are {len(desk.items)} items")
        return JSONResponse(_shown(desk, place))

    async def grade(request: Request) -> Response:
        given = requests.parse(LabelRequest, request.state.body)
        try:
            desk.grade(given.place, given.grades)
        except LabelError as error:
            raise ApiError(400, str(error), code="invalid_label") from error
        return JSONResponse({"done": desk.num_done()})

    async def send_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), error.status)

    files = [StarletteRoute(path, _file(*file), methods=["GET"]) for path, file in _FILES.items()]
    posts = [StarletteRoute("/item", show, methods=["POST"]), StarletteRoute("/label", grade, methods=["POST"])]
    app = Starlette(routes=[*files, *posts], exception_handlers={ApiError: send_error})
    routes = {("GET", path): Route("public") for path in _FILES}
    routes |= {("POST", route.path): Route("public", MAX_BODY_BYTES) for route in posts}
    return AccessMiddleware(app, routes, Keys([]), Telemetry())


def serve(desk: Desk, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page on this machine until it is interrupted (Ctrl-C).

    Args:
        desk: where labels go.
        port: 0 takes a free one.
        ready: called with the address of the page.

    Raises:
        LabelError: the port is taken.
    """
    import uvicorn

    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        raise LabelError(f"port {port}: {error.strerror}; choose another with --port, or 0 for a free one") from error
    with listening:
        ready(f"http://{HOST}:{listening.getsockname()[1]}/")
        server = uvicorn.Server(uvicorn.Config(build_app(desk), log_level="error", lifespan="off"))
        server.run(sockets=[listening])


def _shown(desk: Desk, place: int | None) -> dict[str, Any]:
    """An item as the page shows it, and how far the person is; without the item if there is none."""
    progress = {"place": place, "done": desk.num_done(), "total": len(desk.items), "labeller": desk.labeller}
    if place is None:
        return {**progress, "path": str(desk.path)}
    item = desk.items[place]
    sources = [{"title": each.title or each.document_id, "text": each.text} for each in desk.sources(item.query_id)]
    return {
        **progress,
        "query": item.query,
        "history": [{"role": role, "content": content} for role, content in item.history],
        "golds": item.golds,
        "answers": item.answers,
        "grades": desk.grades_at(place),
        "sources": sources,
    }


def _file(package: str, name: str, media_type: str) -> Handler:
    content = resources.files(package).joinpath("page", name).read_bytes()

    async def send(_: Request) -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return send
