"""The requests that Open WebUI sends: chats, its tasks (titles, tags, queries), embeddings, and its mode of responses."""

from typing import Any

import pytest

from tests.support.gateways import client

pytestmark = pytest.mark.anyio

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "What is the code of vessel0?"}
ANSWERED = {"role": "assistant", "content": "It is secret0."}
TASK = (
    "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Output:\nJSON format: "
    '{ "title": "your concise title here" }\n### Chat History:\n<chat_history>\nUSER: What is the code of vessel0?\n</chat_history>'
)
ADVANCED = {  # every parameter that a person can set for a model or a chat and that is sent on
    "temperature": 0.8,
    "top_p": 0.9,
    "max_tokens": 4096,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.0,
    "reasoning_effort": "medium",
    "seed": 42,
    "stop": ["END"],
    "logit_bias": {},
}
CHATS: dict[str, dict[str, Any]] = {
    "first turn": {"stream": True, "messages": [ASKED]},
    "next turn, usage shown": {
        "stream": True,
        "messages": [SYSTEM, ASKED, ANSWERED, ASKED],
        "stream_options": {"include_usage": True},
    },
    "advanced parameters": {"stream": True, "messages": [ASKED], **ADVANCED},
    "parts": {"stream": True, "messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]},
    "title": {"stream": False, "messages": [{"role": "user", "content": TASK}], "max_completion_tokens": 1000},
    "tags, follow-ups and queries": {"stream": False, "messages": [{"role": "user", "content": TASK}]},
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("name", CHATS)
async def test_chats_and_tasks_are_answered(name: str) -> None:
    async with client() as http:
        reply = await http.post("/v1/chat/completions", json={"model": "rag", **CHATS[name]})
        assert reply.status_code == 200, reply.text
        assert ("data: [DONE]" in reply.text) is CHATS[name]["stream"]


async def test_its_mode_of_responses_is_answered() -> None:
    def item(role: str, kind: str, text: str) -> dict[str, Any]:
        return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}

    turns = [
        item("user", "input_text", "What is the code of vessel0?"),
        item("assistant", "output_text", "It is secret0."),
        item("user", "input_text", "And of vessel1?"),
    ]
    body = {"model": "rag", "stream": True, "input": turns, "instructions": "Be brief.", "max_output_tokens": 4096}
    async with client() as http:
        reply = await http.post("/v1/responses", json=body)
        assert reply.status_code == 200, reply.text
        assert "event: response.completed" in reply.text
        job = http.backend.asked[-1][1]
        assert job.history == (("user", turns[0]["content"][0]["text"]), ("assistant", "It is secret0."))
        assert job.instruction == "Be brief."


async def test_models_are_listed_and_documents_embedded() -> None:
    async with client() as http:
        listed = (await http.get("/v1/models")).json()["data"]
        model = listed[-1]["id"]
        reply = await http.post("/v1/embeddings", json={"input": ["a", "b"], "model": model})
        assert [row["index"] for row in reply.json()["data"]] == [0, 1]
