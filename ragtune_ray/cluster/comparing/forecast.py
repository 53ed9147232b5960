"""Forecasts minutes and memory of the steps of a comparison, without loading a model.

A step that ran before in this workspace is forecast from its rate. For any other, the number of weights, the number of tokens and
the speed of a matrix product on this machine give an upper estimate, since answers may end early and passages may be short.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ragtune_ray import RagtuneError, config
from ragtune_ray.cluster import runs
from ragtune_ray.cluster.comparing import variants
from ragtune_ray.cluster.runs import generator_fingerprint
from ragtune_ray.models import arms, weights
from ragtune_ray.storage import artifacts, filesystem

# Share of a float32 matrix product's speed, and bytes per weight, measured with SmolLM2-135M on two AMX cores: 3,400 tokens/s of
# prefill, 143 of decoding in batches of 16 and 655 of training in bfloat16, where the product reaches 228 GFLOP/s.
_PREFILL = {"bfloat16": 4.0, "float32": 0.8}
_DECODING = 0.17
_TRAINING = {"bfloat16": 2.3, "float32": 1.1}
ANSWERING_STARTS, TRAINING_STARTS = 3.0, 15.0
"""Seconds before the first answer or step, in which workers start and load the model, measured on the same machine."""
_TRAINED_BYTES = 16
"""A weight, its gradient and two moments in float32."""
_ACTIVATION_BYTES = 34
"""Per token, layer and hidden dimension, kept for the backward pass (Korthikanti et al. 2023, 16 bit)."""
_TEMPLATE_TOKENS = 32
_PRODUCT = 1024
_TIMED_PRODUCT = f"""
import time, numpy
one = numpy.ones(({_PRODUCT}, {_PRODUCT}), dtype=numpy.float32)
seconds = []
for _ in range(6):
    started = time.process_time()
    one @ one
    seconds.append(time.process_time() - started)
print(max(min(seconds), 1e-9))
"""


CHOOSE, DECIDE, MEASURE = "choose settings of retrieval", "answer until the verdict stands", "measure and report"
"""Stages of a comparison beside those of `train_stage`, `answer_stage` and `gold_stage`."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step will take."""

    name: str
    seconds: float | None
    """None: unknown."""
    memory_bytes: int | None
    source: str
    """What the forecast rests on."""

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        return {"name": self.name, "seconds": self.seconds, "memory_bytes": self.memory_bytes, "source": self.source}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of tokens and questions that decide the work."""

    num_questions: int
    """Asked of every arm."""
    num_train: int
    question_tokens: float
    """Mean length of a question."""
    answer_tokens: float
    """Mean length of a gold answer."""
    reads_gold: bool = False
    """Generators also answer from the passage that contains the answer."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a causal language model, from its files."""

    num_weights: int
    num_layers: int
    hidden: int
    cache_width: int
    """Keys and values of one token and layer, in numbers."""
    vocabulary: int
    context_tokens: int | None


