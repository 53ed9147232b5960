"""Builds response bodies in OpenAI's format, with the sources of each answer.

Beyond OpenAI's fields, a chat completion contains `sources` (the passages in the prompt), `citations` (the spans of documents
that support the answer), `index_version`, `arm` and `timings`. The first chunk of a stream contains the sources.
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

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


def source(number: int, passage: schema.Passage, score: float) -> dict[str, Any]:
    """A passage as clients see it; `number` counts from 1, in the prompt or among the hits."""
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


def sources(passages: Sequence[schema.Passage], scores: Sequence[float]) -> list[dict[str, Any]]:
    """Passages as clients see them, numbered from 1."""
    return [source(n, passage, score) for n, (passage, score) in enumerate(zip(passages, scores, strict=True), start=1)]


def _url(passage: schema.Passage) -> str | None:
    """The document's `url` from its metadata, if it is an http or https URL."""
    try:
        url = json.loads(passage.metadata).get("url")
        parts = urlsplit(url) if isinstance(url, str) else None
    except (ValueError, AttributeError, RecursionError):
        return None
    return url if parts is not None and parts.scheme in ("http", "https") and parts.hostname else None


def url_citations(answer: str, citations: Sequence[schema.Citation], shown: Sequence[Mapping[str, Any]]) -> list[Any]:
    """OpenAI's `annotations`: each source that supports the answer, for the whole text. A source without a URL gets a URN."""
    by_id = {each["id"]: each for each in shown}
    annotations = []
    for passage_id in dict.fromkeys(citation.passage_id for citation in citations):
        cited = by_id.get(passage_id)
        if cited is not None:
            url = cited["url"] or f"urn:ragtune:{quote(cited['document_id'], safe='')}"
            span = {"start_index": 0, "end_index": len(answer), "url": url, "title": cited["title"]}
            annotations.append({"type": "url_citation", "url_citation": span})
    return annotations


def new_id() -> str:
    """A new id for a completion."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def completion_body(
    request_id: str, arm: str, answer: schema.Answer, text: str, extensions: Mapping[str, Any], finish: str
) -> dict[str, Any]:
    """A complete answer as a `chat.completion`.

    Args:
        request_id: from `new_id`.
        arm: sent as the model.
        answer: only its token counts and citations are used.
        text: the sanitized answer.
        extensions: fields beyond OpenAI's format, including `sources`.
        finish: `stop` or `length`.
    """
    message = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": url_citations(text, answer.citations, extensions["sources"]),
    }
    return {
        **_envelope(request_id, "chat.completion", arm, {"message": message}, finish),
        "usage": usage_body(answer),
        "citations": citations_body(answer),
        **extensions,
    }


def usage_body(answer: schema.Answer) -> dict[str, int]:
    """The tokens of an answer, as OpenAI's `usage`."""
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def citations_body(answer: schema.Answer) -> list[dict[str, Any]]:
    """The spans of documents that support an answer."""
    return [
        {"id": cited.passage_id, "document_id": cited.document_id, "start": cited.start, "end": cited.end}
        for cited in answer.citations
    ]


def chunk(
    request_id: str, arm: str, delta: Mapping[str, Any], extensions: Mapping[str, Any] | None, finish: str | None
) -> dict[str, Any]:
    """One `chat.completion.chunk`; the arguments are as in `completion_body`."""
    return {**_envelope(request_id, "chat.completion.chunk", arm, {"delta": dict(delta)}, finish), **(extensions or {})}


def _envelope(request_id: str, kind: str, arm: str, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {
        "id": request_id,
        "object": kind,
        "created": int(time.time()),
        "model": arm,
        "choices": [{"index": 0, **content, "finish_reason": finish, "logprobs": None}],
    }


def event(value: Mapping[str, Any]) -> bytes:
    r"""One server-sent event.

    >>> event({"a": "1\n2"})
    b'data: {"a":"1\\n2"}\n\n'
    """
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def embeddings_body(vectors: np.ndarray, model: str, encoding: str, num_tokens: int) -> dict[str, Any]:
    """Vectors (num_texts, dimension) in OpenAI's format; `base64` means little-endian float32."""
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
