"""Generates with any OpenAI-compatible server, such as vLLM, Ray Serve LLM or `transformers serve`."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import time
from collections.abc import Generator as Stream
from collections.abc import Mapping, Sequence
from typing import Any, Unpack
from urllib.parse import urlsplit

from ragtune_ray.config.extras import install_command
from ragtune_ray.generation import openai_replies
from ragtune_ray.generation.interface import Completion, DecodingOptions, Finish, GeneratorError, Prompt

MAX_STOPS = 4
"""Most stop strings of a request in OpenAI's API."""
_SAMPLING_DEFAULTS = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_logger = logging.getLogger(__name__)
_BYTES_PER_TOKEN = 3  # English has 4 to 5 bytes per token, Chinese 3 to 4, so that 3 overestimates the number of tokens


class OpenAIGenerator:
    """A chat model behind an OpenAI-compatible HTTP API.

    The SDK retries on 408, 409, 429, 5xx and lost connections: with exponential backoff and jitter, or when the server's
    Retry-After header says. Where a server does not support `max_tokens`, `temperature`, `seed` or a JSON schema, the request
    is repeated with the newer name or without it, and so are all later requests. A value that it refuses fails only the
    request that has it.

    Args:
        base_url: the root of the API, including /v1.
        model: the server's name for the model.
        api_key_env: the environment variable with the API key. If it is not set, a loopback server gets a dummy key.
        concurrency: most requests in flight.
        timeout_seconds: limit for one attempt.
        max_attempts: attempts per request.

    Raises:
        GeneratorError: the package `openai` or the API key is missing.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout_seconds: float = 60.0,
        max_attempts: int = 5,
    ) -> None:
        self._openai = _import_openai()
        self._base_url, self._model = base_url, model
        self._key = _api_key(api_key_env, base_url)
        self._concurrency, self._timeout_seconds, self._max_attempts = concurrency, timeout_seconds, max_attempts
        self._refused: frozenset[str] = frozenset()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """An estimate, UTF-8 bytes / 3 rounded up; usually too high, so that prompts do not exceed their budget."""
        return [-(-len(text.encode()) // _BYTES_PER_TOKEN) for text in texts]

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The contents joined, for counting only; the server applies its own chat template."""
        return "\n".join(content for _, content in messages)

    def generate(
        self,
        prompts: Sequence[Prompt],
        json_schema: Mapping[str, Any] | None = None,
        **options: Unpack[DecodingOptions],
    ) -> list[Completion]:
        """One completion per prompt, in the same order; the `error` of a failed request has its status and reason.

        Args:
            prompts: of the requests.
            json_schema: of the JSON object that each completion must be, if the server can enforce it; None for any text.
            **options: of decoding.

        Raises:
            GeneratorError: `stop` has more than `MAX_STOPS` texts.
        """
        request = self._request(**options)
        if json_schema is not None:
            named = {"name": "reply", "strict": True, "schema": json_schema}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        return asyncio.run(self._complete_all(prompts, request))

    def stream(self, prompt: Prompt, **options: Unpack[DecodingOptions]) -> Stream[str, None, Finish]:
        """Yield the text in the pieces that the server sends; return why it ended.

        Raises:
            GeneratorError: the request failed; the message has the status.
        """
        request = self._request(**options)
        finish: Finish = "stop"
        raw: str | None = None
        shown = ""
        with self._openai.OpenAI(**self._connection()) as client:
            try:
                for chunk in self._open_stream(client, prompt, request):
                    for choice in (chunk.choices or [])[:1]:  # some servers send null with the usage
                        finish = "length" if choice.finish_reason == "length" else finish
                        piece = openai_replies.content_of(choice.delta)
                        raw = raw if piece is None else (raw or "") + piece
                        more = openai_replies.more_text(raw or "", shown, ended=False)
                        if more:
                            yield more
                        shown += more
            except (self._openai.OpenAIError, ValueError) as error:
                if isinstance(error, GeneratorError):
                    raise
                raise GeneratorError(self._reason(error)) from None  # the cause may contain the request with its key
        if more := openai_replies.more_text(raw or "", shown, ended=True):
            yield more
        elif not shown and (problem := openai_replies.missing_text(raw, finish)):
            raise GeneratorError(problem)
        return finish

    def log_likelihood(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[float, int]]:
        """Always raises GeneratorError: the API cannot score given answers."""
        raise GeneratorError(
            f"generator.engine=openai cannot score {len(answers)} given answers after {len(prompts)} prompts "
            "(log-likelihood); set generator.engine=transformers for that"
        )

    async def _complete_all(self, prompts: Sequence[Prompt], request: dict[str, Any]) -> list[Completion]:
        slots = asyncio.Semaphore(self._concurrency)
        async with self._openai.AsyncOpenAI(**self._connection()) as client:
            return await asyncio.gather(*(self._complete(client, slots, prompt, request) for prompt in prompts))

    async def _complete(
        self, client: Any, slots: asyncio.Semaphore, prompt: Prompt, request: dict[str, Any]
    ) -> Completion:
        async with slots:
            started = time.perf_counter()
            try:
                reply = await self._reply(client, prompt, request)
                return openai_replies.completion_of(reply, prompt, time.perf_counter() - started)
            except (self._openai.OpenAIError, ValueError) as error:  # ValueError: the body is not JSON
                seconds = time.perf_counter() - started
                return Completion("", prompt.num_tokens, 0, seconds, "stop", self._reason(error))

    async def _reply(self, client: Any, prompt: Prompt, request: dict[str, Any]) -> Any:
        refused = self._refused
        while True:
            sent = openai_replies.adapted(request, refused)
            try:
                reply = await client.chat.completions.create(**sent, messages=_messages(prompt))
            except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
                refused |= {self._refused_parameter(error, sent)}
            else:
                self._remember(refused)
                return reply

    def _open_stream(self, client: Any, prompt: Prompt, request: dict[str, Any]) -> Any:
        refused = self._refused
        while True:
            sent = openai_replies.adapted(request, refused)
            try:
                stream = client.chat.completions.create(**sent, messages=_messages(prompt), stream=True)
            except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
                refused |= {self._refused_parameter(error, sent)}
            else:
                self._remember(refused)
                return stream

    def _refused_parameter(self, error: Any, sent: dict[str, Any]) -> str:
        """The parameter to send otherwise; raises the error again if it names none."""
        parameter = openai_replies.refused_parameter(f"{error} {error.body}", getattr(error, "param", None), sent)
        if not parameter:
            raise error
        return parameter

    def _remember(self, refused: frozenset[str]) -> None:
        """Note the parameters without which a request succeeded."""
        for parameter in sorted(refused - self._refused):
            _logger.warning("%s does not accept %s; it is sent otherwise", _host(self._base_url), parameter)
        self._refused |= refused

    def _request(
        self,
        max_new_tokens: int,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        **sampling: float,
    ) -> dict[str, Any]:
        if len(stop) > MAX_STOPS:
            raise GeneratorError(f"generator.stop: {len(stop)} texts; an OpenAI-compatible server accepts {MAX_STOPS}")
        request: dict[str, Any] = {"model": self._model, "max_tokens": max_new_tokens, "temperature": temperature}
        if stop:
            request["stop"] = list(stop)
        # Some servers refuse a field even at its default.
        changed = {name: value for name, value in sampling.items() if value != _SAMPLING_DEFAULTS[name]}
        return request | {"seed": seed} | changed

    def _connection(self) -> dict[str, Any]:
        return {
            "base_url": self._base_url,
            "api_key": self._key,
            "timeout": self._timeout_seconds,
            "max_retries": self._max_attempts - 1,
        }

    def _reason(self, error: Exception) -> str:
        """Status and message in one line, without the key, which the server may have echoed."""
        status = getattr(error, "status_code", None)
        text = " ".join(str(error).split())[:500].replace(self._key, "***")
        return f"{type(error).__name__}{f' (status {status})' if status else ''} from {_host(self._base_url)}: {text}"


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise GeneratorError(
            f"generator.engine=openai needs the package openai, which is missing; run: {install_command('openai')}"
        ) from error
    return openai


def _api_key(name: str, base_url: str) -> str:
    key = os.environ.get(name, "").strip()
    if key:
        return key
    if is_loopback(urlsplit(base_url).hostname or ""):
        return "no-key-needed-on-loopback"
    raise GeneratorError(
        f"generator.api_key_env: environment variable {name} is not set, and {_host(base_url)} is not this machine; "
        f"export {name} or name another variable"
    )


def is_loopback(host: str) -> bool:
    """Whether an address, or the value of a Host header, is this machine itself.

    >>> is_loopback("[::1]:8000"), is_loopback("127.0.0.1.evil.example")
    (True, False)
    """
    name = host.strip()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name.casefold() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:  # a name, not an address
        return False


def _host(base_url: str) -> str:
    """Host and port only, because the URL may contain a user name and password."""
    parts = urlsplit(base_url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in prompt.messages]
