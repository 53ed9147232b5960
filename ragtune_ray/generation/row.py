"""One prompt while it is decoded: its tokens and options, and what was generated so far."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ragtune_ray.generation.interface import Completion, Finish, after_reasoning, settled_text


@dataclass(slots=True)
class Row:
    """One row of a decoding batch."""

    index: int
    """Place of its prompt among the prompts of one call."""
    ids: list[int]
    """Token ids of the rendered prompt."""
    room: int
    """Most tokens it may generate: `max_new_tokens`, or fewer if the model's context ends earlier."""
    seed: int = 0
    """Its own seed, so that a sampled answer does not depend on other rows."""
    temperature: float = 0.0
    """0 is greedy."""
    stop: Sequence[str] = ()
    """Texts at which the answer ends."""
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_shared: int = 0
    """Tokens at the beginning of `ids` that are computed by themselves; see `shared_prefixes.PrefixCache`."""
    generated: list[int] = field(default_factory=list)
    finish: Finish | None = None
    """None while it is being decoded."""
    text: str = ""
    """Text that later tokens cannot change; see `interface.settled_text`."""
    source: torch.Generator | None = None
    """The state of its random numbers; None before the first draw."""
    log_probability: float = 0.0
    """Sum of ln p over the chosen tokens, at temperature 1."""
    num_chosen: int = 0
    """Number of tokens chosen so far, including the token that ends the answer."""

    @property
    def confidence(self) -> float:
        """The geometric mean of the probabilities of its tokens, 0 to 1."""
        return math.exp(self.log_probability / max(1, self.num_chosen))

    def fresh(self) -> Row:
        """The same prompt and options, before the first token."""
        return replace(self, generated=[], finish=None, text="", source=None, log_probability=0.0, num_chosen=0)

    def append(
        self, token: int, end_tokens: frozenset[int], decode: Callable[[Sequence[int]], str], *, watch: bool
    ) -> None:
        """Add the next token and check whether the answer ends with it.

        With `watch`, `text` is updated with every token, as stop strings and streams require, instead of only at the end.
        """
        if token in end_tokens:
            self.finish = "stop"
        else:
            self.generated.append(token)
            if len(self.generated) >= self.room:
                self.finish = "length"
        ended = self.finish is not None
        if watch or ended:
            text = after_reasoning(decode(self.generated), ended=ended)
            self.text, stopped = settled_text(text, self.stop, ended=ended)
            if stopped:
                self.finish = "stop"

    def completion(self, seconds: float) -> Completion:
        """The finished row as a completion that took `seconds`."""
        counts, finish = (len(self.ids), len(self.generated)), self.finish or "length"
        return Completion(self.text, *counts, seconds, finish, "", self.confidence, self.log_probability)


def failed_completion(prompt_tokens: int, error: str) -> Completion:
    """The completion of a prompt that failed."""
    return Completion("", prompt_tokens, 0, 0.0, "stop", error)


def row_seed(seed: int, ids: Sequence[int]) -> int:
    """A seed that depends only on the run's seed and the prompt, so that a prompt's samples do not depend on its batch."""
    return zlib.crc32(repr((seed, list(ids))).encode())  # 32 bits: on a CPU torch ignores higher ones


def to_rows(
    prompts: Sequence[list[int]],
    context_tokens: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    top_p: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> tuple[list[Row], dict[int, Completion]]:
    """Make rows of prompts.

    `prompts` are the token ids of each rendered prompt, `context_tokens` the most tokens that the model reads, prompt and answer
    together; the others are the `DecodingOptions`. Returns the rows of the prompts that can be answered, and index -> failed
    completion for the others.
    """
    rows: list[Row] = []
    failed: dict[int, Completion] = {}
    for index, ids in enumerate(prompts):
        if not ids:
            failed[index] = failed_completion(0, "the prompt is empty")
        elif len(ids) >= context_tokens:
            limit = f"the model's context {context_tokens}; lower prompt.max_tokens"
            failed[index] = failed_completion(len(ids), f"the prompt has {len(ids)} tokens, {limit}")
        else:
            room = min(max_new_tokens, context_tokens - len(ids))
            options = (temperature, stop, top_p, presence_penalty, frequency_penalty)
            rows.append(Row(index, ids, room, row_seed(seed, ids), *options))
    return rows, failed
