"""Messages of conversations as clients send them back."""

from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.serving import requests
from ragtune_ray.serving.openai.chat import ChatRequest, chat_question
from ragtune_ray.serving.openai.responses import ResponseRequest, response_question
from ragtune_ray.serving.requests import ApiError

LIMITS = config.Serve()
ASKED = {"role": "user", "content": "What is Mars?"}
NEXT = {"role": "user", "content": "Its moons?"}


def chat_history(*messages: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    request = requests.validated(ChatRequest, {"messages": [*messages, NEXT]})
    return chat_question(request, LIMITS).conversation.history


def response_history(*items: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    request = requests.validated(ResponseRequest, {"input": [*items, NEXT]})
    return response_question(request, LIMITS).conversation.history


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"content": "A planet.", "refusal": None, "annotations": []}, "A planet."),
        ({"content": "A planet.", "tool_calls": None, "function_call": None, "audio": None, "name": None}, "A planet."),
        ({"content": "A planet.", "tool_calls": [], "annotations": [{"type": "url_citation"}]}, "A planet."),
        ({"content": "A planet.", "reasoning_content": "Mars is...", "provider_specific_fields": {}}, "A planet."),
        (
            {"content": [{"type": "text", "text": "A ", "annotations": []}, {"type": "text", "text": "planet."}]},
            "A planet.",
        ),
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": None}, ""),
        ({}, ""),
    ],
)
def test_messages_of_the_assistant_are_taken_as_they_were_received(more: dict[str, Any], text: str) -> None:
    assert chat_history(ASKED, {"role": "assistant", **more}) == (("user", "What is Mars?"), ("assistant", text))


def test_items_of_a_response_are_taken_as_they_were_received() -> None:
    part = {"type": "output_text", "text": "A planet.", "annotations": [{"type": "url_citation"}], "logprobs": []}
    item = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
        "phase": None,
    }
    asked = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is Mars?"}]}
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    assert response_history(asked, thought, item) == (("user", "What is Mars?"), ("assistant", "A planet."))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "4", "tool_call_id": "x"}, "calls no tools"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}, "calls no tools"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]},
            "leave out images",
        ),
        ({"role": "user", "content": ["x"]}, "every part must be a text"),
        ({"role": "user", "content": "x", "surprise": 1}, "does not know this field"),
    ],
)
def test_a_message_that_is_no_text_is_refused_with_the_next_step(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as error:
        chat_history(message)
    assert (error.value.param or "").startswith("messages.0")


@pytest.mark.parametrize("kind", ["function_call", "function_call_output", "item_reference", "x", "\ud800"])
def test_an_item_that_is_no_message_is_refused_by_its_type(kind: str) -> None:
    shown = kind.replace("\ud800", "\ufffd")
    with pytest.raises(ApiError, match=rf"input: only messages are supported; leave out the items of type {shown}"):
        response_history({"type": kind, "id": "x"})


@pytest.mark.parametrize("kind", [[], {}, ["message"], None, 1])
def test_a_type_that_is_no_text_is_refused_as_a_field(kind: Any) -> None:
    with pytest.raises(ApiError, match=r"input.0.type: Input should be 'message'"):
        response_history({"type": kind, "role": "user", "content": "x"})
