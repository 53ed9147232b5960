"""The fields of OpenAI's requests that this endpoint does not use: ignored, or refused unless their value asks for nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from ragtune_ray import config
from ragtune_ray.generation.openai_client import MAX_STOPS
from ragtune_ray.serving.requests import Filter, RequestBody, invalid, json_object, validated

Body = TypeVar("Body", bound=RequestBody)


@dataclass(frozen=True, slots=True)
class Refused:
    """A field whose value is refused, unless it is null or neutral."""

    advice: str
    """What the client can do instead."""
    is_neutral: Callable[[Any], bool] = lambda _: False
    """Whether a value asks for nothing."""


@dataclass(frozen=True, slots=True)
class Unused:
    """The fields of one format that this endpoint does not use."""

    ignored: frozenset[str]
    """Hints, and facts for the provider's accounts: no answer depends on them."""
    refused: Mapping[str, Refused]


def _only(*values: Any) -> Callable[[Any], bool]:
    return lambda given: any(given == value and type(given) is type(value) for value in values)


_NO_TOOLS = "this endpoint calls no tools; leave it out, or set tool_choice to none"
_TEXT_ALONE = "answers are text; leave it out"
_NO_LOGPROBS = "this endpoint returns no probabilities of tokens; leave it out"
_TOOLS = {
    "tools": Refused(_NO_TOOLS, _only([])),
    "tool_choice": Refused(_NO_TOOLS, _only("none", "auto")),
}
_MODERATION = {"moderation": Refused("this endpoint does not moderate; leave it out")}
_HINTS = (
    "metadata parallel_tool_calls prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier service_tier "
    "store user"
)

CHAT = Unused(
    ignored=frozenset(f"{_HINTS} prediction reasoning_effort verbosity".split()),
    refused={
        **_TOOLS,
        **_MODERATION,
        "functions": Refused(_NO_TOOLS, _only([])),
        "function_call": Refused(_NO_TOOLS, _only("none", "auto")),
        "logit_bias": Refused("this endpoint cannot bias tokens; leave it out", _only({})),
        "logprobs": Refused(_NO_LOGPROBS, _only(False)),
        "top_logprobs": Refused(_NO_LOGPROBS, _only(0)),
        "response_format": Refused(
            "answers are text with citations, not JSON; leave it out, or build the JSON from the answer",
            _only({"type": "text"}),
        ),
        "modalities": Refused(_TEXT_ALONE, _only(["text"])),
        "audio": Refused(_TEXT_ALONE),
        "web_search_options": Refused("this endpoint searches its own documents alone; leave it out"),
    },
)

COMPLETIONS = Unused(
    ignored=frozenset({"user"}),
    refused={
        "best_of": Refused("this endpoint ranks no answers; leave it out", _only(1)),
        "echo": Refused("answers do not repeat the prompt; leave it out", _only(False)),
        "logit_bias": Refused("this endpoint cannot bias tokens; leave it out", _only({})),
        "logprobs": Refused(_NO_LOGPROBS),
        "suffix": Refused("this endpoint inserts no text; leave it out", _only("")),
    },
)


def _no_logprobs(include: Any) -> bool:
    """Whether a list of outputs to include names only outputs that no answer here has, such as calls of tools."""
    return isinstance(include, list) and not any("logprobs" in str(each) for each in include)


def _plain_text(text: Any) -> bool:
    return isinstance(text, dict) and text.get("format") in (None, {"type": "text"})


_STATELESS = "this endpoint keeps no conversations; leave it out and send the earlier turns in input"

