"""Reads what OpenAI-compatible servers reply: the text without reasoning, and which parameter of a request was refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ragtune_ray.generation.interface import (
    INCOMPLETE,
    THINK,
    THINK_END,
    Completion,
    Finish,
    GeneratorError,
    Prompt,
    after_reasoning,
)

_CLOSE_LINE = re.compile(rf"(?m)^[ \t]*{THINK_END}[ \t]*$")
_UNSUPPORTED = re.compile(
    r"unsupported|not support|deprecated|unknown|unrecogni|unexpected|extra|instead|cannot find", re.IGNORECASE
)
_FIXED = re.compile(r"only (the default|\S+ is (allowed|supported))", re.IGNORECASE)
"""A parameter with only one value may as well be left out."""
_REFUSED_VALUE = re.compile(
    r"\b(above|below|between|range|greater|less|more than|larger|smaller|higher|lower|at most|at least|exceeds?|must be|maximum|"
    r"minimum|too (large|small|high|low)|(unsupported|unexpected|unknown) value)\b",
    re.IGNORECASE,
)
_OPTIONAL = {"max_tokens": "max_completion_tokens", "temperature": "", "seed": "", "response_format": ""}
"""Parameters that some servers refuse, and what newer ones call them; "" if the request is sent without."""


def refused_parameter(message: str, parameter: str | None, request: Mapping[str, Any]) -> str:
    """The parameter of a request that a server does not support and that `adapted` can change; "" if there is none.

    A value out of range is no such parameter, since other values of it are accepted.

    >>> refused_parameter("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", None, {"max_tokens": 9})
    'max_tokens'
    >>> refused_parameter("temperature above 1 is not allowed", "temperature", {"temperature": 1.5})
    ''

    Args:
        message: the server's error.
        parameter: the field of the request that the error names, if it does.
        request: what was sent.
    """
    if "response_format" in request and re.search(r"\bresponse_format\b|\bjson_schema\b", f"{parameter} {message}"):
        return "response_format"  # whether the field, its type or the schema is refused, the prompt says the same
    sent = [name for name in _OPTIONAL if name in request and not _refuses_value(message, name)]
    if parameter:
        return parameter if parameter in sent else ""
    named = {name: found.start() for name in sent if (found := re.search(rf"\b{name}\b", message))}
    return min(named, key=named.__getitem__, default="")


def _refuses_value(message: str, name: str) -> bool:
    """Whether a message is about a value of a parameter and not about the parameter."""
    if _FIXED.search(message):
        return False
    has_value = re.search(rf"\b{name}\b['\"`]?( of|[ =:])*\d", message)
    return bool(has_value or _REFUSED_VALUE.search(message) or not _UNSUPPORTED.search(message))


def adapted(request: Mapping[str, Any], refused: Collection[str]) -> dict[str, Any]:
    """The request without the parameters that the server refused, or with their newer names.

    >>> adapted({"max_tokens": 9, "seed": 0, "model": "m"}, {"max_tokens", "seed"})
    {'model': 'm', 'max_completion_tokens': 9}
    """
    kept = {name: value for name, value in request.items() if name not in refused}
    return kept | {_OPTIONAL[name]: request[name] for name in request if name in refused and _OPTIONAL[name]}


def completion_of(reply: Any, prompt: Prompt, seconds: float) -> Completion:
    """The server's reply as a completion; with an `error` if it does not have the expected form, or no text."""
    choices = getattr(reply, "choices", None)
    message = getattr(choices[0], "message", None) if choices else None
    if choices is None or message is None:
        return Completion("", prompt.num_tokens, 0, seconds, "stop", "the server's reply has no choices[0].message")
    finish: Finish = "length" if choices[0].finish_reason == "length" else "stop"
    raw = content_of(message)
    text = without_reasoning(raw or "").rstrip(INCOMPLETE)
    usage = getattr(reply, "usage", None)
    return Completion(
        text=text,
        prompt_tokens=getattr(usage, "prompt_tokens", None) or prompt.num_tokens,
        completion_tokens=getattr(usage, "completion_tokens", None) or 0,
        seconds=seconds,
        finish=finish,
        error="" if text else missing_text(raw, finish, str(getattr(message, "refusal", None) or "")),
    )


def content_of(message: Any) -> str | None:
    """The text of a message or of a piece of one, from a string or a list of parts; None if it has none.

    Reasoning that a server sends apart, as `reasoning_content` or as a part of another type, is not text.
    """
    content = getattr(message, "content", None)
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(str(part.get("text") or "") for part in parts) if parts else None
    return content if isinstance(content, str) else None


def missing_text(raw: str | None, finish: Finish, refusal: str = "") -> str:
    """Why a reply without text is no answer; "" if an empty answer is what the model gave."""
    if refusal:
        return f"the model refused: {' '.join(refusal.split())[:300]}"
    if finish == "length":
        return (
            "the answer was cut before any of its text, while the model was reasoning; raise generator.max_new_tokens"
        )
    return "the server's reply has no text (content is null)" if raw is None else ""


def without_reasoning(text: str, *, ended: bool = True) -> str:
    """The text after a block of reasoning at its beginning; "" if the block does not end.

    >>> without_reasoning("<think>Is it [1]?</think> It is Paris [2].")
    'It is Paris [2].'

    Some chat templates write the opening mark into the prompt. A line that is a closing mark then ends the block; until `ended`,
    the last line of the text may still grow.
    """
    if text.lstrip().startswith(THINK):
        return after_reasoning(text, ended=ended)
    closing = _CLOSE_LINE.search(text if ended else text[: text.rfind("\n") + 1])
    return text[closing.end() :].lstrip() if closing else text


def more_text(raw: str, shown: str, *, ended: bool) -> str:
    """What can be shown of a growing text after what was shown: nothing while it may begin with a block of reasoning.

    >>> more_text("<thi", "", ended=False), more_text("<b>Paris", "<b>", ended=False)
    ('', 'Paris')

    Raises:
        GeneratorError: what was shown was reasoning.
    """
    if THINK.startswith(raw.lstrip()) and not ended:
        return ""
    text = without_reasoning(raw, ended=ended).rstrip(INCOMPLETE)
    if not text.startswith(shown):
        raise GeneratorError(
            "the server sends reasoning as text; start it with its parser of reasoning (vLLM: --reasoning-parser)"
        )
    return text.removeprefix(shown)
