"""The fields of OpenAI's requests: used, as if absent, or refused by name."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from ragtune_ray import config
from ragtune_ray.serving.backend import Job
from ragtune_ray.serving.openai import fields
from ragtune_ray.serving.openai.chat import ChatRequest, chat_question
from ragtune_ray.serving.openai.completions import CompletionRequest, completion_questions
from ragtune_ray.serving.openai.embeddings import EmbeddingsRequest
from ragtune_ray.serving.openai.responses import ResponseRequest, response_question
from ragtune_ray.serving.requests import ApiError

LIMITS = config.Serve()
LEAST: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "x"}]},
    "completions": {"prompt": "x"},
    "responses": {"input": "x"},
    "embeddings": {"input": "x"},
}


def parsed(kind: str, **given: Any) -> Any:
    """The question of a request; that of embeddings is the request itself."""
    raw = json.dumps(LEAST[kind] | given).encode()
    match kind:
        case "chat":
            return chat_question(fields.parse(ChatRequest, raw, fields.CHAT), LIMITS)
        case "completions":
            return completion_questions(fields.parse(CompletionRequest, raw, fields.COMPLETIONS), LIMITS)[0]
        case "responses":
            return response_question(fields.parse(ResponseRequest, raw, fields.RESPONSES), LIMITS)
    return fields.parse(EmbeddingsRequest, raw, fields.EMBEDDINGS)


@pytest.mark.parametrize("kind", ["chat", "completions", "responses"])
def test_sampling_that_a_request_does_not_name_changes_nothing(kind: str) -> None:
    asked = parsed(kind)
    assert (asked.top_p, asked.presence_penalty, asked.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (asked.temperature, asked.max_new_tokens, asked.seed, asked.num_answers) == (None, None, None, 1)
    job = Job("Who?", "rag", (), (), "", (), "", 8, 0.0, (), 0)
    assert (job.top_p, job.presence_penalty, job.frequency_penalty) == (1.0, 0.0, 0.0)


NEUTRAL: dict[str, dict[str, Any]] = {
    "chat": {
        "tools": [],
        "tool_choice": "auto",
        "functions": [],
        "function_call": "none",
        "logit_bias": {},
        "logprobs": False,
        "top_logprobs": 0,
        "n": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "stream": None,
        "stop": None,
        "stream_options": {"include_usage": None},
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "prediction": {"type": "content", "content": "x"},
        "prompt_cache_key": "x",
        "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h",
        "reasoning_effort": "high",
        "safety_identifier": "x",
        "service_tier": "priority",
        "store": True,
        "user": "x",
        "verbosity": "low",
        "audio": None,
        "web_search_options": None,
        "moderation": None,
    },
    "completions": {
        "best_of": 1,
        "echo": False,
        "logit_bias": {},
        "logprobs": None,
        "suffix": "",
        "user": "x",
        "n": None,
    },
    "responses": {
        "tools": [],
        "tool_choice": "auto",
        "background": False,
        "include": ["reasoning.encrypted_content", "file_search_call.results"],
        "instructions": None,
        "max_tool_calls": 3,
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "conversation": None,
        "prompt": None,
        "reasoning": {"effort": "low"},
        "store": True,
        "stream_options": {"include_obfuscation": False},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "top_logprobs": 0,
        "truncation": "disabled",
        "context_management": [],
        "top_p": None,
    },
    "embeddings": {"encoding_format": None, "dimensions": None, "user": "x", "model": None},
}


@pytest.mark.parametrize("kind", NEUTRAL)
def test_a_null_or_neutral_field_is_as_if_absent(kind: str) -> None:
    plain = parsed(kind)
    for name, value in NEUTRAL[kind].items():
        assert parsed(kind, **{name: value}) == plain, name
        assert parsed(kind, **{name: None}) == plain, name
    assert parsed(kind, **NEUTRAL[kind]) == plain


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_tools_that_may_not_be_called_are_as_if_absent(kind: str) -> None:
    tool = {"type": "function", "name": "f", "function": {"name": "f"}}
    assert parsed(kind, tools=[tool], tool_choice="none") == parsed(kind)
    for choice in ({}, {"tool_choice": "auto"}):
        with pytest.raises(ApiError, match=r"tools: this endpoint calls no tools; leave it out"):
            parsed(kind, tools=[tool], **choice)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("chat", "tool_choice", "required"),
        ("chat", "functions", [{"name": "f"}]),
        ("chat", "logit_bias", {"50256": -100}),
        ("chat", "logprobs", True),
        ("chat", "logprobs", 0),
        ("chat", "top_logprobs", 2),
        ("chat", "response_format", {"type": "json_object"}),
        ("chat", "response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("chat", "modalities", ["text", "audio"]),
        ("chat", "audio", {"voice": "alloy"}),
        ("chat", "web_search_options", {}),
        ("completions", "echo", True),
        ("completions", "logprobs", 0),
        ("completions", "suffix", "."),
        ("completions", "best_of", 2),
        ("responses", "previous_response_id", "resp_1"),
        ("responses", "conversation", "conv_1"),
        ("responses", "background", True),
        ("responses", "include", ["message.output_text.logprobs"]),
        ("responses", "text", {"format": {"type": "json_schema", "name": "x", "schema": {}}}),
        ("responses", "prompt", {"id": "x"}),
    ],
)
def test_a_field_that_asks_for_what_cannot_be_done_is_refused_by_name(kind: str, name: str, value: object) -> None:
    with pytest.raises(ApiError) as error:
        parsed(kind, **{name: value})
    assert (error.value.status, error.value.code, error.value.param) == (400, "unsupported_parameter", name)
    assert "leave" in error.value.message or "send" in error.value.message, "the message says what to do"


@pytest.mark.parametrize("kind", LEAST)
@pytest.mark.parametrize("value", [None, 0, "x"])
@pytest.mark.parametrize("name", ["chat_template_kwargs", "chat_template"])
def test_an_unknown_field_is_refused_by_name_even_if_it_is_null(kind: str, name: str, value: object) -> None:
    with pytest.raises(ApiError) as error:
        parsed(kind, **{name: value})
    assert (error.value.status, error.value.code, error.value.param) == (400, "unknown_parameter", name)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("chat", "temperature", 9),
        ("chat", "temperature", 1e308),
        ("chat", "top_p", 1.5),
        ("chat", "max_tokens", 0),
        ("chat", "top_k", -1),
        ("chat", "stream", "maybe"),
        ("chat", "seed", -(2**63) - 1),
        ("chat", "n", 0),
        ("chat", "n", 9),
        ("chat", "presence_penalty", 3),
        ("chat", "stop", ["a"] * 5),
        ("chat", "stop", [""]),
        ("chat", "stop", ["x" * 257]),
        ("chat", "messages", []),
        ("completions", "prompt", [1, 2, 3]),
        ("completions", "prompt", []),
        ("completions", "prompt", ["a"] * 9),
        ("responses", "input", []),
        ("responses", "metadata", {"a": 1}),
        ("embeddings", "encoding_format", "int8"),
        ("embeddings", "input", []),
        ("embeddings", "input", 3),
    ],
)
def test_an_invalid_value_is_refused_by_the_name_of_its_field(kind: str, name: str, value: object) -> None:
    with pytest.raises(ApiError) as error:
        parsed(kind, **{name: value})
    assert error.value.status == 400
    assert (error.value.param or "").split(".")[0] == name
    assert str(value) not in error.value.message or len(str(value)) < 4, "the value is not quoted"


def test_a_stream_has_one_answer() -> None:
    assert parsed("chat", n=3).num_answers == 3
    with pytest.raises(ApiError, match=r"n: a stream has one answer"):
        parsed("chat", n=3, stream=True)
    with pytest.raises(ApiError, match=r"prompt: a stream answers one prompt"):
        parsed("completions", prompt=["a", "b"], stream=True)
    with pytest.raises(ApiError, match=r"prompt: 3 prompts with n=3; the limit is 8 answers"):
        parsed("completions", prompt=["a", "b", "c"], n=3)


def test_fields_become_the_question() -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": -1,
        "stop": "END",
        "presence_penalty": 1,
        "frequency_penalty": -1,
    }
    extensions = {"top_k": 2, "filter": {"year": 2020}, "retrieval": "always", "timeout_seconds": 3}
    for kind in ("chat", "completions"):
        asked = parsed(kind, model="base", max_tokens=9, **sampling, **extensions)
        assert (asked.temperature, asked.top_p, asked.seed, asked.stop) == (0.5, 0.9, -1, ("END",))
        assert (asked.presence_penalty, asked.frequency_penalty, asked.max_new_tokens) == (1, -1, 9)
    for kind, more in (("chat", {}), ("completions", {}), ("responses", {"max_output_tokens": 9})):
        asked = parsed(kind, model="base", **extensions, **more)
        assert (asked.model, asked.top_k, asked.filter) == ("base", 2, {"year": 2020})
        assert (asked.retrieval, asked.timeout_seconds) == ("always", 3)
        assert asked.max_new_tokens == more.get("max_output_tokens")
    assert parsed("chat", max_tokens=5, max_completion_tokens=7).max_new_tokens == 7
    assert parsed("completions", prompt=["What is Mars?"]).conversation.question == "What is Mars?"


def test_token_ids_are_refused_with_the_switch_of_langchain() -> None:
    for ids in ([[1, 2], [3]], [1, 2]):
        with pytest.raises(
            ApiError, match=r"input: must be a text or a list of texts; token ids.*check_embedding_ctx_length=False"
        ):
            parsed("embeddings", input=ids)


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        ("chat", "messages", [1]),
        ("chat", "messages", [{"role": "user", "content": [{"type": "text", "text": 3}] * 50}]),
        ("chat", "stop", [3]),
        ("responses", "input", [{"role": "x", "content": "x"}]),
        ("embeddings", "input", [3]),
    ],
)
def test_many_invalid_elements_are_one_error(kind: str, name: str, values: list[Any]) -> None:
    """So that a body of 100,000 of them is refused as fast as any other."""
    body = LEAST[kind] | {name: values * 50}
    with pytest.raises(ValidationError) as error:
        {"chat": ChatRequest, "responses": ResponseRequest, "embeddings": EmbeddingsRequest}[kind].model_validate(body)
    assert error.value.error_count() == 1


@pytest.mark.parametrize(
    ("kind", "given", "field"),
    [
        ("responses", {"input": [{"role": "x", "content": "x"}]}, "input.0.role"),
        (
            "responses",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": 3}]}]},
            "input.0.content.0.text",
        ),
        ("chat", {"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ("chat", {"stop": ["a", ""]}, "stop.1"),
    ],
)
def test_the_error_names_the_element_at_fault(kind: str, given: dict[str, Any], field: str) -> None:
    with pytest.raises(ApiError) as error:
        parsed(kind, **given)
    assert error.value.param == field
