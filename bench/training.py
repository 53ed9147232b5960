"""Compares the training rate of the generator in the bare loop, under Ray Train, and in TRL's SFTTrainer, in one run.

    python -m bench.training --data SQUAD.json --trl-python PYTHON

All three use the same model, examples, batch size and number format (float32 weights, bfloat16 products where the
hardware has them) on all cores. TRL needs an environment of its own: python -m venv X; X/bin/pip install trl, with the
torch and transformers of constraints.txt. Rates are tokens of the examples per second, without padding, over all steps
but the first two, in which memory is still being allocated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from ragtune_ray import config, schema
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.training import feeding
from ragtune_ray.cluster.training.prepare import prepare
from ragtune_ray.cluster.training.train import train
from ragtune_ray.models import hardware, weights
from ragtune_ray.storage import artifacts
from ragtune_ray.training import optimization, trainable

WARM_UP_STEPS = 2


def main() -> None:
    """Measure the loops one after the other and print their rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/squad/squad-v1.1-24articles.json")
    parser.add_argument("--trl-python", default="")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        settings = config.Config().using(
            f"workspace={folder}",
            f"corpus.path={options.data}",
            f"queries.path={options.data}",
            "queries.split_by=folder",
            "encoder.model=hashing-384",
            "retrieval.mode=lexical",
            "retrieval.top_k=2",
            f"training.max_steps={options.steps}",
            "training.batch_examples=8",
            "training.validation_examples=1",
            f"training.evaluate_steps={options.steps}",
            f"training.checkpoint_steps={options.steps}",
        )
        build_index(settings)
        examples = prepare(settings)
        rows = list(schema.from_table(pq.read_table(Path(examples) / "train.parquet"), schema.GeneratorExample))
        plan = feeding.plan(settings, examples)
        # A process of its own returns all its memory before the next loop starts.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            bare = process.submit(_bare, settings, rows, plan).result()
        under_ray = _under_ray(settings)
        print(f"{'loop':24} {'tokens/s':>9}  {'step, s':>8}")
        for name, (rate, seconds) in {"bare": bare, "Ray Train, one worker": under_ray}.items():
            print(f"{name:24} {rate:9.1f}  {seconds:8.2f}")
        print(f"Ray Train / bare: time per step {under_ray[1] / bare[1]:.3f}")
        if options.trl_python:
            trl_rate = _trl(options.trl_python, settings, rows, plan, folder)
            print(f"{'TRL SFTTrainer':24} {trl_rate:9.1f}")
            print(f"Ray Train / TRL SFTTrainer: tokens/s {under_ray[0] / trl_rate:.3f}")


def _num_tokens(rows: list[schema.GeneratorExample]) -> int:
    return sum(row.num_tokens for row in rows)


def _bare(settings: config.Config, rows: list[schema.GeneratorExample], plan: list[np.ndarray]) -> tuple[float, float]:
    """Return tokens per second and mean seconds per step of `take_step`; runs in a process of its own."""
    hardware.keep_freed_memory()
    directory = weights.resolve(settings.generator.model).directory
    assert directory is not None
    objective = trainable.load_objective(settings, directory, {})
    optimizer = optimization.make_optimizer(objective, settings.training)
    dtype = hardware.resolve_precision("auto", "cpu")
    spent, tokens = [], []
    for chosen in plan:
        step = [rows[place] for place in chosen]
        began = time.perf_counter()
        optimization.take_step(
            objective,
            objective,
            step,
            objective.weight(step),
            optimizer,
            1.0,
            lambda: optimization.autocast("cpu", dtype),
        )
        spent.append(time.perf_counter() - began)
        tokens.append(_num_tokens(step))
    return sum(tokens[WARM_UP_STEPS:]) / sum(spent[WARM_UP_STEPS:]), statistics.mean(spent[WARM_UP_STEPS:])


def _under_ray(settings: config.Config) -> tuple[float, float]:
    """Return the same figures for `ragtune train`, including the time it waits for examples."""
    url = train(settings).path
    lines = (Path(artifacts.open_artifact(url).path) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "seconds" in row][WARM_UP_STEPS:]
    seconds = [row["seconds"] for row in steps]
    return sum(row["tokens_per_second"] * row["seconds"] for row in steps) / sum(seconds), statistics.mean(seconds)


def _trl(
    python: str, settings: config.Config, rows: list[schema.GeneratorExample], plan: list[np.ndarray], folder: str
) -> float:
    """Return tokens per second of TRL on the same batches."""
    ordered = [rows[place] for chosen in plan for place in chosen]
    path = Path(folder) / "trl.json"
    path.write_text(
        json.dumps(
            {
                "model": str(weights.resolve(settings.generator.model).directory),
                "rows": [{"prompt": row.prompt, "completion": row.answer} for row in ordered],
                "tokens": [_num_tokens([rows[place] for place in chosen]) for chosen in plan],
                "batch": settings.training.batch_examples,
                "learning_rate": optimization.peak_learning_rate(settings.training),
                "max_length": settings.training.max_tokens,
                "bfloat16": hardware.resolve_precision("auto", "cpu") == torch.bfloat16,
                "output": folder,
                "warm_up_steps": WARM_UP_STEPS,
            }
        ),
        encoding="utf-8",
    )
    script = Path(__file__).with_name("training_trl.py")
    result = subprocess.run([python, str(script), str(path)], capture_output=True, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1])["tokens_per_second"])


if __name__ == "__main__":
    main()
