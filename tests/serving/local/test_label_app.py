"""The labelling application without a browser: who may post, and what is refused."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ragtune_ray.evaluation.labelling import labels
from ragtune_ray.evaluation.labelling.desk import Desk
from ragtune_ray.evaluation.labelling.drawing import Item, Source
from ragtune_ray.evaluation.labelling.labels import LabelError
from ragtune_ray.serving.local.label import app

ITEMS = [Item("q1", "One?", ("A",), ("A", "B")), Item("q2", "Two?", None, ("C",))]
GRADED = {"place": 0, "item": ITEMS[0].digest, "grades": [1, 0.5]}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(ITEMS, lambda query_id: [Source("", f"{query_id}.md", "text")], tmp_path / "labels.jsonl", "ann")


def send(
    desk: Desk, path: str, body: Any = None, *, client: str = "127.0.0.1", method: str = "POST", **headers: str
) -> httpx.Response:
    async def sent() -> httpx.Response:
        transport = httpx.ASGITransport(app=app.build_app(desk), client=(client, 4242))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
            return await http.request(method, path, json=body, headers=headers)

    return asyncio.run(sent())


def test_items_are_shown_and_graded_in_order(desk: Desk) -> None:
    shown = send(desk, "/item", {}).json()
    assert shown == {
        "place": 0, "done": 0, "total": 2, "labeller": "ann", "item": ITEMS[0].digest, "query": "One?", "history": [], "golds": ["A"],
        "answers": ["A", "B"], "grades": [None, None], "sources": [{"title": "q1.md", "text": "text"}],
    }  # fmt: skip
    assert send(desk, "/label", GRADED).json() == {"done": 1}
    assert send(desk, "/item", {}).json()["place"] == 1
    assert send(desk, "/item", {"place": 0}).json()["grades"] == [1, 0.5]
    assert send(desk, "/item", {"skipped": [1]}).json()["place"] is None
    found = labels.read(str(desk.path))
    assert [(row.answer, row.grade, row.labeller) for row in found.rows] == [("A", 1.0, "ann"), ("B", 0.5, "ann")]
    bob = Desk(ITEMS, desk.sources, desk.path, "bob")
    assert (bob.next_place(), bob.num_done()) == (0, 0), "another person labels the same"
    assert Desk(ITEMS, desk.sources, desk.path, "ann").next_place() == 1, "and the same person goes on"


def test_only_this_machine_may_post(desk: Desk) -> None:
    refused = [
        send(desk, "/label", GRADED, client="10.0.0.7"),
        send(desk, "/label", GRADED, host="evil.example"),
        send(desk, "/item", {}, host="evil.example:8000"),
        send(desk, "/label", GRADED, **{"x-forwarded-for": "10.0.0.7"}),
        send(desk, "/", method="GET", host="evil.example"),
    ]
    assert [reply.status_code for reply in refused] == [403] * 5
    typed = send(desk, "/label", GRADED, **{"content-type": "text/plain"})
    assert typed.status_code == 415, "what a page of another origin may send without asking"
    asked = send(desk, "/label", method="OPTIONS", origin="http://evil.example")
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers
    assert not desk.path.exists()
    page = send(desk, "/", method="GET", host="localhost:8000")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/label", GRADED | {"grades": [1]}),
        ("/label", GRADED | {"grades": [1, 0.25]}),
        ("/label", GRADED | {"grades": [1, 1, 1]}),
        ("/label", GRADED | {"grades": [1, None]}),
        ("/label", GRADED | {"place": 2, "grades": [1]}),
        ("/label", GRADED | {"place": -1, "grades": [1]}),
        ("/label", {"item": ITEMS[0].digest, "grades": [1, 1]}),
        ("/label", {"place": 0, "grades": [1, 1]}),
        ("/item", {"place": 2}),
        ("/item", {"place": -1}),
        ("/item", {"arm": "rag"}),
        ("/item", [1]),
    ],
)
def test_a_wrong_request_changes_nothing(desk: Desk, path: str, body: Any) -> None:
    reply = send(desk, path, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]
    assert not desk.path.exists()


def test_a_page_of_an_earlier_session_grades_nothing_else(desk: Desk) -> None:
    shown = send(desk, "/item", {}).json()
    graded = {"place": shown["place"], "item": shown["item"], "grades": [1, 1]}
    for other in (ITEMS[1], Item("q1", "One?", ("A",), ("A", "C")), Item("q1", "Another?", ("A",), ("A", "B"))):
        changed = Desk([other], desk.sources, desk.path, "ann")
        reply = send(changed, "/label", graded)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "other_item")
        assert "reload it" in reply.json()["error"]["message"]
    assert not desk.path.exists()
    assert send(desk, "/label", graded).status_code == 200


def test_a_taken_port_is_named(desk: Desk) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LabelError, match=f"port {port}: .*choose another with --port"):
            app.serve(desk, port, print)
