"""Parses and validates request bodies in OpenAI's format; fields that the endpoint does not support are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ragtune_ray import RagtuneError, config
from ragtune_ray.generation.openai_client import MAX_STOPS

Turn = tuple[str, str]
"""(role, content)."""
Body = TypeVar("Body", bound=BaseModel)


class ApiError(RagtuneError):
    """An error that is sent to the client as an OpenAI error object.

    Args:
        status: the HTTP status.
        message: for people; contains no path, address or traceback.
        code: one word for programs.
        param: the field at fault.
        retry_after_seconds: value of the Retry-After header; None omits the header.
        details: fields of the body beside `error`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_seconds: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_seconds, self.details = retry_after_seconds, details or {}

    def body(self) -> dict[str, Any]:
        """The error object.

        >>> ApiError(429, "too many", code="overloaded").body()["error"]["type"]
        'rate_limit_error'
        """
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
            **self.details,
        }

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, or nothing."""
        if self.retry_after_seconds is None:
            return {}
        return {"Retry-After": str(max(1, round(self.retry_after_seconds)))}


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


def invalid(field: str, reason: str, *, status: int = 400, code: str = "invalid_value") -> ApiError:
    """The error for an invalid field of a request."""
    return ApiError(status, f"{field}: {reason}", code=code, param=field or None)


class RequestBody(BaseModel):
    """Base of all request bodies; unknown fields are refused."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class TextPart(RequestBody):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Message(RequestBody):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(RequestBody):
    """What a stream contains in addition to text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(RequestBody):
    """The format of the answer; only plain text is supported."""

    type: Literal["text"]


Filter = Annotated[dict[str, Any], Field(max_length=16)]


class ChatRequest(RequestBody):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    model: str = ""
    """The arm that answers; empty: the arm of the config."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: Literal[1] | None = None
    top_p: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    """Neither stored nor logged."""
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    top_k: int | None = Field(None, ge=1)
    """Extension: how many passages to retrieve."""
    filter: Filter | None = None
    """Extension: conditions on documents' metadata, in addition to those of the key."""
    retrieval: config.RetrievalUse | None = None
    """Extension: `auto` retrieves only if the generator is unsure without passages. None: serve.retrieval."""
    timeout_seconds: float | None = Field(None, gt=0)
    """Extension: time limit for the answer; at most serve.timeout_seconds."""


class RetrieveRequest(RequestBody):
    """The body of POST /v1/retrieve."""

    query: str = Field(min_length=1)
    top_k: int | None = Field(None, ge=1)
    filter: Filter | None = None
    timeout_seconds: float | None = Field(None, gt=0)


class EmbeddingsRequest(RequestBody):
    """The body of POST /v1/embeddings."""

    input: str | Annotated[list[str], Field(min_length=1)]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None
    input_type: Literal["query", "passage"] = "query"
    """Extension: selects the encoder's prompt prefix (and model) for queries or passages."""

    def texts(self) -> list[str]:
        """The texts to embed."""
        return [self.input] if isinstance(self.input, str) else self.input


def parse(kind: type[Body], raw: bytes) -> Body:
    """Parse a request body. If it is invalid, raise ApiError 400, which names the first invalid field but not its value."""
    try:
        value = json.loads(raw, parse_constant=_refuse_constant, object_pairs_hook=_object_with_unique_fields)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON in UTF-8", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_json_type(value)}", code="invalid_body")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:200]
        unknown = first["type"] == "extra_forbidden"
        reason = "this endpoint does not support this field; leave it out" if unknown else str(first["msg"])
        code = "unknown_parameter" if unknown else "invalid_value"
        raise invalid(field, reason, code=code) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _object_with_unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a field twice")
    if any(map(_has_surrogate, found)):
        raise ValueError("the name of a field contains a lone surrogate")
    return found


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _json_type(value: Any) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


class Conversation(BaseModel):
    """A chat request, split into question, history and instruction."""

    model_config = ConfigDict(frozen=True)

    question: str
    """The last message, which is the user's."""
    history: tuple[Turn, ...]
    """The earlier messages, oldest first."""
    instruction: str
    """The client's system messages, joined."""
    search: str
    """The text to retrieve for: the last two questions, since "and its moons?" alone finds nothing."""


def conversation(request: ChatRequest, limits: config.Serve) -> Conversation:
    """Split the messages of a request; ApiError 400 if there are too many, the last is not a question, or a text is invalid."""
    if len(request.messages) > limits.max_messages:
        count = f"{len(request.messages)} messages; the limit is {limits.max_messages}"
        raise invalid("messages", count, code="too_many_messages")
    system, turns = [], []
    for message in request.messages:
        text = checked_text(message.text(), "messages", limits.max_question_characters)
        if message.role in ("system", "developer"):
            system.append(text)
        else:
            turns.append((message.role, text))
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        raise invalid("messages", "the last one must be a non-empty user message")
    questions = [text for role, text in turns if role == "user"]
    return Conversation(
        question=turns[-1][1],
        history=tuple(turns[:-1]),
        instruction="\n".join(system),
        search="\n".join(questions[-2:])[-limits.max_question_characters :],
    )


def checked_text(text: str, field: str, max_characters: int) -> str:
    """Return a text of a request; ApiError 400 if it is too long or contains NUL or a lone surrogate."""
    if len(text) > max_characters:
        raise invalid(field, f"{len(text):,} characters; the limit is {max_characters:,}", code="text_too_long")
    if "\0" in text or _has_surrogate(text):
        raise invalid(field, "contains NUL or a lone surrogate", code="invalid_text")
    return text


def stops_of(request: ChatRequest) -> tuple[str, ...]:
    """The stop sequences of a request; ApiError 400 if there are too many, or one is empty or too long."""
    stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= 256 for stop in stops):
        raise invalid("stop", f"at most {MAX_STOPS} strings of 1 to 256 characters")
    return stops


def max_new_tokens_of(request: ChatRequest, settings: config.Config) -> int:
    """The maximum answer length in tokens; ApiError 400 if a request asks for more than serve.max_new_tokens."""
    requested = request.max_completion_tokens or request.max_tokens
    if requested is None:
        return min(settings.generator.max_new_tokens, settings.serve.max_new_tokens)
    return limited(requested, settings.serve.max_new_tokens, "max_tokens")


def top_k_of(requested: int | None, settings: config.Config) -> int:
    """How many passages to retrieve; ApiError 400 if a request asks for more than serve.max_top_k."""
    if requested is None:
        return min(settings.retrieval.top_k, settings.serve.max_top_k)
    return limited(requested, settings.serve.max_top_k, "top_k")


def timeout_of(requested: float | None, settings: config.Config) -> float:
    """Seconds that a request may take."""
    return min(requested or settings.serve.timeout_seconds, settings.serve.timeout_seconds)


def limited(requested: int, limit: int, field: str) -> int:
    """Return a number of a request; ApiError 400 if it exceeds the limit."""
    if requested > limit:
        raise invalid(field, f"{requested}; the limit is {limit}", code="over_limit")
    return requested
