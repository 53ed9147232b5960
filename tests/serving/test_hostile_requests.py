"""A matrix of hostile bodies against every route that takes one: each is refused early, cheaply and in the form of its protocol."""

import json
import time
from typing import Any

import pytest

from ragtune_ray import config
from tests.support.gateways import bearer, client, keys, question

pytestmark = pytest.mark.anyio

CHAT, RETRIEVE, EMBED, DOCUMENTS = "/v1/chat/completions", "/v1/retrieve", "/v1/embeddings", "/v1/documents"
LIMITS = config.Serve()
SECONDS = 1.0
"""Of computing: far above what a refusal takes (a millisecond), far below what an attack would want."""

MALFORMED = {
    "nothing": b"",
    "cut": b'{"messages": [',
    "not UTF-8": b'{"query": "\xff\xfe"}',
    "deep arrays": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"a":' * 30_000 + b"1" + b"}" * 30_000,
    "a field twice": b'{"query": "a", "query": "b"}',
    "NaN": b'{"temperature": NaN}',
    "infinite": b'{"temperature": 1e999}',
    "a huge number": b'{"top_k": ' + b"9" * 100_000 + b"}",
    "a lone surrogate": b'{"query": "\\ud800"}',
    "an array": b"[1]",
    "a string": b'"x"',
    "null": b"null",
    "unknown fields": b"{" + b",".join(b'"f%d": 1' % number for number in range(20_000)) + b"}",
}

OVER_LIMITS: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", CHAT, question("x" * (LIMITS.max_question_characters + 1))),
    ("POST", CHAT, question("\u0f3f" * (LIMITS.max_question_characters + 1))),
    ("POST", CHAT, question("a\0b")),
    ("POST", CHAT, {"messages": [{"role": "user", "content": "x"}] * 6000}),
    ("POST", CHAT, question(top_k=LIMITS.max_top_k + 1)),
    ("POST", CHAT, question(stop=["x"] * 5)),
    ("POST", CHAT, question(stop="x" * 10_000)),
    ("POST", CHAT, question(temperature=-1)),
    ("POST", CHAT, question(seed=2**80)),
    ("POST", CHAT, question(timeout_seconds=0)),
    ("POST", CHAT, question(filter={"a": {"b": {"c": 1}}})),
    ("POST", CHAT, question(chat_template="{{ cycler.__init__.__globals__ }}")),
    ("POST", RETRIEVE, {"query": "x", "top_k": LIMITS.max_top_k + 1}),
    ("POST", RETRIEVE, {"query": "x", "top_k": 0}),
    ("POST", RETRIEVE, {"query": "x" * (LIMITS.max_question_characters + 1)}),
    ("POST", RETRIEVE, {"query": "a\0b"}),
    ("POST", EMBED, {"input": ["x"] * (LIMITS.max_texts + 1)}),
    ("POST", EMBED, {"input": ["x", ""]}),
    ("POST", EMBED, {"input": "x" * (LIMITS.max_question_characters + 1)}),
    ("POST", EMBED, {"input": "x", "dimensions": 10**12}),
    ("POST", DOCUMENTS, {"documents": []}),
    ("POST", DOCUMENTS, {"documents": [{"document_id": "a\0b", "text": "x"}]}),
    ("POST", DOCUMENTS, {"documents": [{"document_id": "x" * 4097, "text": "x"}]}),
    ("DELETE", DOCUMENTS, {"document_ids": ["x" * 4097]}),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def refused(http: Any, method: str, path: str, body: bytes) -> None:
    started = time.process_time()
    reply = await http.request(
        method, path, content=body, headers={"content-type": "application/json", **bearer("admin")}
    )
    seconds = time.process_time() - started
    assert 400 <= reply.status_code < 500, (method, path, body[:80], reply.status_code)
    fields = {"message", "code"} if path == "/mcp" else {"message", "type", "param", "code"}
    assert set(reply.json()["error"]) == fields
    assert len(reply.content) < 4000, "what was sent is not sent back"
    assert seconds < SECONDS, (method, path, body[:80], seconds)


async def test_every_malformed_body_is_refused_on_every_route() -> None:
    async with client(keys=keys()) as http:
        routes = [place for place, route in http.middleware.routes.items() if route.max_body_bytes]
        assert len(routes) >= 5
        for method, path in routes:
            await http.request(method, path, json={}, headers=bearer("admin"))  # what is imported late, is now
            for body in MALFORMED.values():
                await refused(http, method, path, body)
        assert http.backend.asked == []
        assert (await http.get("/healthz")).status_code == 200


async def test_every_value_over_its_limit_is_refused() -> None:
    async with client(keys=keys()) as http:
        for method, path, body in OVER_LIMITS:
            await refused(http, method, path, json.dumps(body).encode())
        asked = [name for name, *_ in http.backend.asked]
        assert set(asked) <= {"embed"}, "only the dimension is known no earlier than the embedding"


async def test_a_length_with_leading_zeros_is_refused_by_its_value() -> None:
    async with client() as http:
        headers = {"content-type": "application/json", "content-length": "0" * 20 + "9" * 9}
        reply = await http.post(RETRIEVE, content=b'{"query": "x"}', headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_long")
