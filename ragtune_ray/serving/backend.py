"""What the gateway of the endpoint asks of whatever retrieves and generates behind it, and what comes back.

In and out: plain values, which travel between processes. This module knows nothing of HTTP, models or Ray.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ragtune_ray import config, schema
from ragtune_ray.index import filters

__all__ = ["Backend", "Change", "Embedded", "Failed", "Finished", "Found", "Job", "Shown", "Status", "as_sent"]


@dataclass(frozen=True, slots=True)
class Found:
    """The passages of one query, all of one index version."""

    index_version: str
    passages: tuple[schema.Passage, ...]
    scores: tuple[float, ...]
    seconds: float


def as_sent(passage: schema.Passage) -> schema.Passage:
    """A passage as copies send it to each other: of its document's metadata, which may be megabytes, only the `url` is shown.

    >>> as_sent(schema.Passage("a#0", "a", "text", "A", '{"url": "https://a.org", "raw": "..."}', 0, 4)).metadata
    '{"url": "https://a.org"}'
    """
    try:
        url = json.loads(passage.metadata).get("url")
    except (ValueError, AttributeError, RecursionError):
        url = None
    return dataclasses.replace(passage, metadata=json.dumps({"url": url}) if isinstance(url, str) else "{}")


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vectors of some texts."""

    vectors: np.ndarray
    """(num_texts, dimension) float32."""
    model: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to be generated."""

    question: str
    arm: config.Arm
    passages: tuple[schema.Passage, ...]
    scores: tuple[float, ...]
    index_version: str
    history: tuple[tuple[str, str], ...]
    instruction: str
    max_new_tokens: int
    temperature: float
    stop: tuple[str, ...]
    seed: int
    closed_book: bool = False
    """Asked without passages, although the arm retrieves."""


@dataclass(frozen=True, slots=True)
class Shown:
    """First of all: the prompt is built. These passages stand in it, as shown."""

    passages: tuple[schema.Passage, ...]
    scores: tuple[float, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Last of all: the whole answer."""

    answer: schema.Answer
    raw: str
    """As generated, with its citation marks."""
    finish: str
    """`stop` or `length`."""
    first_token_seconds: float
    """From the arrival at the generator to its first piece."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Last of all, instead: why there is no answer."""

    status: int
    message: str
    """For the client."""
    code: str
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """Documents to add or replace, or ids to take out."""

    upserted: tuple[Mapping[str, Any], ...] = ()
    deleted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """How things stand behind the gateway."""

    retrievers: Sequence[Mapping[str, Any]] = ()
    """Per copy: `index_version`, and `refused`: the version that it would not take, or None."""
    generators: Sequence[Mapping[str, Any]] = ()
    """Per copy: `model`, `refused`, `running`, `waiting`."""
    problems: Sequence[str] = ()
    """Why requests cannot be served now; empty when they can."""


class Backend(Protocol):
    """Retrieves and generates. `seconds` is always the time that is left; `ApiError` says why something cannot be done."""

    async def retrieve(self, text: str, top_k: int, chosen: filters.Filter, seconds: float) -> Found:
        """The hits of one query, among what the filter lets through."""

    async def embed(self, texts: Sequence[str], input_type: str, seconds: float) -> Embedded:
        """Vectors of texts."""

    def stream(self, job: Job, seconds: float) -> AsyncGenerator[Shown | str | Finished | Failed, None]:
        """`Shown`, pieces, then `Finished`; or `Failed` at any point. Closing it stops the work."""

    async def complete(self, job: Job, seconds: float) -> tuple[Shown, Finished] | Failed:
        """The same without pieces; may be done again where a copy died."""

    async def change_documents(self, change: Change, seconds: float) -> Mapping[str, Any]:
        """Publish a version; when it returns, whoever could be told retrieves from it."""

    async def status(self) -> Status:
        """How things stand."""

    async def counted_elsewhere(self) -> Sequence[bytes]:
        """What the other processes that take requests have counted."""