def read_geometry(directory: Path) -> Geometry:
    """Read the shape of a model from config.json and the headers of its safetensors; no weights are read.

    Raises:
        ModelError: a file is damaged.
    """
    found: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    found = {**found, **(found.get("text_config") or {})}
    hidden, heads = int(found.get("hidden_size") or 0), int(found.get("num_attention_heads") or 1)
    head = int(found.get("head_dim") or hidden // heads)
    return Geometry(
        num_weights=sum(_num_weights(path) for path in directory.glob("*.safetensors")),
        num_layers=int(found.get("num_hidden_layers") or 0),
        hidden=hidden,
        cache_width=2 * head * int(found.get("num_key_value_heads") or heads),
        vocabulary=int(found.get("vocab_size") or 0),
        context_tokens=int(found["max_position_embeddings"]) if found.get("max_position_embeddings") else None,
    )


def _num_weights(path: Path) -> int:
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (struct.error, ValueError) as error:
        raise weights.ModelError(
            f"model {path.parent}: {path.name} is damaged ({error}); copy or download the model again"
        ) from error
    return sum(int(np.prod(each["shape"])) for name, each in header.items() if name != "__metadata__")


def product_flops() -> float:
    """Floating-point operations per second of a float32 matrix product on all cores.

    A separate process with one thread is timed, in processor time: threads that wait for a busy core would count as work.
    """
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    timed = subprocess.run(
        [sys.executable, "-P", "-c", _TIMED_PRODUCT],
        env={**os.environ, **one_thread},
        capture_output=True,
        text=True,
        check=True,
    )
    return 2 * _PRODUCT**3 / float(timed.stdout) * len(os.sched_getaffinity(0))


Stages = Callable[[config.Config, Sequence[config.Arm], Sizes], list[Step]]
"""Forecasts the stages of a job from its config, the arms that must be trained first, and the sizes."""


def train_stage(arm: config.Arm) -> str:
    """The name of the stage that trains an arm."""
    return f"train {arm}"


def answer_stage(arm: config.Arm) -> str:
    """The name of the stage that asks an arm all questions."""
    return f"answer {arm}"


def gold_stage(arm: config.Arm) -> str:
    """The name of the stage in which an arm answers from gold passages."""
    return f"answer {arm} from gold passages"


def comparison(settings: config.Config, untrained: Sequence[config.Arm], sizes: Sizes) -> list[Step]:
    """All stages of a comparison, in the order in which they run.

    Args:
        settings: of the comparison.
        untrained: arms that must be trained first.
        sizes: of its questions.
    """
    flops, compared = product_flops(), settings.compare.arms
    steps = [Step(CHOOSE, None, None, "depends on the variants")] if variants.are_searched(settings) else []
    steps += [training(settings, arm, sizes, flops) for arm in untrained]
    answers = [answering(settings, arm, sizes, flops) for arm in compared]
    steps += answers if settings.compare.until == "all" else [_asked_in_batches(answers)]
    one_passage = settings.with_values({"retrieval.top_k": 1})
    for arm in filter(config.retrieves, compared if sizes.reads_gold else ()):
        step = answering(one_passage, arm, sizes, flops)
        steps.append(dataclasses.replace(step, name=gold_stage(arm)))
    share = min(settings.compare.latency_queries, sizes.num_questions) / max(1, sizes.num_questions)
    return [*steps, Step(MEASURE, _total(answers, share), None, "one question at a time")]


def _asked_in_batches(answers: Sequence[Step]) -> Step:
    memory = max((step.memory_bytes or 0 for step in answers), default=0)
    return Step(DECIDE, _total(answers), memory or None, "at most, if every question is asked of every arm")


def _total(steps: Sequence[Step], share: float = 1.0) -> float | None:
    """The time of all steps, times a share; None if that of one is unknown."""
    known = [step.seconds for step in steps if step.seconds is not None]
    return sum(known) * share if len(known) == len(steps) else None


def answering(settings: config.Config, arm: config.Arm, sizes: Sizes, flops: float) -> Step:
    """The step that asks one arm all questions."""
    name = answer_stage(arm)
    try:
        given = arms.with_tuned_models(settings.with_values({"answer.arm": arm}))
    except weights.ModelError:  # not trained yet
        given = settings.with_values({"answer.arm": config.without_name(arm) if config.hosted_name(arm) else arm})
    if rate := _measured_rate(settings, given, arm):
        return Step(name, sizes.num_questions / rate, None, "the rate of an earlier run")
    if given.generator.engine == "openai":
        return Step(name, None, None, "a server's speed is not known")
    geometry = _geometry(given.generator.model)
    if geometry is None:
        return Step(name, None, None, "the model cannot be read")
    precision = _precision(given.generator.precision)
    width = 2 if precision == "bfloat16" else 4
    memory = width * (geometry.num_weights + given.generator.batch_tokens * geometry.num_layers * geometry.cache_width)
    if given.cluster.gpus_per_worker:
        return Step(name, None, memory, "the speed of GPUs is known after a first run")
    read = prompt_tokens(given, arm, sizes)
    written = given.generator.max_new_tokens
    if config.is_tuned(arm):
        written = min(written, round(sizes.answer_tokens) + 8)
    products = 2.0 * geometry.num_weights
    seconds = products * (read / (_PREFILL[precision] * flops) + written / (_DECODING * flops))
    return Step(name, ANSWERING_STARTS + seconds * sizes.num_questions, memory, "the speed of this machine")


def training(settings: config.Config, arm: config.Arm, sizes: Sizes, flops: float) -> Step:
    """The step that trains the generator of `ft` or `rag+ft`; a mode is trained in rounds of unknown number and size."""
    name, rule = train_stage(arm), settings.training
    if config.is_mode(arm):
        return Step(name, None, None, "rounds depend on what fails")
    geometry = _geometry(settings.generator.model) if settings.generator.engine != "openai" else None
    if geometry is None:
        return Step(name, None, None, "the model cannot be read")
    trained = geometry.num_weights // 20 if rule.lora_rank else geometry.num_weights
    kept = rule.micro_batch_tokens * geometry.num_layers * geometry.hidden * _ACTIVATION_BYTES
    logits = 2 * 4 * rule.micro_batch_tokens * geometry.vocabulary
    memory = 4 * (geometry.num_weights - trained) + _TRAINED_BYTES * trained + kept + logits
    if settings.cluster.gpus_per_worker:
        return Step(name, None, memory, "the speed of GPUs is known after a first run")
    examples = sizes.num_train * rule.epochs
    if rule.max_steps:
        examples = min(examples, rule.max_steps * rule.batch_examples)
    tokens = min(rule.max_tokens, prompt_tokens(settings, arm, sizes) + sizes.answer_tokens)
    seconds = 6.0 * geometry.num_weights * examples * tokens / (_TRAINING[_precision(rule.precision)] * flops)
    return Step(name, TRAINING_STARTS + seconds, memory, "the speed of this machine")


def prompt_tokens(settings: config.Config, arm: config.Arm, sizes: Sizes) -> float:
    """Upper estimate of the mean length of a prompt: every passage counts as `chunking.size_tokens`."""
    shown = settings.retrieval.top_k * settings.chunking.size_tokens if config.retrieves(arm) else 0
    return min(float(settings.prompt.max_tokens), sizes.question_tokens + _TEMPLATE_TOKENS + shown)


def _measured_rate(settings: config.Config, given: config.Config, arm: config.Arm) -> float:
    """Answers per second of the newest run of this arm with the same generator; 0 if there is none."""
    folder = filesystem.join(settings.workspace, "runs")
    found: list[tuple[float, float]] = []
    for name in filesystem.list_names(folder):
        if name.startswith(f"answer-{arm}-"):
            try:
                manifest: Mapping[str, Any] = runs.read_manifest(filesystem.join(folder, name))
                asked = manifest["config"]["answer"]
                if asked["gold_passage"] or asked["closed_book"]:
                    continue
                if manifest["model"] == generator_fingerprint(given.generator):
                    url = filesystem.join(folder, name, "manifest.json")
                    found.append((filesystem.last_change(url) or 0.0, float(manifest["queries_per_second"])))
            except (artifacts.ArtifactError, weights.ModelError, KeyError):
                continue
    return max(found)[1] if found else 0.0


def _geometry(model: str) -> Geometry | None:
    try:
        directory = weights.resolve(model).directory
        return read_geometry(directory) if directory else None
    except (RagtuneError, OSError, ValueError, KeyError):
        return None


def _precision(named: str) -> str:
    """The number format, by the flags of the processor where the config leaves it to the hardware."""
    if named != "auto":
        return named if named in _PREFILL else "float32"
    listed = Path("/proc/cpuinfo")
    flags = listed.read_text(encoding="utf-8", errors="replace") if listed.exists() else ""
    return "bfloat16" if "amx_bf16" in flags or "avx512_bf16" in flags else "float32"
