"""Compares the engines `transformers` and `vllm`, by turns in one run: bulk, many requests at once, one alone, one step.

    .venv-vllm/bin/python -m bench.engines --rounds 3

It runs in the environment that `make vllm` makes, which has both engines. Each has a process of its own and waits while the
other works. Prompts show passages of data/space, cut to two lengths. Every round and every kind of load has prompts of its own,
so that only their common beginning can be in a prefix cache. Every figure is the median of the rounds, with the lowest and the
highest. The last lines compare one decoding step of 16 rows with the time that a copy of as many bytes takes as the step reads
(weights, keys and values), and count the texts that are equal.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch

from ragtune_ray.config import Config
from ragtune_ray.generation.continuous import ContinuousGenerator
from ragtune_ray.generation.decoding import DecodingBatch
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.generation.interface import Completion, Prompt
from ragtune_ray.generation.vllm_generator import VllmGenerator, cache_bytes
from ragtune_ray.models import hardware, loading, weights
from ragtune_ray.models.packing import pack

SYSTEM = "Answer the question from the passages, briefly, and cite their numbers."
STEP_ROWS, STEP_TOKENS, NUM_STEPS = 16, 420, 20
EngineName = Literal["transformers", "vllm"]
ENGINES: tuple[EngineName, ...] = ("transformers", "vllm")
P = ParamSpec("P")
T = TypeVar("T")


class Process:
    """A process with one engine."""

    def __init__(self, engine: EngineName, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=_open, initargs=(engine, options))

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function of this module there."""
        return self._pool.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        """End the engine and the process."""
        self.call(_close)
        self._pool.shutdown()


class Opened:
    """The engine of this process."""

    def __init__(self, engine: EngineName, options: argparse.Namespace) -> None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of vLLM's own process
        torch.set_num_threads(options.threads)
        settings = Config().using(f"generator.precision={options.precision}", f"generator.engine={engine}").generator
        self.options = options
        self.generator: TransformersGenerator | VllmGenerator
        self.served: ContinuousGenerator | VllmGenerator
        if engine == "vllm":
            self.generator = self.served = VllmGenerator(options.model, settings, max_running=options.clients)
        else:
            self.generator = TransformersGenerator(
                options.model, precision=settings.precision, batch_tokens=settings.batch_tokens
            )
            self.served = ContinuousGenerator(self.generator, max_running=options.clients)


_opened: list[Opened] = []


def _open(engine: EngineName, options: argparse.Namespace) -> None:
    _opened.append(Opened(engine, options))


def _close() -> None:
    _opened.pop().served.close(0)


def _bulk(length: int, number: int) -> tuple[float, list[str]]:
    """Answers per second and the texts of a bulk job."""
    engine = _opened[0]
    prompts = _prompts(engine, length, engine.options.prompts, number)
    return _timed(lambda: engine.generator.generate(prompts, max_new_tokens=engine.options.new_tokens), len(prompts))


def _at_once(length: int, number: int) -> tuple[float, list[str]]:
    """Answers per second and the texts of clients that ask at once."""
    engine = _opened[0]
    prompts = _prompts(engine, length, engine.options.prompts, number)
    return _timed(lambda: _closed_loop(engine, prompts), len(prompts))


def _first_token(length: int, number: int) -> float:
    """Seconds to the first token of a request that is alone."""
    engine = _opened[0]
    prompt = _prompts(engine, length, 1, number)[0]
    started = time.perf_counter()
    request = engine.served.submit(prompt, max_new_tokens=8)
    next(request.pieces())
    seconds = time.perf_counter() - started
    request.cancel()
    return seconds


