"""Answers as completions of a chat or of a text, whole or as a stream of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragtune_ray.serving.formats import DONE, Served, event, usage_of
from ragtune_ray.serving.requests import ApiError


@dataclass(slots=True)
class CompletionFormat:
    """Writes answers as `chat.completion` or `text_completion`, or as their chunks; the first chunk has the sources."""

    include_usage: bool
    """Whether a stream ends with the numbers of tokens."""
    is_chat: bool
    completion_id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    arm: str = ""

    def __post_init__(self) -> None:
        self.completion_id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, answers: Sequence[Served]) -> dict[str, Any]:
        """One choice per answer. Sources and facts are those of the first; of several answers, each choice has its own, too."""
        self.arm = answers[0].arm
        choices = []
        for index, answer in enumerate(answers):
            own = answer.extensions if len(answers) > 1 else {}
            choices.append({**_choice(index, self._message(answer), answer.finish), **own})
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._envelope(kind, choices), "usage": usage_of(answers), **answers[0].extensions}

    def begin(self, arm: str, extensions: Mapping[str, Any]) -> Iterator[bytes]:
        """The chunk with the sources; that of a chat has the role, too."""
        self.arm = arm
        content = {"delta": {"role": "assistant", "content": ""}} if self.is_chat else {"text": ""}
        yield self._chunk(content, extensions=extensions)

    def piece(self, text: str) -> Iterator[bytes]:
        """A chunk with text."""
        yield self._chunk({"delta": {"content": text}} if self.is_chat else {"text": text})

    def end(self, answer: Served) -> Iterator[bytes]:
        """The chunk with the reason of the end, that with the numbers of tokens if wanted, and the mark of the end."""
        content = {"delta": {"annotations": answer.annotations}} if self.is_chat else {"text": ""}
        extensions = {name: value for name, value in answer.extensions.items() if name != "sources"}
        yield self._chunk(content, answer.finish, extensions)
        if self.include_usage:
            yield event({**self._envelope(self._chunk_kind, []), "usage": usage_of([answer])})
        yield DONE

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """An error object instead of a chunk."""
        yield event(error.body())

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _message(self, answer: Served) -> dict[str, Any]:
        if not self.is_chat:
            return {"text": answer.text}
        message = {"role": "assistant", "content": answer.text, "refusal": None, "annotations": answer.annotations}
        return {"message": message}

    def _chunk(
        self, content: Mapping[str, Any], finish: str | None = None, extensions: Mapping[str, Any] | None = None
    ) -> bytes:
        return event({**self._envelope(self._chunk_kind, [_choice(0, content, finish)]), **(extensions or {})})

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created,
            "model": self.arm,
            "choices": choices,
        }


def _choice(index: int, content: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": index, **content, "finish_reason": finish, "logprobs": None}
