"""The labelling page as an ASGI application."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ragtune_ray.evaluation.labelling.desk import Desk
from ragtune_ray.evaluation.labelling.labels import LabelError
from ragtune_ray.serving import requests
from ragtune_ray.serving.local import local_page
from ragtune_ray.serving.middleware import AccessMiddleware
from ragtune_ray.serving.requests import ApiError, RequestBody


class LabelRequest(RequestBody):
    """The body of POST /label."""

    place: int
    item: str
    """`Item.digest` of what the page shows."""
    grades: list[float] = Field(max_length=2)
    """One per answer, in order."""


def build_app(desk: Desk) -> AccessMiddleware:
    """Build the ASGI application of a labelling page."""

    async def show(request: Request) -> Response:
        asked = requests.parse(local_page.ItemRequest, request.state.body)
        place = desk.next_place(asked.skipped) if asked.place is None else asked.place
        if place is not None and not 0 <= place < len(desk.items):
            raise requests.invalid("place", f"there are {len(desk.items)} items")
        return JSONResponse(_shown(desk, place))

    async def grade(request: Request) -> Response:
        given = requests.parse(LabelRequest, request.state.body)
        if 0 <= given.place < len(desk.items) and given.item != desk.items[given.place].digest:
            raise ApiError(
                409,
                "This page is of another session of ragtune label, which shows other answers here: reload it. Nothing was saved.",
                code="other_item",
                param="item",
            )
        try:
            desk.grade(given.place, given.grades)
        except LabelError as error:
            raise ApiError(400, str(error), code="invalid_label") from error
        return JSONResponse({"done": desk.num_done()})

    files = ("index.html", "label.js", "label.css")
    return local_page.build_app("ragtune_ray.serving.local.label", files, {"/item": show, "/label": grade})


def serve(desk: Desk, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page of a desk; arguments as for `local_page.serve`, which raises a LabelError if the port is taken."""
    local_page.serve(build_app(desk), port, ready, LabelError)


def _shown(desk: Desk, place: int | None) -> dict[str, Any]:
    """An item as the page shows it, and how far the person is; without the item if there is none."""
    progress = {"place": place, "done": desk.num_done(), "total": len(desk.items), "labeller": desk.labeller}
    if place is None:
        return {**progress, "path": str(desk.path)}
    item = desk.items[place]
    sources = [{"title": each.title or each.document_id, "text": each.text} for each in desk.sources(item.query_id)]
    return {
        **progress,
        "item": item.digest,
        "query": item.query,
        "history": [{"role": role, "content": content} for role, content in item.history],
        "golds": item.golds,
        "answers": item.answers,
        "grades": desk.grades_at(place),
        "sources": sources,
    }
