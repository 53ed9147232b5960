"""What the endpoint is asked, in OpenAI's wire format, and the errors that it gives back.

In: JSON bodies. Out: checked requests. A field that the engine cannot honour is refused rather than ignored. This module knows
nothing of HTTP servers, models or Ray; what goes back is in `responses`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ragtune_ray import RagtuneError, config

__all__ = [
    "ApiError",
    "Body",
    "ChatRequest",
    "Conversation",
    "DeletedDocuments",
    "DocumentsRequest",
    "EmbeddingsRequest",
    "RetrieveRequest",
    "Turn",
    "checked_text",
    "conversation",
    "error_body",
    "limited",
    "max_new_tokens_of",
    "parse",
    "stops_of",
]

MAX_STOPS = 4

Turn = tuple[str, str]
"""(role, content)."""
Body = TypeVar("Body", bound=BaseModel)


class ApiError(RagtuneError):
    """A request that is answered with an error object.

    Args:
        status: of HTTP.
        message: for the client; never a path, an address or a trace.
        code: one word that a program can test.
        param: the field at fault.
        retry_after_seconds: for the header Retry-After; None: none.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_seconds = retry_after_seconds

    def body(self) -> dict[str, Any]:
        """The error object."""
        return error_body(self.status, self.message, self.code, self.param)

    def headers(self) -> dict[str, str]:
        """Those that belong to it: Retry-After, in whole seconds."""
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


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """An OpenAI error object.

    >>> error_body(429, "too many", "overloaded")["error"]["type"]
    'rate_limit_error'
    """
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Request(BaseModel):
    """A body; fields that this endpoint does not know are refused."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class TextPart(_Request):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    def text(self) -> str:
        """Its content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Request):
    """What a stream holds besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(_Request):
    """Only plain text is made."""

    type: Literal["text"]


Filter = Annotated[dict[str, Any], Field(max_length=16)]


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    model: str = ""
    """An arm that is served; empty: that of the config."""
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
    """Extension: passages to retrieve."""
    filter: Filter | None = None
    """Extension: conditions on documents' metadata; they narrow what the key may see and never widen it."""
    retrieval: config.RetrievalUse | None = None
    """Extension: `auto` retrieves only where the generator is not sure enough without; None: as the config says."""
    timeout_seconds: float | None = Field(None, gt=0)
    """Extension: longest time for the answer."""


class RetrieveRequest(_Request):
    """The body of POST /v1/retrieve."""

    query: str = Field(min_length=1)
    top_k: int | None = Field(None, ge=1)
    filter: Filter | None = None
    timeout_seconds: float | None = Field(None, gt=0)


class EmbeddingsRequest(_Request):
    """The body of POST /v1/embeddings."""

    input: str | Annotated[list[str], Field(min_length=1)]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None
    input_type: Literal["query", "passage"] = "query"
    """Extension: which of the encoder's prefixes (and models) is used."""

    def texts(self) -> list[str]:
        """What to embed."""
        return [self.input] if isinstance(self.input, str) else self.input


class DocumentBody(_Request):
    """A document to add or replace."""

    document_id: str = Field(min_length=1, max_length=512)
    text: str = Field(min_length=1)
    title: str = ""
    metadata: dict[str, Any] = {}


class DocumentsRequest(_Request):
    """The body of POST /v1/documents: what to add or replace."""

    documents: list[DocumentBody] = Field(min_length=1)


class DeletedDocuments(_Request):
    """The body of POST /v1/documents/delete."""

    document_ids: list[Annotated[str, Field(min_length=1, max_length=512)]] = Field(min_length=1, max_length=10_000)


def parse(kind: type[Body], raw: bytes) -> Body:
    """A checked request.

    Raises:
        ApiError: 400, naming the first field that is wrong; what was sent is not repeated.
    """
    try:
        value = json.loads(raw, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON in UTF-8", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, it is {_kind(value)}", code="invalid_body")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        unknown = first["type"] == "extra_forbidden"
        reason = "is not a field of this endpoint, or not one that it can honour" if unknown else str(first["msg"])
        raise ApiError(
            400,
            f"{place[:200]}: {reason}",
            code="unknown_parameter" if unknown else "invalid_value",
            param=place[:200] or None,
        ) from None


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a field twice")
    if any("\ud800" <= character <= "\udfff" for key in found for character in key):
        raise ValueError("a field's name holds half a character")
    return found


def _kind(value: Any) -> str:
    return {list: "an array", str: "a text", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


class Conversation(BaseModel):
    """A chat request as answering takes it."""

    model_config = ConfigDict(frozen=True)

    question: str
    """The last message, the user's."""
    history: tuple[Turn, ...]
    """What was said before, oldest first."""
    instruction: str
    """The client's own system messages, joined."""
    search: str
    """What to retrieve for: the question, after the one before it where there is one, since "and its moons?" finds nothing."""


def conversation(request: ChatRequest, limits: config.Serve) -> Conversation:
    """Take the messages of a request apart.

    Raises:
        ApiError: 400: too many messages, the last is not the user's, or a text is too long, empty or not Unicode.
    """
    if len(request.messages) > limits.max_messages:
        raise ApiError(
            400,
            f"{len(request.messages)} messages, this endpoint takes {limits.max_messages}",
            code="too_many_messages",
            param="messages",
        )
    system, turns = [], []
    for message in request.messages:
        text = checked_text(message.text(), "messages", limits.max_question_characters)
        if message.role in ("system", "developer"):
            system.append(text)
        else:
            turns.append((message.role, text))
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        raise ApiError(
            400, "the last message must be the user's, and not empty", code="invalid_value", param="messages"
        )
    question = turns[-1][1]
    asked = [text for role, text in turns if role == "user"]
    return Conversation(
        question=question,
        history=tuple(turns[:-1]),
        instruction="\n".join(system),
        search="\n".join(asked[-2:])[-limits.max_question_characters :],
    )


def checked_text(text: str, field: str, max_characters: int) -> str:
    """A text of a request, if it is acceptable.

    Raises:
        ApiError: 400: too long, or it holds half a character (a lone surrogate) or a NUL.
    """
    if len(text) > max_characters:
        raise ApiError(
            400,
            f"{field}: a text of {len(text):,} characters, this endpoint takes {max_characters:,}",
            code="text_too_long",
            param=field,
        )
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ApiError(400, f"{field}: holds a NUL or half a character", code="invalid_text", param=field)
    return text


def stops_of(request: ChatRequest) -> tuple[str, ...]:
    """The texts at which the client wants the answer to end.

    Raises:
        ApiError: 400: more than the API takes, or an empty or long one.
    """
    stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= 256 for stop in stops):
        raise ApiError(
            400, f"stop: at most {MAX_STOPS} texts of 1 to 256 characters", code="invalid_value", param="stop"
        )
    return stops


def max_new_tokens_of(request: ChatRequest, settings: config.Config) -> int:
    """How long the answer may be.

    Raises:
        ApiError: 400: longer than this endpoint allows.
    """
    wanted = request.max_completion_tokens or request.max_tokens
    if wanted is None:
        return min(settings.generator.max_new_tokens, settings.serve.max_new_tokens)
    return limited(wanted, settings.serve.max_new_tokens, "max_tokens")


def limited(wanted: int, most: int, field: str) -> int:
    """A number of a request, if it is not over its limit.

    Raises:
        ApiError: 400.
    """
    if wanted > most:
        raise ApiError(400, f"{field}: {wanted}, this endpoint allows {most}", code="over_limit", param=field)
    return wanted