def main() -> None:
    """Measure, and print a table."""
    options = _options()
    processes = {engine: Process(engine, options) for engine in ENGINES}
    dtype = hardware.resolve_precision(options.precision, "cpu")
    print(f"{dtype}, {options.threads} threads, {options.new_tokens} new tokens, {options.rounds} rounds")
    print(f"{'':44}{'transformers':>22}{'vllm':>22}{'ratio':>8}")
    same = {"own served == own bulk": [0, 0], "vllm bulk == own bulk": [0, 0]}
    for length in options.tokens:
        _measure(options, length, processes, same)
    for process in processes.values():
        process.close()
    _step(options.model, dtype, options.threads)
    for name, (equal, total) in same.items():
        print(f"{name}: {equal} of {total} texts")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = weights.resolve(Config().generator.model).directory
    parser.add_argument("--model", type=Path, default=default, help="directory of a causal language model")
    parser.add_argument("--data", type=Path, default=Path("data/space/documents"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[390, 926], help="lengths of the prompts")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", default="auto")
    return parser.parse_args()


def _measure(
    options: argparse.Namespace, length: int, processes: dict[EngineName, Process], same: dict[str, list[int]]
) -> None:
    kinds = ("bulk", "at once", "first token")
    found: dict[str, dict[EngineName, list[float]]] = {kind: {engine: [] for engine in ENGINES} for kind in kinds}
    for number in range(options.rounds + 1):  # the first round warms up
        bulk = {engine: process.call(_bulk, length, 3 * number) for engine, process in processes.items()}
        served = {engine: process.call(_at_once, length, 3 * number + 1) for engine, process in processes.items()}
        first = {engine: process.call(_first_token, length, 3 * number + 2) for engine, process in processes.items()}
        if number == 0:
            continue
        for engine in ENGINES:
            found["bulk"][engine].append(bulk[engine][0])
            found["at once"][engine].append(served[engine][0])
            found["first token"][engine].append(first[engine])
        again = processes["transformers"].call(_bulk, length, 3 * number + 1)
        _count(same["own served == own bulk"], served["transformers"][1], again[1])
        _count(same["vllm bulk == own bulk"], bulk["vllm"][1], bulk["transformers"][1])
    _row(f"bulk, {length} tokens, answers/s", found["bulk"])
    _row(f"{options.clients} at once, {length} tokens, answers/s", found["at once"])
    _row(f"first token alone, {length} tokens, s", found["first token"])


def _count(same: list[int], some: Sequence[str], others: Sequence[str]) -> None:
    same[0] += sum(one == other for one, other in zip(some, others, strict=True))
    same[1] += len(some)


def _row(name: str, found: dict[EngineName, list[float]]) -> None:
    ratio = statistics.median(found["transformers"]) / statistics.median(found["vllm"])
    print(f"{name:44}{_shown(found['transformers']):>22}{_shown(found['vllm']):>22}{ratio:8.2f}", flush=True)


def _shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def _timed(work: Callable[[], list[Completion]], num_prompts: int) -> tuple[float, list[str]]:
    started = time.perf_counter()
    made = work()
    rate = num_prompts / (time.perf_counter() - started)
    assert not any(each.error for each in made), made
    return rate, [each.text for each in made]


def _closed_loop(engine: Opened, prompts: Sequence[Prompt]) -> list[Completion]:
    """Each client asks again as soon as it has its answer."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(prompts)):
        waiting.put(number)
    made: dict[int, Completion] = {}

    def ask() -> None:
        while True:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            made[number] = engine.served.submit(prompts[number], max_new_tokens=engine.options.new_tokens).completion()

    threads = [threading.Thread(target=ask) for _ in range(engine.options.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [made[number] for number in range(len(prompts))]


def _prompts(engine: Opened, length: int, count: int, number: int) -> list[Prompt]:
    """Prompts of about `length` tokens, for each `number` from other places of the corpus."""
    words = " ".join(file.read_text(encoding="utf-8") for file in sorted(engine.options.data.glob("*.md"))).split()
    count_tokens = engine.generator.count_tokens
    overhead = count_tokens([engine.generator.render(_messages(""))])[0]
    per_word = count_tokens([" ".join(words[:2000])])[0] / 2000
    size = int((length - overhead) / per_word)
    starts = [(7919 * (number * count + place)) % (len(words) - size) for place in range(count)]
    return [Prompt(_messages(" ".join(words[start : start + size])), (), length) for start in starts]


def _messages(text: str) -> tuple[tuple[str, str], ...]:
    return (("system", SYSTEM), ("user", f"{text}\n\nQuestion: What does the passage say?"))


def _step(directory: Path, dtype: torch.dtype, threads: int) -> None:
    """Compare a decoding step with a copy of as many bytes as it reads, by turns."""
    torch.set_num_threads(threads)
    model = loading.load_causal_model(directory, dtype, "sdpa").eval()
    num_bytes = dtype.itemsize * sum(each.numel() for each in model.parameters())
    num_bytes += STEP_ROWS * STEP_TOKENS * cache_bytes(model.config, dtype.itemsize)
    prefill_tokens = 0 if pack(model) else 512  # from here on, packed layers are not parameters
    with torch.inference_mode():
        ids = [[5 + (row + place) % 100 for place in range(STEP_TOKENS)] for row in range(STEP_ROWS)]
        batch = DecodingBatch(model, ids, NUM_STEPS + 1, prefill_tokens)
        source = torch.ones(num_bytes, dtype=torch.uint8)
        target = torch.empty_like(source)
        steps, copies = [], []
        for _ in range(NUM_STEPS):
            steps.append(_seconds(lambda: batch.step(torch.tensor([7] * STEP_ROWS))))
            copies.append(_seconds(lambda: target.copy_(source)))
    step, copy = statistics.median(steps), statistics.median(copies)
    print(
        f"a step of {STEP_ROWS} rows at {STEP_TOKENS} tokens: {1000 * step:.0f} ms; a copy of its {num_bytes / 1e9:.2f} GB: "
        f"{1000 * copy:.0f} ms; ratio {step / copy:.2f}"
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
