"""Compares the engines `transformers` and `vllm`, by turns in one run: bulk, many requests at once, one alone, one step.

    .venv-vllm/bin/python -m bench.engines --rounds 3

It runs in the environment that `make vllm` makes, which has both engines. Prompts show passages of data/space, cut to two
lengths. Both engines are open in one process, in which ours has been seen at half its speed (docs/decisions.md, packing in
float32): check its column against a process without vLLM. Every figure is the median of the rounds, with the lowest and the
highest. The last lines compare one decoding step of 16 rows with the time that a copy of as many bytes takes as the step reads
(weights, keys and values), and count the texts that are equal.
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from ragtune_ray.config import Config
from ragtune_ray.generation.continuous import ContinuousGenerator
from ragtune_ray.generation.decoding import DecodingBatch
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.generation.interface import Completion, Prompt
from ragtune_ray.generation.request import Request
from ragtune_ray.generation.vllm_generator import VllmGenerator, cache_bytes
from ragtune_ray.models import hardware, loading, weights
from ragtune_ray.models.packing import pack

SYSTEM = "Answer the question from the passages, briefly, and cite their numbers."
STEP_ROWS, STEP_TOKENS, NUM_STEPS = 16, 420, 20


class Engine(Protocol):
    """What both engines of the endpoint have."""

    def submit(self, prompt: Prompt, *, max_new_tokens: int) -> Request:
        """Queue a prompt."""


def main() -> None:
    """Measure, and print a table."""
    options = _options()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of vLLM's process
    torch.set_num_threads(options.threads)
    settings = Config().using(f"generator.precision={options.precision}").generator
    own = TransformersGenerator(options.model, precision=settings.precision, batch_tokens=settings.batch_tokens)
    served = ContinuousGenerator(own, max_running=options.clients)
    other = VllmGenerator(options.model, settings.model_copy(update={"engine": "vllm"}), max_running=options.clients)
    dtype = hardware.resolve_precision(settings.precision, "cpu")
    print(f"{dtype}, {options.threads} threads, {options.new_tokens} new tokens, {options.rounds} rounds")
    print(f"{'':44}{'transformers':>22}{'vllm':>22}{'ratio':>8}")
    texts: dict[str, list[str]] = {}
    try:
        for length in options.tokens:
            _measure(options, length, own, served, other, texts)
    finally:
        served.close(0)
        other.close(0)
    _step(options.model, dtype)  # vLLM has ended
    for one, another in (("own bulk", "own served"), ("own bulk", "vllm bulk")):
        same = sum(a == b for a, b in zip(texts[one], texts[another], strict=True))
        print(f"{one} == {another}: {same} of {len(texts[one])} texts")


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
    options: argparse.Namespace,
    length: int,
    own: TransformersGenerator,
    served: ContinuousGenerator,
    other: VllmGenerator,
    texts: dict[str, list[str]],
) -> None:
    num_new = options.new_tokens

    def bulk(engine: TransformersGenerator | VllmGenerator, prompts: Sequence[Prompt]) -> tuple[float, list[str]]:
        return _timed(lambda: engine.generate(prompts, max_new_tokens=num_new), len(prompts))

    def at_once(engine: Engine, prompts: Sequence[Prompt]) -> tuple[float, list[str]]:
        return _timed(lambda: _closed_loop(engine, prompts, options.clients, num_new), len(prompts))

    rates: dict[str, list[float]] = {name: [] for name in ("own bulk", "own served", "vllm bulk", "vllm served")}
    first: dict[str, list[float]] = {"own": [], "vllm": []}
    for number in range(options.rounds + 1):
        # Other prompts in each round, so that nothing but their beginning is in vLLM's cache; the first round warms up.
        prompts = _prompts(own, options.data, length, options.prompts, number)
        made = {
            "own bulk": bulk(own, prompts),
            "vllm bulk": bulk(other, prompts),
            "own served": at_once(served, prompts),
            "vllm served": at_once(other, _prompts(own, options.data, length, options.prompts, number, other=True)),
        }
        alone = _prompts(own, options.data, length, 1, number + 1000)[0]
        seconds = {"own": _first_token(served, alone), "vllm": _first_token(other, alone)}
        if number:
            for name, (rate, _) in made.items():
                rates[name].append(rate)
            for name, value in seconds.items():
                first[name].append(value)
            for name in ("own bulk", "own served", "vllm bulk"):
                texts.setdefault(name, []).extend(made[name][1])
    _row(f"bulk, {length} tokens, answers/s", rates["own bulk"], rates["vllm bulk"])
    _row(f"{options.clients} at once, {length} tokens, answers/s", rates["own served"], rates["vllm served"])
    _row(f"first token alone, {length} tokens, s", first["own"], first["vllm"])


def _row(name: str, own: Sequence[float], other: Sequence[float]) -> None:
    ratio = statistics.median(own) / statistics.median(other)
    print(f"{name:44}{_shown(own):>22}{_shown(other):>22}{ratio:8.2f}", flush=True)


def _shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def _timed(work: Callable[[], list[Completion]], num_prompts: int) -> tuple[float, list[str]]:
    started = time.perf_counter()
    made = work()
    rate = num_prompts / (time.perf_counter() - started)
    assert not any(each.error for each in made), made
    return rate, [each.text for each in made]


def _closed_loop(engine: Engine, prompts: Sequence[Prompt], clients: int, num_new: int) -> list[Completion]:
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
            made[number] = engine.submit(prompts[number], max_new_tokens=num_new).completion()

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [made[number] for number in range(len(prompts))]


def _first_token(engine: Engine, prompt: Prompt) -> float:
    started = time.perf_counter()
    request = engine.submit(prompt, max_new_tokens=8)
    next(request.pieces())
    seconds = time.perf_counter() - started
    request.cancel()
    return seconds


def _prompts(
    generator: TransformersGenerator, path: Path, length: int, count: int, number: int, *, other: bool = False
) -> list[Prompt]:
    """Prompts of about `length` tokens, for each `number` from other places of the corpus; with `other`, of other words."""
    words = " ".join(file.read_text(encoding="utf-8") for file in sorted(path.glob("*.md"))).split()
    words = words[::-1] if other else words
    overhead = generator.count_tokens([generator.render(_messages(""))])[0]
    per_word = generator.count_tokens([" ".join(words[:2000])])[0] / 2000
    size = int((length - overhead) / per_word)
    starts = [(7919 * (number * count + place)) % (len(words) - size) for place in range(count)]
    return [Prompt(_messages(" ".join(words[start : start + size])), (), length) for start in starts]


def _messages(text: str) -> tuple[tuple[str, str], ...]:
    return (("system", SYSTEM), ("user", f"{text}\n\nQuestion: What does the passage say?"))


def _step(directory: Path, dtype: torch.dtype) -> None:
    """Compare a decoding step with a copy of as many bytes as it reads."""
    model = loading.load_causal_model(directory, dtype, "sdpa").eval()
    prefill_tokens = 0 if pack(model) else 512
    with torch.inference_mode():
        ids = [[5 + (row + place) % 100 for place in range(STEP_TOKENS)] for row in range(STEP_ROWS)]
        batch = DecodingBatch(model, ids, NUM_STEPS + 1, prefill_tokens)
        seconds = []
        for _ in range(NUM_STEPS):
            started = time.perf_counter()
            batch.step(torch.tensor([7] * STEP_ROWS))
            seconds.append(time.perf_counter() - started)
    num_bytes = dtype.itemsize * sum(each.numel() for each in model.parameters())
    num_bytes += STEP_ROWS * STEP_TOKENS * cache_bytes(model.config, dtype.itemsize)
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    copies = []
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - started)
    step, copy = statistics.median(seconds), statistics.median(copies)
    print(
        f"a step of {STEP_ROWS} rows at {STEP_TOKENS} tokens: {1000 * step:.0f} ms; a copy of its {num_bytes / 1e9:.2f} GB: "
        f"{1000 * copy:.0f} ms; ratio {step / copy:.2f}"
    )


if __name__ == "__main__":
    main()
