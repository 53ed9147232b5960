"""A page that is served to this machine alone, under the same checks of host and origin as an endpoint without keys.

Only requests from this machine, addressed to this machine, are served, and bodies must be JSON, which a browser sends to another
origin only with a permission that this application never gives: so no web page can post anything.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources

from pydantic import Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as StarletteRoute

from ragtune_ray import RagtuneError
from ragtune_ray.serving.api_keys import Keys
from ragtune_ray.serving.middleware import AccessMiddleware, Route
from ragtune_ray.serving.requests import ApiError, RequestBody
from ragtune_ray.serving.telemetry import Telemetry

HOST = "127.0.0.1"
MAX_BODY_BYTES = 2**20
_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}

Handler = Callable[[Request], Awaitable[Response]]


class ItemRequest(RequestBody):
    """The body of POST /item."""

    place: int | None = None
    """Number of an item that was shown before; None: the next one."""
    skipped: list[int] = Field(default_factory=list)
    """Numbers of the items that the person skipped."""


def build_app(package: str, files: tuple[str, ...], posts: Mapping[str, Handler]) -> AccessMiddleware:
    """Build the ASGI application of a page.

    Args:
        package: whose folder `page/` has the files.
        files: their names: `index.html`, shown at `/`, and others, shown below `/page/`.
        posts: path -> what answers POST; its body is in `request.state.body`.
    """
    paths = {"/" if name == "index.html" else f"/page/{name}": (package, name) for name in files}
    paths |= {f"/page/{name}": ("ragtune_ray.serving", name) for name in ("style.css", "icon.svg")}
    paths["/page/local.js"] = ("ragtune_ray.serving.local", "local.js")

    async def send_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), error.status)

    handlers = [StarletteRoute(path, _file(*file), methods=["GET"]) for path, file in paths.items()]
    handlers += [StarletteRoute(path, handler, methods=["POST"]) for path, handler in posts.items()]
    app = Starlette(routes=handlers, exception_handlers={ApiError: send_error})
    routes = {("GET", path): Route("public") for path in paths}
    routes |= {("POST", path): Route("public", MAX_BODY_BYTES) for path in posts}
    return AccessMiddleware(app, routes, Keys([]), Telemetry())


def serve(app: AccessMiddleware, port: int, ready: Callable[[str], None], error: type[RagtuneError]) -> None:
    """Serve a page on this machine until it is interrupted (Ctrl-C).

    Args:
        app: from `build_app`.
        port: 0 takes a free one.
        ready: called with the address of the page.
        error: raised if the port is taken.
    """
    import uvicorn

    try:
        listening = socket.create_server((HOST, port))
    except OSError as problem:
        raise error(f"port {port}: {problem.strerror}; choose another with --port, or 0 for a free one") from problem
    with listening:
        ready(f"http://{HOST}:{listening.getsockname()[1]}/")
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        server.run(sockets=[listening])


def _file(package: str, name: str) -> Handler:
    content = resources.files(package).joinpath("page", name).read_bytes()
    media_type = _MEDIA_TYPES[name.rpartition(".")[2]]

    async def send(_: Request) -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return send
