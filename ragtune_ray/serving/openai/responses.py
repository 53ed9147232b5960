"""POST /v1/responses: the request, and the answer as a response or as a stream of its events. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from ragtune_ray import config
from ragtune_ray.ingest.parsing.text import clean
from ragtune_ray.serving.answers import Answerer, Question
from ragtune_ray.serving.api_keys import Key
from ragtune_ray.serving.conversations import Turn, conversation_of
from ragtune_ray.serving.formats import Served, event
from ragtune_ray.serving.openai import fields
from ragtune_ray.serving.openai.messages import MAX_ELEMENTS, MessageItem
from ragtune_ray.serving.requests import ApiError


def _messages_alone(items: Any) -> Any:
    """The items that are messages; an item that is neither a message nor a thought is refused. A text is the user's message."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        return items
    types = [item["type"] for item in items if isinstance(item, dict) and "type" in item]
    # A type that is no text, maybe not even hashable, is refused as the field of a message.
    kinds = {kind for kind in types if isinstance(kind, str)}
    refused = sorted(clean(kind[:40]) for kind in kinds - {"message", "reasoning"})
    if refused:
        reason = "only messages are supported; leave out the items of type {kinds}"
        raise PydanticCustomError("items", reason, {"kinds": ", ".join(refused[:9])})
    return [item for item in items if not (isinstance(item, dict) and item.get("type") == "reasoning")]


class ResponseRequest(fields.AnswerRequest):
    """The body of POST /v1/responses."""

    input: Annotated[
        list[MessageItem],
        Field(min_length=1, max_length=MAX_ELEMENTS, fail_fast=True),
        BeforeValidator(_messages_alone, json_schema_input_type=str | list[MessageItem]),
    ]
    """The question, or the messages of a conversation."""
    instructions: str | None = None
    """Added to the system prompt."""
    max_output_tokens: int | None = Field(None, ge=1)
    """Longest answer; more than serve.max_new_tokens is that many."""
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    """Repeated in the response, and neither stored nor logged."""


def response_question(request: ResponseRequest, limits: config.Serve) -> Question:
    """The question of a request; ApiError 400 if it is invalid or over a limit."""
    instructions: list[Turn] = [("system", request.instructions)] if request.instructions else []
    turns: list[Turn] = [(item.role, item.text()) for item in request.input]
    conversation = conversation_of([*instructions, *turns], limits, "input")
    return Question(conversation, max_new_tokens=request.max_output_tokens, **request.common())


async def answer_response(answerer: Answerer, body: bytes, key: Key) -> Response:
    """POST /v1/responses."""
    request = _resolved(fields.parse(ResponseRequest, body, fields.RESPONSES), answerer.settings)
    question = response_question(request, answerer.settings.serve)
    return await answerer.respond([question], key, ResponseFormat(request), stream=request.stream)


def _resolved(request: ResponseRequest, settings: config.Config) -> ResponseRequest:
    """The request with the values that count, since the response repeats them."""
    limit = settings.serve.max_new_tokens
    longest = request.max_output_tokens and min(request.max_output_tokens, limit)
    temperature = settings.generator.temperature if request.temperature is None else request.temperature
    return request.model_copy(update={"max_output_tokens": longest, "temperature": temperature})


@dataclass(slots=True)
class ResponseFormat:
    """Writes an answer as a `response`, or as a stream of events, which the first to last are numbered from 0.

    The response that `response.created` carries has the sources, and that of the last event everything else.
    """

    request: ResponseRequest
    response_id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    item_id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    arm: str = ""
    begun: Mapping[str, Any] = field(default_factory=dict)
    """The extensions known at the beginning of a stream."""
    num_events: int = 0

    def whole(self, answers: Sequence[Served]) -> dict[str, Any]:
        """The response; `answers` has one answer."""
        (answer,) = answers
        self.arm = answer.arm
        return self._finished(answer)

    def begin(self, arm: str, extensions: Mapping[str, Any]) -> Iterator[bytes]:
        """The events up to the first text."""
        self.arm, self.begun = arm, extensions
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._text_event("response.content_part.added", part=_part("", ()))

    def piece(self, text: str) -> Iterator[bytes]:
        """A piece of text."""
        yield self._text_event("response.output_text.delta", delta=text, logprobs=[])

    def end(self, answer: Served) -> Iterator[bytes]:
        """The citations, then the end of the text, the item and the response."""
        part, response = _part(answer.text, answer.annotations), self._finished(answer)
        for index, annotation in enumerate(part["annotations"]):
            name = "response.output_text.annotation.added"
            yield self._text_event(name, annotation_index=index, annotation=annotation)
        yield self._text_event("response.output_text.done", text=answer.text, logprobs=[])
        yield self._text_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """The response with its error."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failure = {"code": code, "message": error.message, "type": error.code, "param": error.param}
        yield self._event("response.failed", response=self._response("failed") | {"error": failure})

    def _finished(self, answer: Served) -> dict[str, Any]:
        status = "completed" if answer.finish == "stop" else "incomplete"
        reason = None if answer.finish == "stop" else {"reason": "max_output_tokens"}
        return {
            **self._response(status),
            "incomplete_details": reason,
            "completed_at": int(time.time()) if answer.finish == "stop" else None,
            "output": [self._item(status, [_part(answer.text, answer.annotations)])],
            "usage": {
                "input_tokens": answer.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": answer.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            },
            **answer.extensions,
        }

    def _response(self, status: str) -> dict[str, Any]:
        asked = self.request
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.arm,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": "auto",
            "usage": None,
            **self.begun,
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _text_event(self, name: str, **values: Any) -> bytes:
        return self._event(name, item_id=self.item_id, output_index=0, content_index=0, **values)

    def _event(self, name: str, **values: Any) -> bytes:
        number, self.num_events = self.num_events, self.num_events + 1
        return event({"type": name, "sequence_number": number, **values}, name)


def _part(text: str, annotations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    flat = [{"type": "url_citation", **annotation["url_citation"]} for annotation in annotations]
    return {"type": "output_text", "text": text, "annotations": flat, "logprobs": []}
