"""What the endpoint answers: OpenAI's wire format, with passages added.

In: answers, passages and vectors. Out: the objects, chunks and events that go back. This module knows nothing of HTTP servers,
models or Ray; what comes in is in `api`.

Beyond OpenAI's format a chat completion carries `sources` (the passages that stood in the prompt), `citations` (places in
documents that the answer rests on), `index_version`, `arm` and `timings`; a stream sends the sources in its first chunk.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from ragtune_ray import schema

__all__ = [
    "DONE",
    "chunk",
    "citations_body",
    "completion_body",
    "embeddings_body",
    "event",
    "new_id",
    "source",
    "url_citations",
    "usage_body",
]

DONE = b"data: [DONE]\n\n"
"""The end of a stream."""


def source(number: int, passage: schema.Passage, score: float) -> dict[str, Any]:
    """A passage as clients see it.

    Args:
        number: its place in the prompt (or among the hits), from 1.
        passage: as shown.
        score: of its retrieval.
    """
    return {
        "number": number,
        "id": passage.passage_id,
        "document_id": passage.document_id,
        "title": passage.title,
        "url": _url(passage),
        "start": passage.start,
        "end": passage.end,
        "text": passage.text,
        "score": score,
    }


def _url(passage: schema.Passage) -> str | None:
    """The document's own address, if its metadata names one that a browser may open."""
    try:
        named = json.loads(passage.metadata).get("url")
        parts = urlsplit(named) if isinstance(named, str) else None
    except (ValueError, AttributeError, RecursionError):
        return None
    return named if parts is not None and parts.scheme in ("http", "https") and parts.hostname else None


def url_citations(answer: str, citations: Sequence[schema.Citation], sources: Sequence[Mapping[str, Any]]) -> list[Any]:
    """OpenAI's `annotations`: which sources the answer as a whole rests on.

    A document without an address of its own is named by a URN.
    """
    by_id = {found["id"]: found for found in sources}
    marks = []
    for passage_id in dict.fromkeys(citation.passage_id for citation in citations):
        found = by_id.get(passage_id)
        if found is not None:
            url = found["url"] or f"urn:ragtune:{quote(found['document_id'], safe='')}"
            place = {"start_index": 0, "end_index": len(answer), "url": url, "title": found["title"]}
            marks.append({"type": "url_citation", "url_citation": place})
    return marks


def new_id() -> str:
    """An id for a completion."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def completion_body(
    request_id: str, arm: str, answer: schema.Answer, text: str, facts: Mapping[str, Any], finish: str
) -> dict[str, Any]:
    """A whole answer as a `chat.completion`.

    Args:
        request_id: of `new_id`.
        arm: goes out as the model.
        answer: the row.
        text: the answer as the client may see it.
        facts: the extensions: `sources`, `index_version`, `timings` and whatever else.
        finish: `stop` or `length`.
    """
    message = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": url_citations(text, answer.citations, facts["sources"]),
    }
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": arm,
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": usage_body(answer),
        "citations": citations_body(answer),
        **facts,
    }


def usage_body(answer: schema.Answer) -> dict[str, int]:
    """What an answer cost."""
    total = answer.prompt_tokens + answer.completion_tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": total,
    }


def citations_body(answer: schema.Answer) -> list[dict[str, Any]]:
    """Where in its documents an answer rests."""
    return [
        {"id": cited.passage_id, "document_id": cited.document_id, "start": cited.start, "end": cited.end}
        for cited in answer.citations
    ]


def chunk(
    request_id: str,
    arm: str,
    delta: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    finish: str | None = None,
) -> dict[str, Any]:
    """One `chat.completion.chunk`; the facts are the extensions, as in `completion_body`."""
    return {
        "id": request_id,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": arm,
        "choices": [{"index": 0, "delta": dict(delta), "finish_reason": finish, "logprobs": None}],
        **(facts or {}),
    }


def event(value: Mapping[str, Any]) -> bytes:
    r"""One server-sent event.

    >>> event({"a": "1\n2"})
    b'data: {"a":"1\\n2"}\n\n'
    """
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def embeddings_body(vectors: np.ndarray, model: str, encoding: str, num_tokens: int) -> dict[str, Any]:
    """Vectors (num_texts, dimension) as OpenAI's list; `base64` is little-endian float32."""
    rows: list[Any] = (
        [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
        if encoding == "base64"
        else vectors.astype(np.float32).tolist()
    )
    return {
        "object": "list",
        "model": model,
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
