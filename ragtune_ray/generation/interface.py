"""What a generator takes and gives, whichever engine does the work, and where an answer ends.

In and out: plain values. This module knows nothing of torch, HTTP or files.
"""

from __future__ import annotations

from collections.abc import Generator as Stream
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from ragtune_ray import RagtuneError
from ragtune_ray.schema import Passage

__all__ = ["Completion", "Finish", "Generator", "GeneratorError", "Prompt", "Tokenizer", "settled_text"]

_INCOMPLETE = "\ufffd"  # what a tokenizer shows for the first bytes of an unfinished character


class GeneratorError(RagtuneError, ValueError):
    """A generator cannot be loaded or cannot do what was asked; the message says what to do next."""


Finish: TypeAlias = Literal["stop", "length"]
"""`stop`: the model ended it or a stop string did; `length`: `max_new_tokens` or the model's context did."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the generator is shown for one query."""

    messages: tuple[tuple[str, str], ...]
    """(role, content); the system message comes first."""
    passages: tuple[Passage, ...]
    """The passages in the prompt, in the order of their numbers, which start at 1. A shortened passage has its shortened text."""
    num_tokens: int
    """Tokens of the rendered messages."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a generator made of one prompt."""

    text: str
    """The answer; a stop string and what follows it are cut off. Empty when the row failed."""
    prompt_tokens: int
    completion_tokens: int
    """Tokens generated, those of a stop string included, the end-of-sequence token not."""
    seconds: float
    """Wall time of its batch divided by the rows in it; of the request, with engine `openai`."""
    finish: Finish
    error: str
    """Why the row failed; empty when ok."""
    confidence: float | None = None
    """The geometric mean of the probabilities of its tokens, 0 to 1; None where the engine does not tell."""
    log_probability: float | None = None
    """The sum of ln p over its tokens, the end included where it came to one; None where the engine does not tell."""


class Tokenizer(Protocol):
    """What prompts are measured with."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Messages (role, content) as the text the model reads."""


class Generator(Tokenizer, Protocol):
    """What bulk answering and serving need of an engine."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Completion]:
        """One completion per prompt, in their order; a failed row carries its error."""

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Stream[str, None, Finish]:
        """Pieces of the text that `generate` gives for this prompt; returns why it ended."""

    def log_likelihood(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[float, int]]:
        """Sum of ln p over the tokens of each answer after its prompt, and their number."""


def settled_text(text: str, stop: Sequence[str], *, ended: bool) -> tuple[str, bool]:
    """The part of a growing text that no later token can take back, and whether a stop string ends it there.

    Held back while the text grows: an unfinished character and whatever may be the beginning of a stop string. So the
    settled text of a prefix is always a prefix of the settled text of the whole.

    Args:
        text: what was generated so far.
        stop: texts at which an answer ends; the empty string is ignored.
        ended: no more will come, so nothing is held back.

    >>> settled_text("Paris</", ["</s>"], ended=False)
    ('Paris', False)
    >>> settled_text("Paris</s> and", ["</s>"], ended=False)
    ('Paris', True)
    """
    if not ended:
        text = text.rstrip(_INCOMPLETE)
    cuts = [cut for cut in (text.find(mark) for mark in stop if mark) if cut >= 0]
    if cuts:
        return text[: min(cuts)], True
    if ended:
        return text, False
    longest = max((len(mark) for mark in stop), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(mark.startswith(text[start:]) for mark in stop):
            return text[:start], False
    return text, False
