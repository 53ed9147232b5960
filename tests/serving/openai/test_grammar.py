"""Requests drawn from a grammar of OpenAI's formats: good ones are answered, all others refused, and none fails."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import hypothesis
from hypothesis import strategies as st

from tests.support.gateways import client

EXAMPLES = 120

texts = st.one_of(
    st.sampled_from(["What is Mars?", "Its moons?", "火星有几颗卫星？", "[1](http://x) <b>"]), st.text(min_size=1)
)
asked = texts.filter(lambda text: text.strip() and "\0" not in text)
said = st.text().filter(lambda text: "\0" not in text)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def parts(text: st.SearchStrategy[str], kind: str) -> st.SearchStrategy[Any]:
    """A content: a text, or a list of parts of one kind."""
    return text | text.map(lambda each: [{"type": kind, "text": each}])


def fields(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: values | st.none() for name, values in optional.items()})


EXTENSIONS: dict[str, Any] = {
    "model": st.sampled_from(["rag", "base", ""]),
    "top_k": st.integers(1, 50),
    "filter": st.dictionaries(st.sampled_from(["year", "owner"]), st.integers(0, 9) | st.lists(st.text(), min_size=1)),
    "retrieval": st.just("always"),
    "timeout_seconds": st.floats(10, 1e9),
    "temperature": st.floats(0, 2) | st.integers(0, 2),
    "top_p": st.floats(0, 1),
    "stream": st.booleans(),
}
HINTS: dict[str, Any] = {
    "metadata": st.dictionaries(st.text(), st.text(), max_size=3),
    "store": st.booleans(),
    "user": st.text(),
    "service_tier": st.sampled_from(["auto", "flex"]),
    "parallel_tool_calls": st.booleans(),
    "tools": st.just([]),
    "tool_choice": st.sampled_from(["none", "auto"]),
}
SAMPLING: dict[str, Any] = {
    **EXTENSIONS,
    "max_tokens": st.integers(1, 10**9),
    "stop": asked.map(lambda text: text[:256]) | st.lists(asked.map(lambda text: text[:256]), max_size=4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "stream_options": fields(include_usage=st.booleans(), include_obfuscation=st.booleans()),
}
assistant = fields(
    content=parts(said, "text"), refusal=st.text(), annotations=st.just([]), tool_calls=st.just([]), name=st.text()
).map(lambda message: {**message, "role": "assistant"})
user = st.fixed_dictionaries({"role": st.just("user"), "content": parts(asked, "text")})
system = st.fixed_dictionaries({"role": st.sampled_from(["system", "developer"]), "content": parts(said, "text")})
item = st.one_of(
    parts(said, "output_text").map(lambda content: {"type": "message", "role": "assistant", "content": content}),
    parts(said, "input_text").map(lambda content: {"role": "user", "content": content}),
    st.just({"type": "reasoning", "summary": []}),
)
GOOD: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "/v1/chat/completions": st.builds(
        lambda before, last, more: {**more, "messages": [*before, last]},
        st.lists(user | assistant | system, max_size=5),
        user,
        fields(
            **SAMPLING,
            **HINTS,
            logit_bias=st.just({}),
            reasoning_effort=st.text(),
            response_format=st.just({"type": "text"}),
        ),
    ),
    "/v1/completions": st.builds(
        lambda prompt, more: {**more, "prompt": prompt},
        asked | asked.map(lambda text: [text]),
        fields(**SAMPLING, user=st.text(), echo=st.just(False)),
    ),
    "/v1/responses": st.builds(
        lambda given, more: {**more, "input": given},
        asked
        | st.builds(
            lambda before, last: [*before, {"role": "user", "content": last}], st.lists(item, max_size=5), asked
        ),
        fields(
            **EXTENSIONS,
            **HINTS,
            instructions=said,
            max_output_tokens=st.integers(1, 10**9),
            truncation=st.just("auto"),
        ),
    ),
    "/v1/embeddings": st.builds(
        lambda given, more: {**more, "input": given},
        asked | st.lists(asked, min_size=1, max_size=40),
        fields(encoding_format=st.sampled_from(["float", "base64"]), user=st.text(), model=st.just("all-MiniLM-L6-v2")),
    ),
}


@contextmanager
def posting() -> Iterator[Any]:
    """Yields a function that posts a body to an endpoint in this process."""
    with asyncio.Runner() as runner:
        http = client("retrieval.filter={}")

        def post(path: str, body: Any) -> httpx.Response:
            content = json.dumps(body).encode()
            return runner.run(http.post(path, content=content, headers={"content-type": "application/json"}))

        yield post
        runner.run(http.aclose())


def check_good(path: str, body: dict[str, Any], reply: httpx.Response) -> None:
    assert reply.status_code == 200, (path, body, reply.text)
    if not body.get("stream"):
        assert reply.json()["object"] in ("chat.completion", "text_completion", "response", "list")
        return
    *_, last = [line for line in reply.text.splitlines() if line.startswith("data: ")]
    assert last == "data: [DONE]" or json.loads(last[6:])["type"] == "response.completed"


def check_any(path: str, body: Any, reply: httpx.Response) -> None:
    hurried = isinstance(body, dict) and isinstance(body.get("timeout_seconds"), int | float)
    assert reply.status_code < 500 or (reply.status_code == 504 and hurried), (path, body, reply.text)
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"], body


def fuzz(examples: int, seed: int = 0) -> None:
    """Post good requests, and requests of which one field or more is replaced by anything."""
    quick = hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    with posting() as post:

        @hypothesis.seed(seed)
        @quick
        @hypothesis.given(st.sampled_from(sorted(GOOD)).flatmap(lambda path: st.tuples(st.just(path), GOOD[path])))
        def good(given: tuple[str, dict[str, Any]]) -> None:
            path, body = given
            check_good(path, body, post(path, body))

        @hypothesis.seed(seed)
        @quick
        @hypothesis.given(
            st.sampled_from(sorted(GOOD)).flatmap(lambda path: st.tuples(st.just(path), GOOD[path])),
            st.data(),
        )
        def damaged(given: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
            path, body = given
            names = st.sampled_from(sorted([*body, *EXTENSIONS, *HINTS, "n", "tools", "logprobs", "include", "text"]))
            body |= data.draw(st.dictionaries(names | st.text(), junk, min_size=1, max_size=3))
            check_any(path, body, post(path, body))

        good()
        damaged()


def test_good_requests_are_answered_and_no_request_breaks_the_endpoint() -> None:
    fuzz(EXAMPLES)
