"""Asks a language model for JSON, and asks again where the reply is something else. Grading and writing questions share it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ragtune_ray import RagtuneError, config
from ragtune_ray.evaluation.grading.task import Grade, GradingError
from ragtune_ray.generation.generator import open_generator
from ragtune_ray.generation.interface import Completion, DecodingOptions, Generator, GeneratorError, Prompt
from ragtune_ray.generation.openai_client import OpenAIGenerator
from ragtune_ray.generation.vllm_generator import VllmGenerator

MAX_ASKED = 3
"""How often a model is asked for one grade: once, and again after a reply that is not what was asked for."""
_SHOWN_CHARACTERS = 1000
_REMINDER = "Reply with the JSON object that is described above, and nothing else."
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL)

Value = TypeVar("Value")


class ReplyError(RagtuneError, ValueError):
    """A reply is not what was asked for; the message says what is wrong, and is sent back to the model."""


@dataclass(frozen=True, slots=True)
class Request(Generic[Value]):
    """A question to a language model, and how its reply is read."""

    system: str
    content: Mapping[str, Any]
    """JSON values, sent as one JSON object: what a quoted text says cannot end the quotation."""
    schema: Mapping[str, Any]
    """JSON schema of the reply."""
    read: Callable[[dict[str, Any]], Value]
    """Returns the value of a reply; raises a ReplyError if it is not what was asked for."""
    examples: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = ()
    """Contents with the replies that they should get, shown as an earlier exchange."""


@dataclass(slots=True)
class Reply(Generic[Value]):
    """What came of a request."""

    value: Value | None = None
    """None if it failed."""
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    malformed: int = 0
    """Replies that were not what was asked for; as many as requests, if no request failed and there is no value."""


class Asker:
    """A language model that replies with JSON.

    Args:
        generator: the model; a server or vLLM is sent the JSON schema of the reply.
        max_new_tokens: longest reply.
        section: of the settings of the model, for errors.
        max_asked: how often it is asked for one reply, at least once.
        temperature: of sampling; 0 is greedy.
        seed: of sampling.
    """

    def __init__(
        self,
        generator: Generator,
        max_new_tokens: int,
        section: str = "evaluate.judge",
        *,
        max_asked: int = MAX_ASKED,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._generator, self._max_new_tokens, self._section = generator, max_new_tokens, section
        self._max_asked, self._temperature, self._seed = max_asked, temperature, seed

    def ask(self, requests: Sequence[Request[Value]]) -> list[Reply[Value]]:
        """One reply per request, in the same order.

        A request whose reply cannot be read is sent again, with the reply and what is wrong with it, up to `max_asked` times in
        all. One that the server does not answer fails at once: its client has tried again already.
        """
        replies = [Reply[Value]() for _ in requests]
        messages = [_messages(request) for request in requests]
        pending = list(range(len(requests)))
        for _ in range(self._max_asked):
            again = []
            for place, made in self._completions(pending, requests, messages):
                reply = replies[place]
                reply.requests += 1
                reply.prompt_tokens += made.prompt_tokens
                reply.completion_tokens += made.completion_tokens
                reply.error = _named(made.error, self._section)
                if made.error:
                    continue
                try:
                    reply.value = requests[place].read(json_object(made.text))
                except ReplyError as error:
                    reply.malformed += 1
                    cut = f"; it was cut at {self._section}.max_new_tokens={self._max_new_tokens}"
                    reply.error = f"{error}{cut if made.finish == 'length' else ''}"
                    messages[place] += (("assistant", made.text or "(nothing)"), ("user", _correction(str(error))))
                    again.append(place)
            pending = again
            if not pending:
                break
        return replies

    def _completions(
        self,
        pending: Sequence[int],
        requests: Sequence[Request[Value]],
        messages: Sequence[tuple[tuple[str, str], ...]],
    ) -> list[tuple[int, Completion]]:
        """The completion of each pending request; one call per schema, since a call has one."""
        found: list[tuple[int, Completion]] = []
        by_schema: dict[str, list[int]] = {}
        for place in pending:
            by_schema.setdefault(json.dumps(requests[place].schema), []).append(place)
        for places in by_schema.values():
            sizes = self._generator.count_tokens([self._generator.render(messages[place]) for place in places])
            prompts = [Prompt(messages[place], (), size) for place, size in zip(places, sizes, strict=True)]
            found += zip(places, self._generate(prompts, requests[places[0]].schema), strict=True)
        return found

    def _generate(self, prompts: Sequence[Prompt], schema: Mapping[str, Any]) -> list[Completion]:
        options: DecodingOptions = {
            "max_new_tokens": self._max_new_tokens,
            "temperature": self._temperature,
            "seed": self._seed,
        }
        if isinstance(self._generator, OpenAIGenerator | VllmGenerator):
            return self._generator.generate(prompts, json_schema=schema, **options)
        return self._generator.generate(prompts, **options)


def grades_of(replies: Sequence[Reply[tuple[dict[str, float], str]]]) -> list[Grade]:
    """Replies with values and their reason as grades; without values where a reply failed."""
    return [
        Grade(*(reply.value or ({}, "")), reply.error, reply.prompt_tokens, reply.completion_tokens, reply.requests)
        for reply in replies
    ]


def open_asker(settings: config.Config) -> Asker:
    """Load the model of `evaluate.judge`, or connect to its server.

    Raises:
        GradingError: the server's API key is missing, or the engine cannot run the model.
        ModelError: the model cannot be found, fetched or loaded.
    """
    judge = settings.evaluate.judge
    try:
        generator = open_generator(as_generator(settings)).generator
    except GeneratorError as error:
        raise GradingError(_named(str(error), "evaluate.judge")) from None
    return Asker(generator, judge.max_new_tokens)


def as_generator(settings: config.Config) -> config.Config:
    """The config with the model of `evaluate.judge` as its generator."""
    names = ("model", "engine", "base_url", "api_key_env", "max_new_tokens", "concurrency", "timeout_seconds")
    given = settings.evaluate.judge.model_dump(include={*names, "max_attempts"})
    return settings.with_values(
        {f"generator.{name}": value for name, value in given.items()} | {"answer.reading": "together"}
    )


def _named(error: str, section: str) -> str:
    """An error of the generator, with the names of the settings of a section."""
    return error.replace("generator.", f"{section}.")


def _messages(request: Request[Any]) -> tuple[tuple[str, str], ...]:
    turns = [("system", request.system)]
    for content, reply in request.examples:
        turns += [("user", _shown(content)), ("assistant", json.dumps(reply, ensure_ascii=False))]
    return (*turns, ("user", _shown(request.content)))


def _shown(content: Mapping[str, Any]) -> str:
    return f"{json.dumps(content, ensure_ascii=False, indent=1)}\n\n{_REMINDER}"


def _correction(problem: str) -> str:
    return f"That cannot be used: {problem}. Reply with the JSON object alone, as described."


def json_object(text: str) -> dict[str, Any]:
    r"""The JSON object that a reply consists of; a fence of Markdown around it is left out.

    >>> json_object('```json\n{"grade": "right"}\n```')
    {'grade': 'right'}

    Raises:
        ReplyError: it is empty, or anything else than one object.
    """
    plain = text.strip()
    if not plain:
        raise ReplyError("the reply is empty")
    fenced = _FENCE.match(plain)
    try:
        found = json.loads(fenced[1] if fenced else plain)
    except (ValueError, RecursionError):
        raise ReplyError(f"the reply is not a JSON object: {plain[:60]!r}") from None
    if not isinstance(found, dict):
        raise ReplyError(f"the reply is not a JSON object but {type(found).__name__}")
    return found


def text_of(found: Mapping[str, Any], name: str) -> str:
    """A short text of a reply, in valid Unicode; "" if it is absent or no text."""
    value = found.get(name)
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text[:_SHOWN_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
