"""Compares the bulk answers per second of `ragtune answer` with a plain transformers loop on the same prompts.

    python -m bench.answering --data SQUAD.json --queries 200

The job retrieves five passages for each question and generates with one single-threaded actor per core. Its rate covers
the time from the start of the first unit to the end of the last, so it excludes starting Ray and loading the model. The
peer is the loop that most people write: float32, `model.generate`, one prompt at a time, all threads.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ragtune_ray import schema
from ragtune_ray.answering.prompts import build_prompts
from ragtune_ray.cluster.answering.answer import answer
from ragtune_ray.cluster.answering.evaluate import read_answers
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.config import Config
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.index.snapshot import open_index
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts


def main() -> None:
    """Measure both and print answers per second and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/squad/squad-v1.1-24articles.json")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument(
        "--unit-queries", type=int, default=20, help="small, so that all workers finish at about the same time"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        settings = Config().using(
            f"corpus.path={options.data}",
            f"queries.path={options.data}",
            f"queries.limit={options.queries}",
            f"workspace={folder}",
            "generator.max_new_tokens=24",
            f"answer.unit_queries={options.unit_queries}",
        )
        build_index(settings)
        run = str(answer(settings))
        rows = read_answers(run)
        rate = artifacts.read_manifest(run)["queries_per_second"]
        lengths = [row.prompt_tokens for row in rows]
        print(
            f"{len(rows)} prompts of {sum(lengths) / len(lengths):.0f} tokens, 24 new tokens, {torch.get_num_threads()} cores"
        )
        print(f"{'ragtune answer (Ray, one actor per core)':42} {rate:6.2f} answers/s", flush=True)
        peer = _peer(settings, rows, folder)
        print(f"{'plain transformers loop, float32, batch 1':42} {peer:6.2f} answers/s")
        print(f"ratio: {rate / peer:.2f}")


def _peer(settings: Config, rows: list[schema.Answer], workspace: str) -> float:
    """Answers per second of the plain loop on the prompts of the job."""
    directory = weights.resolve(settings.generator.model).directory
    assert directory is not None
    ours = TransformersGenerator(directory, precision="float32", batch_tokens=1024)
    index = open_index(workspace)
    by_id = {passage.passage_id: passage for passage in schema.from_table(index.passages, schema.Passage)}
    prompts = build_prompts(
        [row.query for row in rows],
        [[by_id[passage_id] for passage_id in row.passage_ids] for row in rows],
        system=settings.prompt.system,
        max_tokens=settings.prompt.max_tokens,
        count_tokens=ours.count_tokens,
        render=ours.render,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    started = time.perf_counter()
    for prompt in prompts:
        batch = tokenizer(ours.render(prompt.messages), return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=24, do_sample=False)
        tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return len(prompts) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
