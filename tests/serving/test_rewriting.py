"""What the endpoint searches for after a conversation, whole and streamed; it is what bulk answering searches for."""

import json
from typing import Any

import pytest

from tests.support.gateways import FakeBackend, client

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is Mars?"},
    {"role": "assistant", "content": "A planet."},
    {"role": "user", "content": "Its moons?"},
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def asked(*overrides: str, backend: FakeBackend, stream: bool = False, turns: Any = TURNS) -> dict[str, Any]:
    async with client(*overrides, backend=backend) as http:
        reply = await http.post(CHAT, json={"messages": turns, "stream": stream})
    assert reply.status_code == 200, reply.text
    if not stream:
        return reply.json()
    return json.loads(reply.text.strip().split("\n\n")[-2].removeprefix("data: "))


def texts(backend: FakeBackend) -> list[str]:
    return [call[1] for call in backend.asked if call[0] == "retrieve"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("rewrite", "expected"),
    [("none", ("Its moons?",)), ("last_turns", ("What is Mars?\nIts moons?", "Its moons?"))],
)
async def test_without_a_generator_the_turns_decide_what_is_searched_for(
    rewrite: str, expected: tuple[str, ...], stream: bool
) -> None:
    backend = FakeBackend()
    answer = await asked(f"retrieval.rewrite={rewrite}", backend=backend, stream=stream)
    assert (*texts(backend), *backend.parts) == expected
    assert "searched" not in answer
    assert [call[0] for call in backend.asked] == ["retrieve", "stream" if stream else "complete"]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_generator_of_the_arm_writes_what_is_searched_for(stream: bool) -> None:
    backend = FakeBackend()
    backend.written, backend.fallbacks = (
        ("What moons has Mars?", "Moons of Mars?"),
        ("split: the generator failed: /secret",),
    )
    answer = await asked("retrieval.rewrite=generator", "retrieval.decompose=true", backend=backend, stream=stream)
    write, retrieve, last = backend.asked
    assert (write[0], retrieve[0], last[0]) == ("write", "retrieve", "stream" if stream else "complete")
    assert (write[1].arm, write[1].question) == ("rag", "Its moons?")
    assert write[1].query.history == (("user", "What is Mars?"), ("assistant", "A planet."))
    assert (retrieve[1], backend.parts) == ("What moons has Mars?", ("Moons of Mars?",))
    assert last[1].question == "Its moons?", "the answer is to the question as it was asked"
    assert answer["searched"] == {
        "texts": ["What moons has Mars?", "Moons of Mars?"],
        "fallbacks": ["split: the generator failed"],
        "prompt_tokens": 40,
        "completion_tokens": 6,
    }, "details of an error stay inside"
    assert answer["timings"]["rewriting_seconds"] >= 0


async def test_a_question_without_a_conversation_asks_the_generator_for_no_rewriting() -> None:
    backend = FakeBackend()
    await asked("retrieval.rewrite=generator", backend=backend, turns=TURNS[-1:])
    assert [call[0] for call in backend.asked] == ["retrieve", "complete"]
    await asked("retrieval.rewrite=generator", "answer.arm=base", backend=backend)
    assert backend.asked[-1][0] == "complete"
    assert len(backend.asked) == 3, "an arm without passages searches for nothing"
