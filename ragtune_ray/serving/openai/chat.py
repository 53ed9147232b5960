"""POST /v1/chat/completions: the request and its question."""

from __future__ import annotations

from pydantic import Field
from starlette.responses import Response

from ragtune_ray import config
from ragtune_ray.serving.answers import Answerer, Question
from ragtune_ray.serving.api_keys import Key
from ragtune_ray.serving.conversations import conversation_of
from ragtune_ray.serving.openai import fields
from ragtune_ray.serving.openai.completion_format import CompletionFormat
from ragtune_ray.serving.openai.messages import MAX_ELEMENTS, Message


class ChatRequest(fields.SamplingRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_ELEMENTS, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)


def chat_question(request: ChatRequest, limits: config.Serve) -> Question:
    """The question of a chat request; ApiError 400 if it is invalid or over a limit."""
    turns = [(message.role, message.text()) for message in request.messages]
    given = request.sampling(limits)
    given["max_new_tokens"] = request.max_completion_tokens or request.max_tokens
    return Question(conversation_of(turns, limits, "messages"), **given)


async def answer_chat(answerer: Answerer, body: bytes, key: Key) -> Response:
    """POST /v1/chat/completions."""
    request = fields.parse(ChatRequest, body, fields.CHAT)
    question = chat_question(request, answerer.settings.serve)
    return await answerer.respond(
        [question], key, CompletionFormat(request.include_usage, is_chat=True), stream=request.stream
    )
