"""Measures what only a GPU shows, in one table: encoding, generating, training, memory, and whether results equal a CPU's.

    python -m bench.gpu                        # on the GPU, about five minutes with the embedded models
    .venv-vllm/bin/python -m bench.gpu         # in an environment with vLLM, its engine too
    python -m bench.gpu --device cpu --passages 64 --prompts 8    # tries the script without a GPU

Rates are medians of the rounds after the first, with the lowest and the highest. `busy` is the share of the time in which
kernels ran on the GPU, as `nvidia-smi` samples it. Results are compared in float32: vectors by their smallest cosine, log
likelihoods by their largest relative difference, greedy answers by the number of equal texts.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from ragtune_ray.config import Config
from ragtune_ray.config.models import Precision
from ragtune_ray.generation.continuous import ContinuousGenerator
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.generation.interface import GeneratorError, Prompt
from ragtune_ray.generation.shared_prefixes import collate
from ragtune_ray.generation.vllm_generator import VllmGenerator
from ragtune_ray.models import hardware, weights
from ragtune_ray.models.encoder import load_encoder
from ragtune_ray.training import memory, optimization, trainable
from ragtune_ray.training.objectives.sft import Piece

ANSWER_TOKENS = 24
PASSAGE_WORDS, PROMPT_WORDS = 150, 300
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
SAMPLE_SECONDS = 0.2


def main() -> None:
    """Measure one thing after another and print a row for each."""
    options = _options()
    settings = Config().using(f"generator.model={options.generator}", f"encoder.model={options.encoder}")
    settings = settings.using(f"generator.batch_tokens={options.batch_tokens}")
    words = " ".join(file.read_text(encoding="utf-8") for file in sorted(options.data.glob("*.md"))).split()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU"
    print(f"{name}, torch {torch.__version__}, {options.rounds} rounds")
    print(f"{'':52}{'figure':>28}{'busy':>7}")
    passages = _texts(words, options.passages, PASSAGE_WORDS)
    prompts = [
        Prompt((("user", f"{text}\n\nWhat does this say?"),), (), 0)
        for text in _texts(words, options.prompts, PROMPT_WORDS)
    ]
    _encode(options, settings, passages)
    _generate(options, settings, prompts)
    _train(options, settings)
    if options.device != "cpu":
        _compare(settings, passages[:64], prompts[:16])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--generator", default=Config().generator.model)
    parser.add_argument("--encoder", default=Config().encoder.model)
    parser.add_argument("--data", type=Path, default=Path("data/space/documents"))
    parser.add_argument("--passages", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def _texts(words: Sequence[str], count: int, size: int) -> list[str]:
    starts = [(7919 * number) % (len(words) - size) for number in range(count)]
    return [" ".join(words[start : start + size]) for start in starts]


def _encode(options: argparse.Namespace, settings: Config, passages: Sequence[str]) -> None:
    for precision in PRECISIONS:
        encoder = load_encoder(settings.using(f"encoder.precision={precision}").encoder, options.device)
        _rate(
            options,
            f"encoding, {precision}: passages/s",
            len(passages),
            functools.partial(encoder.encode_passages, passages),
        )


def _generate(options: argparse.Namespace, settings: Config, prompts: Sequence[Prompt]) -> None:
    directory = weights.resolve(settings.generator.model).directory
    assert directory is not None

    def at_once(engine: ContinuousGenerator | VllmGenerator) -> None:
        turns, lock = iter(prompts), threading.Lock()

        def ask() -> None:
            while True:
                with lock:
                    prompt = next(turns, None)
                if prompt is None:
                    return
                engine.submit(prompt, max_new_tokens=ANSWER_TOKENS).completion()

        clients = [threading.Thread(target=ask) for _ in range(options.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    for precision in PRECISIONS:
        own = TransformersGenerator(
            directory, precision=precision, batch_tokens=options.batch_tokens, device=options.device
        )
        _rate(
            options,
            f"transformers, {precision}, bulk: answers/s",
            len(prompts),
            functools.partial(own.generate, prompts, max_new_tokens=ANSWER_TOKENS),
        )
        engine = ContinuousGenerator(own, max_running=options.clients)
        _rate(options, f"... {options.clients} at once: answers/s", len(prompts), functools.partial(at_once, engine))
        engine.close(0)
        del own, engine
    given = settings.using("generator.engine=vllm").generator
    try:
        other = VllmGenerator(directory, given, max_running=options.clients, device=options.device)
    except GeneratorError as error:
        print(f"vllm: not measured: {error}")
        return
    _rate(
        options,
        f"vllm, {given.precision}, bulk: answers/s",
        len(prompts),
        lambda: other.generate(prompts, max_new_tokens=ANSWER_TOKENS),
    )
    _rate(options, f"... {options.clients} at once: answers/s", len(prompts), lambda: at_once(other))
    other.close(0)


def _train(options: argparse.Namespace, settings: Config) -> None:
    """Steps of one pass of `training.micro_batch_tokens`, and the memory that they take beside the plan."""
    directory = weights.weights_of(weights.resolve(settings.generator.model))
    for changes in ([], ["training.gradient_checkpointing=true"], ["training.lora_rank=16"]):
        tried = settings.using("training.max_tokens=1024", "training.micro_batch_tokens=8192", *changes)
        if options.device == "cpu":
            tried = tried.using("training.micro_batch_tokens=1024", "training.precision=float32")
        training = tried.training
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        objective = trainable.load_objective(tried, directory, {}).to(options.device)
        optimizer = optimization.make_optimizer(objective, training)
        dtype = hardware.resolve_precision(training.precision, options.device)
        piece = _piece(training.micro_batch_tokens // training.max_tokens, training.max_tokens)
        one_pass = _OnePass(piece)

        def step(
            objective: torch.nn.Module = objective,
            optimizer: torch.optim.Optimizer = optimizer,
            one_pass: _OnePass = one_pass,
            dtype: torch.dtype = dtype,
        ) -> None:
            optimization.take_step(
                objective, one_pass, [], 1.0, optimizer, 1.0, lambda: optimization.autocast(options.device, dtype)
            )

        name = "training, " + (changes[0].removeprefix("training.") if changes else "all weights")
        _rate(options, f"{name}: tokens/s", training.micro_batch_tokens, step)
        planned = memory.plan(tried, directory, ANSWER_TOKENS, options.device).device_bytes
        if options.device == "cuda":
            taken = torch.cuda.max_memory_allocated() - before
            _row("... memory: GiB, planned / taken", f"{taken / 2**30:.2f}, {planned / taken:.2f}")
        del objective, optimizer, step


class _OnePass:
    """An objective whose only piece is given."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece

    def pieces(self, rows: Sequence[object]) -> Iterator[Piece]:
        """The piece."""
        del rows
        return iter([self._piece])

    def weight(self, rows: Sequence[object]) -> float:
        """One."""
        del rows
        return 1.0

    def validate(self, rows: Sequence[object]) -> dict[str, float]:
        """Nothing."""
        del rows
        return {}


