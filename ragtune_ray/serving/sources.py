"""The sources and citations of answers, as clients see them in every format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from ragtune_ray import schema


def source(number: int, passage: schema.Passage, score: float) -> dict[str, Any]:
    """A passage as clients see it; `number` counts from 1, in the prompt or among the hits."""
    return {
        "number": number,
        "id": passage.passage_id,
        "document_id": passage.document_id,
        "title": passage.title,
        "url": _url(passage),
        "page": _page(passage),
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
    url = shown_metadata(passage).get("url")
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
    except ValueError:
        return None
    return url if parts is not None and parts.scheme in ("http", "https") and parts.hostname else None


def _page(passage: schema.Passage) -> int | None:
    """The page of a PDF or slide on which the passage begins."""
    page = shown_metadata(passage).get(schema.PAGE)
    return page if isinstance(page, int) else None


def shown_metadata(passage: schema.Passage) -> dict[str, Any]:
    """The part of a passage's metadata that sources show: URL and page."""
    try:
        values = json.loads(passage.metadata)
    except (ValueError, RecursionError):
        return {}
    found = {name: values.get(name) for name in ("url", schema.PAGE)} if isinstance(values, dict) else {}
    return {name: value for name, value in found.items() if isinstance(value, str | int)}


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


def citations_body(answer: schema.Answer) -> list[dict[str, Any]]:
    """The spans of documents that support an answer."""
    return [
        {"id": cited.passage_id, "document_id": cited.document_id, "start": cited.start, "end": cited.end}
        for cited in answer.citations
    ]
