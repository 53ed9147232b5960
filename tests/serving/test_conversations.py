"""Splitting conversations, and their limits."""

import pytest

from ragtune_ray import config
from ragtune_ray.serving.conversations import conversation_of
from ragtune_ray.serving.requests import ApiError

LIMITS = config.Serve()


def test_the_last_message_is_the_question_and_earlier_ones_history() -> None:
    turns = [("system", "Be brief."), ("user", "What is Mars?"), ("assistant", "A planet."), ("user", "Its moons?")]
    said = conversation_of(turns, LIMITS, "messages")
    assert said.question == "Its moons?"
    assert said.history == (("user", "What is Mars?"), ("assistant", "A planet."))
    assert said.instruction == "Be brief."
    assert conversation_of([("user", "What is Mars?")], LIMITS, "messages").history == ()


def test_earlier_turns_may_be_long() -> None:
    turns = [("user", "x" * 20_000), ("assistant", "y" * 40_000), ("user", "What is Mars?")]
    said = conversation_of(turns, LIMITS, "messages")
    assert said.history == tuple(turns[:-1])


@pytest.mark.parametrize(
    ("turns", "code"),
    [
        pytest.param([("assistant", "x")], "invalid_value", id="no question"),
        pytest.param([("user", "  ")], "invalid_value", id="empty"),
        pytest.param([("user", "x" * 8001)], "text_too_long", id="long question"),
        pytest.param([("system", "x" * 4001)] * 2 + [("user", "x")], "text_too_long", id="long instruction"),
        pytest.param([("system", "x" * 8000)] * 30 + [("user", "x")], "text_too_long", id="thirty instructions"),
        pytest.param([("user", "x" * 60_000)] * 2 + [("user", "x")], "text_too_long", id="long conversation"),
        pytest.param([("user", "x\0")], "invalid_text", id="NUL"),
        pytest.param([("user", "\ud83d"), ("user", "x")], "invalid_text", id="surrogate in an earlier turn"),
        pytest.param([("user", "x")] * 513, "too_many_messages", id="many messages"),
    ],
)
def test_an_unanswerable_conversation_is_refused_by_the_field_it_came_in(
    turns: list[tuple[str, str]], code: str
) -> None:
    with pytest.raises(ApiError) as error:
        conversation_of(turns, LIMITS, "input")
    assert (error.value.status, error.value.code, error.value.param) == (400, code, "input")