RESPONSES = Unused(
    ignored=frozenset(f"{_HINTS} max_tool_calls reasoning stream_options truncation".split()) - {"metadata"},
    refused={
        **_TOOLS,
        **_MODERATION,
        "access_programs": Refused("this endpoint has none; leave it out", _only({})),
        "background": Refused("answers are not computed in the background; leave it out", _only(False)),
        "background_options": Refused("answers are not computed in the background; leave it out", _only({})),
        "context_management": Refused("the oldest turns are left out by themselves; leave it out", _only([])),
        "conversation": Refused(_STATELESS),
        "image": Refused(_TEXT_ALONE, _only({})),
        "include": Refused(_NO_LOGPROBS, _no_logprobs),
        "previous_response_id": Refused(_STATELESS),
        "prompt": Refused("this endpoint stores no prompts; send the text in input and instructions"),
        "text": Refused("answers are text with citations, not JSON; leave text.format out", _plain_text),
        "top_logprobs": Refused(_NO_LOGPROBS, _only(0)),
    },
)

EMBEDDINGS = Unused(ignored=frozenset({"user"}), refused={})


def parse(kind: type[Body], raw: bytes, unused: Unused) -> Body:
    """Parse a request body in one of OpenAI's formats.

    A field that OpenAI's API knows is as if absent if it is null, ignored or neutral.

    Raises:
        ApiError: 400; names a field that is unknown, invalid or refused, and what to do.
    """
    return validated(kind, _used(json_object(raw), kind, unused))


def _used(body: Mapping[str, Any], kind: type[Body], unused: Unused) -> dict[str, Any]:
    used = {}
    no_tools = {"tools": body.get("tool_choice"), "functions": body.get("function_call")}
    for name, given in body.items():
        refused = unused.refused.get(name)
        if name not in kind.model_fields and name not in unused.ignored and refused is None:
            reason = "this endpoint does not know this field; leave it out"
            raise invalid(name[:200], reason, code="unknown_parameter")
        if given is None or name in unused.ignored or (refused and no_tools.get(name) == "none"):
            continue
        if refused is None:
            used[name] = given
        elif not refused.is_neutral(given):
            raise invalid(name, refused.advice, code="unsupported_parameter")
    return used


class AnswerRequest(RequestBody):
    """The fields that all requests for an answer share."""

    model: str = ""
    """The arm that answers; empty: the arm of the config."""
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    """Sample from the likeliest tokens whose probabilities add up to this."""
    top_k: int | None = Field(None, ge=1)
    """Extension: how many passages to retrieve."""
    filter: Filter | None = None
    """Extension: conditions on documents' metadata, in addition to those of the key."""
    retrieval: config.RetrievalUse | None = None
    """Extension: `auto` retrieves only if the generator is unsure without passages. None: serve.retrieval."""
    timeout_seconds: float | None = Field(None, gt=0)
    """Extension: time limit for the answer; at most serve.timeout_seconds."""

    def common(self) -> dict[str, Any]:
        """These fields as arguments of `answers.Question`."""
        return self.model_dump(include=set(AnswerRequest.model_fields) - {"stream"})


class StreamOptions(RequestBody):
    """What a stream of completions contains in addition to text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


class SamplingRequest(AnswerRequest):
    """The fields that chat completions and completions share."""

    max_tokens: int | None = Field(None, ge=1)
    """Longest answer; more than serve.max_new_tokens is that many."""
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        Field(max_length=MAX_STOPS, fail_fast=True),
        BeforeValidator(_listed, json_schema_input_type=str | list[str]),
    ] = Field(default_factory=list)
    """Up to four texts of 1 to 256 characters that end the answer."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1)
    """How many answers to draw; more than one only without `stream`."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, limits: config.Serve) -> dict[str, Any]:
        """The fields of the class and `common` as arguments of `answers.Question`; ApiError 400 if one is over its limit."""
        if self.n > limits.max_answers:
            raise invalid("n", f"{self.n}; the limit is {limits.max_answers}", code="over_limit")
        if self.n > 1 and self.stream:
            raise invalid(
                "n", "a stream has one answer; leave n out, or set stream to false", code="unsupported_parameter"
            )
        return {
            **self.common(),
            "num_answers": self.n,
            "max_new_tokens": self.max_tokens,
            "stop": tuple(self.stop),
            "seed": self.seed,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
