"""The review page as an ASGI application."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ragtune_ray.evaluation.questions.writing.review import Desk, ReviewError, Verdict
from ragtune_ray.serving import requests
from ragtune_ray.serving.local import local_page
from ragtune_ray.serving.middleware import AccessMiddleware
from ragtune_ray.serving.requests import ApiError, RequestBody


class DecideRequest(RequestBody):
    """The body of POST /decide."""

    place: int
    item: str
    """The query id of what the page shows."""
    verdict: Verdict
    text: str = ""
    """The mended question."""
    answers: list[str] = Field(default_factory=list, max_length=100)
    """The mended answers."""


def build_app(desk: Desk) -> AccessMiddleware:
    """Build the ASGI application of a review page."""

    async def show(request: Request) -> Response:
        asked = requests.parse(local_page.ItemRequest, request.state.body)
        place = asked.place
        if place is None:
            place = desk.next_place(asked.skipped)
            place = None if place in asked.skipped else place
        if place is not None and not 0 <= place < len(desk.questions):
            raise requests.invalid("place", f"there are {len(desk.questions)} questions")
        return JSONResponse(_shown(desk, place))

    async def decide(request: Request) -> Response:
        given = requests.parse(DecideRequest, request.state.body)
        if 0 <= given.place < len(desk.questions) and given.item != desk.questions[given.place]["query_id"]:
            raise ApiError(
                409,
                "This page is of another session of the review, which shows another question here: reload it. Nothing was saved.",
                code="other_item",
                param="item",
            )
        try:
            desk.decide(given.place, given.verdict, given.text, given.answers)
        except ReviewError as error:
            raise ApiError(400, str(error), code="invalid_decision") from error
        return JSONResponse({"done": desk.num_done()})

    files = ("index.html", "review.js", "review.css")
    return local_page.build_app("ragtune_ray.serving.local.review", files, {"/item": show, "/decide": decide})


def serve(desk: Desk, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page of a desk; arguments as for `local_page.serve`, which raises a ReviewError if the port is taken."""
    local_page.serve(build_app(desk), port, ready, ReviewError)


def _shown(desk: Desk, place: int | None) -> dict[str, Any]:
    """A question as the page shows it, and how far the review is; without the question if there is none."""
    progress = {"place": place, "done": desk.num_done(), "total": len(desk.questions), "reviewer": desk.reviewer}
    if place is None:
        return {**progress, "path": str(desk.path)}
    row, decision = desk.questions[place], desk.decision_at(place)
    text, answers = desk.words_at(place)
    return {
        **progress,
        "item": row["query_id"],
        "kind": row["kind"].replace("_", "-"),
        "text": text,
        "answers": answers,
        "history": row.get("messages", []),
        "verdict": decision.verdict if decision else "",
        "passages": [_passage(desk, name, place) for name in row["passage_ids"]],
    }


def _passage(desk: Desk, name: str, place: int) -> dict[str, Any]:
    passage = desk.passages[name]
    spans = [
        (each["start"] - passage["start"], each["end"] - passage["start"])
        for each in desk.questions[place]["evidence"]
        if each["passage_id"] == name
    ]
    return {"title": passage["title"] or passage["document_id"], "text": passage["text"], "spans": sorted(spans)}
