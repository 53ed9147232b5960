"""POST /v1/completions: the older format, whose prompt is the question."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from ragtune_ray import config
from ragtune_ray.serving.answers import Answerer, Question
from ragtune_ray.serving.api_keys import Key
from ragtune_ray.serving.conversations import conversation_of
from ragtune_ray.serving.openai import fields
from ragtune_ray.serving.openai.completion_format import CompletionFormat


def _one_text(prompt: Any) -> Any:
    if isinstance(prompt, list):
        if any(not isinstance(each, str) for each in prompt):
            raise PydanticCustomError("token_ids", "token ids are not supported; send the prompt as text")
        if len(prompt) != 1:
            raise PydanticCustomError("prompts", "one prompt per request; send a request for each")
        return prompt[0]
    return prompt


class CompletionRequest(fields.SamplingRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[str, BeforeValidator(_one_text, json_schema_input_type=str | list[str])]
    """The question; a text, or a list of one."""


def completion_question(request: CompletionRequest, limits: config.Serve) -> Question:
    """The question of a request; ApiError 400 if it is invalid or over a limit."""
    given = request.sampling(limits)
    return Question(conversation_of([("user", request.prompt)], limits, "prompt"), **given)


async def answer_completion(answerer: Answerer, body: bytes, key: Key) -> Response:
    """POST /v1/completions."""
    request = fields.parse(CompletionRequest, body, fields.COMPLETIONS)
    question = completion_question(request, answerer.settings.serve)
    return await answerer.respond(
        question, key, CompletionFormat(request.include_usage, is_chat=False), stream=request.stream
    )
