"""The review page without a browser: what it shows and keeps, and who may post."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ragtune_ray.evaluation.questions.writing.review import Desk
from ragtune_ray.serving.local.review import app

TEXT = "The code is secret\U0001f512. It rains."
ROW: Any = {
    "query_id": "made-1", "text": "Which word opens the gate?", "answers": ["secret"], "document_ids": ["d"], "split": "test",
    "kind": "follow_up", "passage_ids": ["d#0"], "rank": 1, "generator": "m", "prompt_version": 1,
    "evidence": [{"passage_id": "d#0", "document_id": "d", "start": 100, "end": 120, "text": TEXT[:20]}],
    "messages": [{"role": "user", "content": "Who guards it?"}],
}  # fmt: skip
PASSAGE = {
    "passage_id": "d#0",
    "document_id": "d",
    "title": "Gates",
    "text": TEXT,
    "start": 100,
    "end": 100 + len(TEXT),
}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk([ROW, {**ROW, "query_id": "made-2"}], {"d#0": PASSAGE}, tmp_path / "reviewed.jsonl", "Ada")


def send(desk: Desk, path: str, body: Any = None, *, method: str = "POST", **headers: str) -> httpx.Response:
    async def sent() -> httpx.Response:
        transport = httpx.ASGITransport(app=app.build_app(desk), client=("127.0.0.1", 4242))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
            return await http.request(method, path, json=body, headers=headers)

    return asyncio.run(sent())


def test_a_question_is_shown_with_its_evidence_and_kept_as_decided(desk: Desk) -> None:
    shown = send(desk, "/item", {}).json()
    assert shown["passages"] == [{"title": "Gates", "text": TEXT, "spans": [[0, 20]]}]
    assert (shown["place"], shown["kind"], shown["text"], shown["answers"]) == (0, "follow-up", ROW["text"], ["secret"])
    given = {
        "place": 0,
        "item": shown["item"],
        "verdict": "mended",
        "text": "Which word opens it?",
        "answers": ["secret\U0001f512"],
    }
    assert send(desk, "/decide", given).json() == {"done": 1}
    assert send(desk, "/item", {}).json()["place"] == 1
    assert send(desk, "/item", {"place": 0}).json()["text"] == "Which word opens it?"
    assert send(desk, "/item", {"skipped": [1]}).json()["place"] is None
    (line,) = desk.path.read_text().splitlines()
    assert json.loads(line)["answers"] == ["secret\U0001f512"]


def test_wrong_decisions_and_other_hosts_are_refused(desk: Desk) -> None:
    for body in (
        {"place": 9, "item": "made-1", "verdict": "accepted"},
        {"place": 0, "item": "made-1", "verdict": "mended"},
        {"place": 0, "item": "made-1", "verdict": "maybe"},
        {"place": 0, "verdict": "accepted"},
        {},
    ):
        assert send(desk, "/decide", body).status_code == 400, body
    assert send(desk, "/item", {"place": -1}).status_code == 400
    assert (
        send(desk, "/decide", {"place": 0, "item": "made-1", "verdict": "accepted"}, host="evil.example").status_code
        == 403
    )
    of_another_run = send(desk, "/decide", {"place": 0, "item": "made-2", "verdict": "accepted"})
    assert (of_another_run.status_code, "Nothing was saved" in of_another_run.text) == (409, True)
    assert not desk.path.exists()
    page = send(desk, "/", method="GET")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert send(desk, "/page/review.js", method="GET").headers["content-type"].startswith("text/javascript")
