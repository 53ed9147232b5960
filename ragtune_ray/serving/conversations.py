"""Splits a conversation into question, history and instruction, and limits its size before anything is computed for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ragtune_ray import config
from ragtune_ray.serving.requests import checked_text, invalid

Turn: TypeAlias = tuple[str, str]
"""(role, content)."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation, split into its parts."""

    question: str
    """The last turn, which is the user's."""
    history: tuple[Turn, ...]
    """The earlier turns, oldest first."""
    instruction: str
    """The client's system messages, joined."""


def conversation_of(turns: Sequence[Turn], limits: config.Serve, field: str) -> Conversation:
    """Split turns of the roles system, developer, user and assistant; `field` is the field of the request that had them.

    Earlier turns may be long, since the oldest are left out of the prompt; only all turns together are limited.

    Raises:
        ApiError: 400; there are too many turns or characters, the last turn is not a question, or a text is invalid.
    """
    if len(turns) > limits.max_messages:
        reason = f"{len(turns)} messages; the limit is {limits.max_messages}; leave out the oldest"
        raise invalid(field, reason, code="too_many_messages")
    num_characters = sum(len(text) for _, text in turns)
    if num_characters > limits.max_conversation_characters:
        limit = limits.max_conversation_characters
        reason = f"{num_characters:,} characters; the limit is {limit:,}; leave out the oldest messages"
        raise invalid(field, reason, code="text_too_long")
    instruction = "\n".join(text for role, text in turns if role in ("system", "developer"))
    spoken = [(role, text) for role, text in turns if role not in ("system", "developer")]
    if not spoken or spoken[-1][0] != "user" or not spoken[-1][1].strip():
        raise invalid(field, "the last message must be the user's, and not empty")
    question = checked_text(spoken[-1][1], field, limits.max_question_characters)
    if len(instruction) > limits.max_question_characters:
        limit = limits.max_question_characters
        reason = f"the system messages have {len(instruction):,} characters; the limit is {limit:,}; shorten them"
        raise invalid(field, reason, code="text_too_long")
    for _, text in turns:
        checked_text(text, field, limits.max_conversation_characters)
    return Conversation(question, tuple(spoken[:-1]), instruction)
