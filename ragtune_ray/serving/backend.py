"""The interface between the HTTP handlers and the backend that retrieves and generates; its types are sent between processes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from ragtune_ray import config, schema
from ragtune_ray.generation.interface import Finish
from ragtune_ray.index import filters, snapshot
from ragtune_ray.serving.requests import ApiError
from ragtune_ray.serving.sources import shown_metadata


@dataclass(frozen=True, slots=True)
class Found:
    """The passages retrieved for one query, all from one index version."""

    index_version: str
    passages: tuple[schema.Passage, ...]
    scores: tuple[float, ...]
    seconds: float


def without_metadata(passage: schema.Passage) -> schema.Passage:
    """A passage whose metadata keeps only what sources show: sending the rest between replicas could cost megabytes.

    >>> without_metadata(schema.Passage("a#0", "a", "text", "A", '{"url": "https://a.org", "raw": "..."}', 0, 4)).metadata
    '{"url": "https://a.org"}'
    """
    return dataclasses.replace(passage, metadata=json.dumps(shown_metadata(passage)))


@dataclass(frozen=True, slots=True)
class Embedded:
    """The embeddings of some texts."""

    vectors: np.ndarray
    """(num_texts, dimension) float32."""
    model: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to generate."""

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
    """Answer without passages, although the arm retrieves."""
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def query(self) -> schema.Query:
        """The question with the conversation before it, as in bulk answering."""
        return schema.Query("ask", self.question, None, (), (), "all", conversation(self.instruction, self.history))


def conversation(instruction: str, turns: Sequence[tuple[str, str]]) -> tuple[schema.Message, ...]:
    """The messages before a question: an instruction, if it is not empty, and the turns of user and assistant."""
    said = [schema.Message("user" if role == "user" else "assistant", text) for role, text in turns]
    return (*([schema.Message("system", instruction)] if instruction else []), *said)


@dataclass(frozen=True, slots=True)
class Shown:
    """First event of an answer: the passages in the prompt, in its order."""

    passages: tuple[schema.Passage, ...]
    scores: tuple[float, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a complete answer."""

    answer: schema.Answer
    raw: str
    """As generated, with citation marks."""
    finish: Finish
    """Why it ended."""
    first_token_seconds: float
    """From arrival at the generator to the first text."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Last event of an answer that failed."""

    status: int
    message: str
    """For the client."""
    code: str
    retry_after_seconds: float | None = None

    def error(self) -> ApiError:
        """The failure as an exception."""
        return ApiError(self.status, self.message, code=self.code, retry_after_seconds=self.retry_after_seconds)


Event: TypeAlias = Shown | str | Finished | Failed
"""One event of a streamed answer; a `str` is a piece of its text."""

TOO_LATE = Failed(504, "the answer was not ready before the deadline", "deadline_exceeded")


@dataclass(frozen=True, slots=True)
class Change:
    """Documents to add or replace, or ids of documents to delete."""

    upserted: tuple[Mapping[str, Any], ...] = ()
    deleted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listed:
    """A page of documents, all from one index version."""

    index_version: str
    documents: tuple[snapshot.ListedDocument, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the replicas."""

    retrievers: Sequence[Mapping[str, Any]] = ()
    """Per replica: `index_version`, and `refused`: the version that failed to load, or None."""
    generators: Sequence[Mapping[str, Any]] = ()
    """Per replica: `model`, `refused`, `running`, `waiting`."""
    problems: Sequence[str] = ()
    """Why requests cannot be served now; empty if they can."""


class Backend(Protocol):
    """Retrieves and generates within `seconds`; methods raise `ApiError` on failure."""

    async def retrieve(
        self, text: str, top_k: int, visible: filters.Filter, seconds: float, parts: Sequence[str] = ()
    ) -> Found:
        """The hits of one query among the documents that the filter selects, fused with those of its sub-questions `parts`."""

    async def write_searches(self, job: Job, seconds: float) -> schema.Searches:
        """The texts with which to search for the question of a job, written by the generator."""

    async def embed(self, texts: Sequence[str], input_type: str, seconds: float) -> Embedded:
        """The embeddings of texts."""

    def stream(self, job: Job, seconds: float) -> AsyncGenerator[Event, None]:
        """`Shown`, pieces of text, then `Finished`; or `Failed` at any point. Closing the generator stops the work."""

    async def complete(self, job: Job, seconds: float) -> tuple[Shown, Finished] | Failed:
        """The first and last event of `stream`; retried if a replica dies."""

    async def change_documents(self, change: Change, seconds: float) -> Mapping[str, Any]:
        """Publish an index version; returns what changed when every reachable retriever has swapped to it."""

    async def list_documents(self, visible: filters.Filter, after: str, limit: int, seconds: float) -> Listed:
        """The documents that the filter selects, from the one after the id `after` on; see `snapshot.Index`."""

    async def status(self) -> Status:
        """The current state of the replicas."""

    async def metrics_of_other_processes(self) -> Sequence[bytes]:
        """The metrics that the other ingress processes have counted."""
