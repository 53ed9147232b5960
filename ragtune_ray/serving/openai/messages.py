"""The messages of a conversation in OpenAI's formats, as text; parts that are no text are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ragtune_ray.serving.requests import RequestBody

MAX_ELEMENTS = 4096
"""Most messages or parts that are looked at before a request is refused; `serve.max_messages` is what counts below this."""
_TEXTS = ("text", "input_text", "output_text", "refusal")


class TextPart(BaseModel):
    """One part of a message's content. Its other fields, such as annotations of an earlier answer, are ignored."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    """The text of a part of the type `refusal`."""


def _text_parts(content: Any) -> Any:
    """A content as a list of parts; a text is one part, and null is none."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or part.get("type") not in _TEXTS:
            raise PydanticCustomError("not_text", "every part must be a text; leave out images, audio and files")
    return content


def _no_calls(given: Any) -> Any:
    if given not in (None, []):
        raise PydanticCustomError("tool_calls", "this endpoint calls no tools; leave out messages that do")
    return None


def _known_role(role: Any) -> Any:
    if role in ("tool", "function"):
        raise PydanticCustomError("tool_role", "this endpoint calls no tools; leave out messages of this role")
    return role


Content: TypeAlias = Annotated[
    list[TextPart],
    Field(max_length=MAX_ELEMENTS, fail_fast=True),
    BeforeValidator(_text_parts, json_schema_input_type=str | list[TextPart] | None),
]


def text_of(content: Sequence[TextPart]) -> str:
    """The content of a message as one string.

    >>> text_of([TextPart(type="text", text="What is "), TextPart(type="text", text="Mars?")])
    'What is Mars?'
    """
    return "".join(part.text or part.refusal or "" for part in content)


class Message(RequestBody):
    """One turn of a chat; those of the assistant may be sent back as they were received."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_known_role)]
    content: Content = Field(default_factory=list)
    name: str | None = None
    refusal: str | None = None
    annotations: Any = None
    """Ignored."""
    audio: None = None
    function_call: Annotated[None, BeforeValidator(_no_calls)] = None
    tool_calls: Annotated[None, BeforeValidator(_no_calls)] = None
    reasoning_content: Any = None
    """Ignored, as all thoughts of earlier turns."""
    provider_specific_fields: Any = None
    """Ignored; LiteLLM adds it to the messages that it returns."""

    def text(self) -> str:
        """What was said."""
        return text_of(self.content) or self.refusal or ""


class MessageItem(RequestBody):
    """One message in the `input` of a response; those of the assistant may be sent back as they were received."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(default_factory=list)
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def text(self) -> str:
        """What was said."""
        return text_of(self.content)
