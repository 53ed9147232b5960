"""The interface of every generation engine: prompts, completions, and the rule where an answer ends."""

from __future__ import annotations

from collections.abc import Generator as Stream
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Required, TypeAlias, TypedDict, Unpack

from ragtune_ray import RagtuneError
from ragtune_ray.schema import Passage

THINK, THINK_END = "<think>", "</think>"
"""The marks around a block of reasoning, as DeepSeek-R1, Qwen3 and others write it."""
INCOMPLETE = "\ufffd"
"""Decoders write this for a character whose last bytes are missing, so far or because the answer was cut."""


class GeneratorError(RagtuneError, ValueError):
    """A generator cannot be loaded or cannot handle the request; the message says what to do next."""


Finish: TypeAlias = Literal["stop", "length"]
"""`stop`: an end token or a stop string ended the answer; `length`: `max_new_tokens` or the model's context did."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the generator reads for one query."""

    messages: tuple[tuple[str, str], ...]
    """(role, content); the system message comes first."""
    passages: tuple[Passage, ...]
    """The passages in the prompt, numbered from 1 in this order; the text of a shortened one is the shortened text."""
    num_tokens: int
    """Number of tokens of the rendered messages."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The text generated for one prompt, and what it cost."""

    text: str
    """The answer, cut off before the first stop string. Empty if the row failed."""
    prompt_tokens: int
    completion_tokens: int
    """Number of generated tokens, including those of a stop string but not the end-of-sequence token."""
    seconds: float
    """Wall time of the batch divided by its number of rows; with engine `openai`, wall time of the request."""
    finish: Finish
    error: str
    """Why the row failed; empty if it succeeded."""
    confidence: float | None = None
    """The geometric mean of the probabilities of its tokens, 0 to 1; None if the engine does not report them."""
    log_probability: float | None = None
    """The sum of ln p over its tokens, including an end token; None if the engine does not report it."""


class DecodingOptions(TypedDict, total=False):
    """Keyword arguments of every engine."""

    max_new_tokens: Required[int]
    """Longest answer, at least 1."""
    temperature: float
    """0, the default, is greedy."""
    stop: Sequence[str]
    """Texts at which an answer ends; by default none."""
    seed: int
    """Seed of sampled answers, by default 0; for the same prompt and seed the answer is the same."""
    top_p: float
    """Sampled answers draw from the likeliest tokens whose probabilities add up to this; by default 1, from all."""
    presence_penalty: float
    """Subtracted from the logit of every token that the answer has already; by default 0."""
    frequency_penalty: float
    """Subtracted as often as the answer has the token; by default 0."""


class Tokenizer(Protocol):
    """What building a prompt within a token budget needs."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text."""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Messages (role, content) as the text that the model reads."""


class Generator(Tokenizer, Protocol):
    """What bulk answering and serving need from an engine."""

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[DecodingOptions]) -> list[Completion]:
        """One completion per prompt, in the same order; the completion of a prompt that failed has an `error`."""

    def stream(self, prompt: Prompt, **options: Unpack[DecodingOptions]) -> Stream[str, None, Finish]:
        """Yield, piece by piece, the text that `generate` returns for this prompt; return why it ended."""

    def log_likelihood(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[float, int]]:
        """For each answer, the sum of ln p over its tokens given its prompt, and the number of those tokens."""


def after_reasoning(text: str, *, ended: bool) -> str:
    """A growing text without a block of reasoning at its beginning; "" until `ended` while it may begin with one.

    >>> after_reasoning("<think>Is it [1]?</think> It is Paris [2].", ended=False)
    'It is Paris [2].'
    >>> after_reasoning("<thi", ended=False), after_reasoning("<thi", ended=True)
    ('', '<thi')
    """
    start = text.lstrip()
    if start.startswith(THINK):
        return start.partition(THINK_END)[2].lstrip()
    return "" if start and THINK.startswith(start) and not ended else text


def settled_text(text: str, stop: Sequence[str], *, ended: bool) -> tuple[str, bool]:
    """The part of a growing text that later tokens cannot change, and whether a stop string ends it.

    An incomplete character is left out and, until `ended`, a possible beginning of a stop string is held back, so that a stream
    never has to retract text. An empty stop string is ignored.

    >>> settled_text("Paris</", ["</s>"], ended=False)
    ('Paris', False)
    >>> settled_text("Paris</s> and", ["</s>"], ended=False)
    ('Paris', True)
    """
    text = text.rstrip(INCOMPLETE)  # at the end, too: the character was cut
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
