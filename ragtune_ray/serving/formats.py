"""What a format of answers must provide, and the answer that it writes; `openai/` has the formats."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ragtune_ray.generation.interface import Finish
from ragtune_ray.serving.requests import ApiError

DONE = b"data: [DONE]\n\n"
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""The last event of a stream of completions."""


@dataclass(frozen=True, slots=True)
class Served:
    """A complete answer, sanitized."""

    arm: str
    text: str
    finish: Finish
    annotations: Sequence[Mapping[str, Any]]
    """One `url_citation` per cited source, as in chat completions."""
    prompt_tokens: int
    """0 for further answers to the same question, so that the tokens of a request are their sum."""
    completion_tokens: int
    extensions: Mapping[str, Any]
    """Fields beyond OpenAI's formats: `sources`, `citations`, `index_version`, `arm`, `timings`, ..."""


def usage_of(answers: Sequence[Served]) -> dict[str, int]:
    """The tokens of all answers of a request, as `usage` of a completion."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Format(Protocol):
    """Writes the answers to one request, whole or as a stream of server-sent events."""

    def whole(self, answers: Sequence[Served]) -> dict[str, Any]:
        """The body of the response."""

    def begin(self, arm: str, extensions: Mapping[str, Any]) -> Iterator[bytes]:
        """The first events; `extensions` are those known before the first text: `sources` and `index_version`."""

    def piece(self, text: str) -> Iterator[bytes]:
        """The events of a piece of text."""

    def end(self, answer: Served) -> Iterator[bytes]:
        """The last events; all text of the answer was sent in pieces."""

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """The last events of a stream that cannot be finished."""


def event(value: Mapping[str, Any], name: str = "") -> bytes:
    r"""One server-sent event.

    >>> event({"a": "1\n2"})
    b'data: {"a":"1\\n2"}\n\n'
    >>> event({"a": 1}, "response.created")
    b'event: response.created\ndata: {"a":1}\n\n'
    """
    line = f"event: {name}\n".encode() if name else b""
    # Some clients end lines where Python does, so the line ends beyond ASCII are escaped.
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return line + b"data: " + text.encode() + b"\n\n"
