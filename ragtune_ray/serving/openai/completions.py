"""POST /v1/completions: the older format, whose prompts are questions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from ragtune_ray import config
from ragtune_ray.serving.answers import Answerer, Question
from ragtune_ray.serving.api_keys import Key
from ragtune_ray.serving.conversations import conversation_of
from ragtune_ray.serving.openai import fields
from ragtune_ray.serving.openai.completion_format import CompletionFormat
from ragtune_ray.serving.requests import invalid


def _texts(prompt: Any) -> Any:
    if isinstance(prompt, list) and not all(isinstance(each, str) for each in prompt):
        raise PydanticCustomError("token_ids", "must be a text or a list of texts; token ids are not supported")
    return [prompt] if isinstance(prompt, str) else prompt


class CompletionRequest(fields.SamplingRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[str], Field(min_length=1), BeforeValidator(_texts, json_schema_input_type=str | list[str])]
    """The question, or several; several only without `stream`."""


def completion_questions(request: CompletionRequest, limits: config.Serve) -> list[Question]:
    """The questions of a request; ApiError 400 if one is invalid or over a limit."""
    given, num_prompts = request.sampling(limits), len(request.prompt)
    if num_prompts * request.n > limits.max_answers:
        reason = (
            f"{num_prompts} prompts with n={request.n}; the limit is {limits.max_answers} answers; send fewer at once"
        )
        raise invalid("prompt", reason, code="over_limit")
    if num_prompts > 1 and request.stream:
        raise invalid("prompt", "a stream answers one prompt; send a request for each", code="unsupported_parameter")
    return [Question(conversation_of([("user", prompt)], limits, "prompt"), **given) for prompt in request.prompt]


async def answer_completion(answerer: Answerer, body: bytes, key: Key) -> Response:
    """POST /v1/completions."""
    request = fields.parse(CompletionRequest, body, fields.COMPLETIONS)
    questions = completion_questions(request, answerer.settings.serve)
    return await answerer.respond(
        questions, key, CompletionFormat(request.include_usage, is_chat=False), stream=request.stream
    )
