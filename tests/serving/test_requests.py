"""Parsing and validating request bodies."""

import json

import pytest

from ragtune_ray import config
from ragtune_ray.serving import requests
from ragtune_ray.serving.requests import ApiError, ChatRequest

LIMITS = config.Serve()


def chat(*turns: tuple[str, str], **fields) -> ChatRequest:
    body = {"messages": [{"role": role, "content": content} for role, content in turns], **fields}
    return requests.parse(ChatRequest, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        pytest.param(b"", "invalid_json", id="empty"),
        pytest.param(b"{", "invalid_json", id="cut"),
        pytest.param(b"\xff\xfe\xfa", "invalid_json", id="not UTF-8"),
        pytest.param(b"[]", "invalid_body", id="array"),
        pytest.param(b"null", "invalid_body", id="null"),
        pytest.param(b"3", "invalid_body", id="number"),
        pytest.param(b'"x"', "invalid_body", id="string"),
        pytest.param(b"[" * 100_000, "invalid_json", id="deep"),
        pytest.param(b'{"messages": [], "messages": []}', "invalid_json", id="a field twice"),
        pytest.param(b'{"temperature": NaN}', "invalid_json", id="NaN"),
        pytest.param(b'{"\\ud800": 1}', "invalid_json", id="lone surrogate"),
        pytest.param(b'{"messages": []}', "invalid_value", id="no message"),
        pytest.param(b'{"messages": [{"role": "user"}]}', "invalid_value", id="no content"),
        pytest.param(b'{"messages": [{"role": "tool", "content": "x"}]}', "invalid_value", id="role"),
    ],
)
def test_an_invalid_body_is_refused(raw: bytes, code: str) -> None:
    with pytest.raises(ApiError) as error:
        requests.parse(ChatRequest, raw)
    assert (error.value.status, error.value.code) == (400, code)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []),
        ("n", 2),
        ("logprobs", True),
        ("top_p", 0.5),
        ("presence_penalty", 1),
        ("chat_template", "x"),
        ("chat_template_kwargs", {}),
        ("response_format", {"type": "json_object"}),
        ("temperature", 9),
        ("temperature", float(10**400) if False else 1e308),
        ("max_tokens", 0),
        ("top_k", -1),
        ("stream", "maybe"),
        ("seed", -1),
    ],
)
def test_an_unsupported_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ApiError) as error:
        chat(("user", "x"), **{field: value})
    assert error.value.status == 400
    assert (error.value.param or "").split(".")[0] == field
    assert str(value) not in error.value.message or len(str(value)) < 4, "the value is not quoted"


def test_the_last_message_is_the_question_and_earlier_ones_history() -> None:
    said = requests.conversation(
        chat(("system", "Be brief."), ("user", "What is Mars?"), ("assistant", "A planet."), ("user", "Its moons?")),
        LIMITS,
    )
    assert said.question == "Its moons?"
    assert said.history == (("user", "What is Mars?"), ("assistant", "A planet."))
    assert said.instruction == "Be brief."
    assert said.search == "What is Mars?\nIts moons?"
    assert requests.conversation(chat(("user", "What is Mars?")), LIMITS).search == "What is Mars?"


def test_content_may_have_parts_if_all_are_text() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "Mars?"}]
    request = requests.parse(ChatRequest, json.dumps({"messages": [{"role": "user", "content": parts}]}).encode())
    assert requests.conversation(request, LIMITS).question == "What is Mars?"
    image = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]
    with pytest.raises(ApiError):
        requests.parse(ChatRequest, json.dumps({"messages": [{"role": "user", "content": image}]}).encode())


@pytest.mark.parametrize(
    ("turns", "code"),
    [
        ([("assistant", "x")], "invalid_value"),
        ([("user", "  ")], "invalid_value"),
        ([("user", "x" * 8001)], "text_too_long"),
        ([("user", "x\0")], "invalid_text"),
        ([("user", "\ud83d")], "invalid_text"),
        ([("user", "x")] * 65, "too_many_messages"),
    ],
)
def test_an_unanswerable_conversation_is_refused(turns: list[tuple[str, str]], code: str) -> None:
    with pytest.raises(ApiError) as error:
        requests.conversation(chat(*turns), LIMITS)
    assert error.value.code == code


def test_limits_on_tokens_and_stop_sequences() -> None:
    settings = config.Config()
    assert requests.max_new_tokens_of(chat(("user", "x")), settings) == settings.generator.max_new_tokens
    assert requests.max_new_tokens_of(chat(("user", "x"), max_completion_tokens=7), settings) == 7
    with pytest.raises(ApiError) as error:
        requests.max_new_tokens_of(chat(("user", "x"), max_tokens=513), settings)
    assert error.value.code == "over_limit"
    assert requests.stops_of(chat(("user", "x"), stop="a")) == ("a",)
    for stop in (["a"] * 5, [""], ["x" * 257]):
        with pytest.raises(ApiError):
            requests.stops_of(chat(("user", "x"), stop=stop))
