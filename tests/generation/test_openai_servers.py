"""The OpenAI client with servers that refuse parameters, send reasoning, or send no text."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from ragtune_ray.generation.interface import GeneratorError
from ragtune_ray.generation.openai_client import OpenAIGenerator
from tests.support.openai_server import Server, prompts_of

OPENAI = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
TEMPERATURE = (
    "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) value is supported."
)


def refusing(accepts: set[str], errors: dict[str, Any]) -> Callable[[dict], Any]:
    """A server that refuses the first parameter of `errors` that a request has."""

    def reply(request: dict) -> Any:
        for name, error in errors.items():
            if name in request:
                return (400, {}, json.dumps({"error": error})) if isinstance(error, dict) else (422, {}, error)
        assert accepts <= set(request), "parameters that the server accepts are sent"
        return "fine"

    return reply


@pytest.mark.parametrize(
    ("errors", "accepts", "num_refused"),
    [
        (
            {"max_tokens": {"message": OPENAI, "param": "max_tokens"}},
            {"max_completion_tokens", "seed", "temperature"},
            1,
        ),
        ({"max_tokens": {"message": OPENAI}}, {"max_completion_tokens", "seed", "temperature"}, 1),
        (
            {"max_tokens": {"message": OPENAI}, "temperature": {"message": TEMPERATURE, "param": "temperature"}},
            {"max_completion_tokens", "seed"},
            2,
        ),
        (
            {
                "seed": '{"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}'
            },
            {"max_tokens", "temperature"},
            1,
        ),
        ({"seed": {"message": 'Unknown name "seed": Cannot find field.'}}, {"max_tokens", "temperature"}, 1),
    ],
)
def test_a_refused_parameter_is_sent_otherwise_and_remembered(
    server: Server, connect: Callable[..., OpenAIGenerator], errors: dict[str, Any], accepts: set[str], num_refused: int
) -> None:
    server.scripts["q"] = [refusing(accepts, errors)]
    client = connect(concurrency=1)
    made = client.generate(prompts_of("q", "q"), max_new_tokens=9)
    assert [(one.text, one.error) for one in made] == [("fine", "")] * 2
    assert len(server.requests) == num_refused + 2
    assert server.requests[-1].get("max_completion_tokens", server.requests[-1].get("max_tokens")) == 9
    assert "".join(client.stream(prompts_of("q")[0], max_new_tokens=9)) == "fine"
    assert len(server.requests) == num_refused + 3
    fresh = connect()
    assert "".join(fresh.stream(prompts_of("q")[0], max_new_tokens=9)) == "fine"
    assert len(server.requests) == 2 * num_refused + 4


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        ("temperature above 1 is not allowed", ""),
        ("temperature: values greater than 1 are not supported", ""),
        ("Unsupported value: 'temperature' does not support 1.5 with this model.", ""),
        ("temperature=1.5 is not supported", ""),
        ("temperature is limited to 1; use 1 instead of values above", ""),
        ("temperature must be a number", ""),
        (TEMPERATURE, "temperature"),
        ("invalid temperature: only 1 is allowed for this model", "temperature"),
        ("`temperature` is deprecated for this model.", "temperature"),
        ("Unrecognized request argument supplied: temperature", "temperature"),
        ("Completions.create() got an unexpected keyword argument 'temperature'", "temperature"),
        ("temperature is not supported by this model", "temperature"),
    ],
)
def test_a_refused_value_fails_its_request_alone(
    server: Server, connect: Callable[..., OpenAIGenerator], message: str, refused: str
) -> None:
    error = json.dumps({"error": {"message": message, "param": "temperature"}})
    server.scripts["q"] = [lambda request: (400, {}, error) if request.get("temperature", 0) > 1 else "fine"]
    client = connect(concurrency=1)
    (hot,) = client.generate(prompts_of("q"), max_new_tokens=9, temperature=1.5)
    (mild,) = client.generate(prompts_of("q"), max_new_tokens=9, temperature=0.5)
    assert mild.text == "fine"
    if refused:
        assert (hot.text, "temperature" in server.requests[-1]) == ("fine", False)
    else:
        assert message in hot.error
        assert server.requests[-1]["temperature"] == 0.5


def test_other_errors_are_not_retried_and_nothing_is_remembered(
    server: Server, connect: Callable[..., OpenAIGenerator]
) -> None:
    server.scripts["long"] = [(400, {}, '{"error": {"message": "max_tokens is too large: 9", "param": "max_tokens"}}')]
    server.scripts["never"] = [(400, {}, json.dumps({"error": {"message": OPENAI}}))]
    client = connect(concurrency=1)
    long, never, fine = client.generate(prompts_of("long", "never", "fine"), max_new_tokens=9)
    assert "too large" in long.error
    assert "max_completion_tokens" in never.error
    assert fine.text == "FINE"
    assert [request["messages"][1]["content"] for request in server.requests] == ["long", "never", "never", "fine"]
    assert "max_tokens" in server.requests[-1]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<think>\nIs it [1]?\n</think>\n\nParis [2].", "Paris [2]."),
        (" <think></think>Paris", "Paris"),
        ({"content": "Paris", "reasoning_content": "Is it [1]?"}, "Paris"),
        ({"content": [{"type": "thinking", "thinking": "Is it?"}, {"type": "text", "text": "Paris"}]}, "Paris"),
        ("The tag <think> opens and </think> closes.", "The tag <think> opens and </think> closes."),
        ("It ends with\n</think> and\n<br>", "It ends with\n</think> and\n<br>"),
        ("<b>Paris</b>", "<b>Paris</b>"),
        (" Paris", " Paris"),
        ("<th", "<th"),
    ],
)
def test_reasoning_is_not_part_of_the_answer(
    server: Server, connect: Callable[..., OpenAIGenerator], reply: Any, expected: str
) -> None:
    server.scripts["q"] = [reply]
    server.finish = "stop"
    (made,) = connect().generate(prompts_of("q"), max_new_tokens=9)
    assert (made.text, made.error, made.finish) == (expected, "", "stop")
    assert "".join(connect().stream(prompts_of("q")[0], max_new_tokens=9)) == expected


def test_reasoning_whose_opening_mark_is_in_the_prompt_is_removed_or_refused(
    server: Server, connect: Callable[..., OpenAIGenerator]
) -> None:
    server.scripts["q"] = ["Is it [1]?\n</think>\n\nParis [2]."]
    (made,) = connect().generate(prompts_of("q"), max_new_tokens=9)
    assert made.text == "Paris [2]."
    with pytest.raises(GeneratorError, match="--reasoning-parser"):  # it was shown before the mark
        list(connect().stream(prompts_of("q")[0], max_new_tokens=9))


@pytest.mark.parametrize(
    ("reply", "finish", "reason"),
    [
        ({"content": None}, "stop", "no text (content is null)"),
        ({}, "stop", "no text (content is null)"),
        ({"content": None, "reasoning_content": "Is it"}, "length", "raise generator.max_new_tokens"),
        ("<think>Is it", "length", "raise generator.max_new_tokens"),
        ({"content": ""}, "length", "raise generator.max_new_tokens"),
    ],
)
def test_a_reply_without_text_is_a_failed_row(
    server: Server, connect: Callable[..., OpenAIGenerator], reply: Any, finish: str, reason: str
) -> None:
    server.scripts["q"], server.finish = [reply], finish
    (made,) = connect().generate(prompts_of("q"), max_new_tokens=9)
    assert reason in made.error
    assert (made.text, made.completion_tokens) == ("", 3)
    with pytest.raises(GeneratorError) as error:
        list(connect().stream(prompts_of("q")[0], max_new_tokens=9))
    assert str(error.value) == made.error


def test_a_refusal_is_a_failed_row_and_an_empty_answer_is_none(
    server: Server, connect: Callable[..., OpenAIGenerator]
) -> None:
    server.finish = "stop"
    server.scripts |= {"bad": [{"content": None, "refusal": "I cannot\nhelp."}], "empty": [{"content": ""}]}
    bad, empty = connect().generate(prompts_of("bad", "empty"), max_new_tokens=9)
    assert (bad.error, empty.error, empty.text) == ("the model refused: I cannot help.", "", "")
    assert list(connect().stream(prompts_of("empty")[0], max_new_tokens=9)) == []