def _piece(num_rows: int, length: int) -> Piece:
    prompts = [[5 + row] * (length - ANSWER_TOKENS + 1) for row in range(num_rows)]
    rows = [[row] for row in range(num_rows)]
    return collate(prompts, [[3] * ANSWER_TOKENS for _ in rows], rows, 0)


def _compare(settings: Config, passages: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Results on the GPU beside those on the CPU, in float32."""
    encoder = settings.using("encoder.precision=float32").encoder
    one, other = (load_encoder(encoder, device).encode_passages(passages) for device in ("cpu", "cuda"))
    _row("vectors: smallest cosine to the CPU's", f"{np.einsum('ij,ij->i', one, other).min():.7f}")
    directory = weights.resolve(settings.generator.model).directory
    assert directory is not None
    found = {}
    for device in ("cpu", "cuda"):
        made = TransformersGenerator(directory, precision="float32", batch_tokens=32768, device=device)
        texts = [each.text for each in made.generate(prompts, max_new_tokens=ANSWER_TOKENS)]
        likelihoods = [
            value for value, _ in made.log_likelihood(prompts, ["It says that the sky is blue."] * len(prompts))
        ]
        found[device] = (texts, np.array(likelihoods))
    (texts, values), (others, other_values) = found["cpu"], found["cuda"]
    _row("log likelihoods: largest relative difference", f"{np.abs(other_values / values - 1).max():.1e}")
    same = sum(a == b for a, b in zip(texts, others, strict=True))
    _row("greedy answers equal to the CPU's", f"{same} of {len(texts)}")


def _rate(options: argparse.Namespace, name: str, count: int, work: Callable[[], object]) -> None:
    """Time the work in rounds and print how much of it was done per second."""
    rates = []
    with _Busy(options.device) as busy:
        for number in range(options.rounds + 1):
            started = time.perf_counter()
            work()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if number:  # the first one warms up
                rates.append(count / (time.perf_counter() - started))
            else:
                busy.samples.clear()
    _row(name, f"{statistics.median(rates):,.1f} [{min(rates):,.1f}, {max(rates):,.1f}]", busy.share())


def _row(name: str, figure: str, busy: str = "") -> None:
    print(f"{name:52}{figure:>28}{busy:>7}", flush=True)


class _Busy:
    """Asks `nvidia-smi` again and again for which share of the time kernels ran on the GPU."""

    def __init__(self, device: str) -> None:
        self.samples: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True) if device == "cuda" else None

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def share(self) -> str:
        """The mean of the samples, if there are any."""
        return f"{statistics.mean(self.samples):.0f} %" if self.samples else "-"

    def _sample(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
        while not self._ended.wait(SAMPLE_SECONDS):
            try:
                said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
            except (OSError, subprocess.SubprocessError):
                return
            self.samples.append(int(said.strip() or 0))


if __name__ == "__main__":
    main()
