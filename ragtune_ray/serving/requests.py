"""Parses and validates request bodies; unknown fields are refused by name. `openai/` has those in OpenAI's formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ragtune_ray import RagtuneError, config

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


Filter = Annotated[dict[str, Any], Field(max_length=16)]


class RetrieveRequest(RequestBody):
    """The body of POST /v1/retrieve."""

    query: str = Field(min_length=1)
    top_k: int | None = Field(None, ge=1)
    filter: Filter | None = None
    timeout_seconds: float | None = Field(None, gt=0)


def parse(kind: type[Body], raw: bytes) -> Body:
    """Parse a request body. If it is invalid, raise ApiError 400, which names the first invalid field but not its value."""
    return validated(kind, json_object(raw))


def json_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a request body; ApiError 400 if it is anything else."""
    try:
        value = json.loads(raw, parse_constant=_refuse_constant, object_pairs_hook=_object_with_unique_fields)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON in UTF-8", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_json_type(value)}", code="invalid_body")
    return value


def validated(kind: type[Body], value: dict[str, Any]) -> Body:
    """A JSON object as a request; ApiError 400 names the first invalid field but not its value."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:200]
        unknown = first["type"] == "extra_forbidden"
        reason = "this endpoint does not know this field; leave it out" if unknown else str(first["msg"])
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
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _json_type(value: Any) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def checked_text(text: str, field: str, max_characters: int) -> str:
    """Return a text of a request; ApiError 400 if it is too long or contains NUL or a lone surrogate."""
    if len(text) > max_characters:
        raise invalid(field, f"{len(text):,} characters; the limit is {max_characters:,}", code="text_too_long")
    if "\0" in text or _has_surrogate(text):
        raise invalid(field, "contains NUL or a lone surrogate", code="invalid_text")
    return text


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
