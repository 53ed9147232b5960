"""Measures what bulk answering costs besides generation: searches, prompts, and the driver, with a generator that costs nothing.

    python -m bench.bulk_answering --data SQUAD.json [SQUAD.json ...] --queries 10000 --passages 6000

The index contains the contexts of the files and, up to `--passages`, texts of sentences drawn from them. The stub counts tokens
and renders prompts like the real generator, and answers each prompt at once with the beginning of its first passage. `wall` is
the time of `answer` in an open session, including the start of its actors. With `--shard-bytes 1` each segment is a shard.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from ragtune_ray.cluster import actors, session, stages
from ragtune_ray.cluster.answering import answer as answering
from ragtune_ray.cluster.answering.workers import GenerateUnit
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.config import Config
from ragtune_ray.generation import generator as generators
from ragtune_ray.generation.chat import ChatTokenizer
from ragtune_ray.generation.interface import Completion, Prompt
from ragtune_ray.models import loading, weights
from ragtune_ray.storage import artifacts, filesystem

EMPTY_UNITS = 2000


class StubGenerator:
    """The tokenizer and the chat template of a generator, without its model."""

    def __init__(self, directory: Path) -> None:
        self._chat = ChatTokenizer(loading.load_tokenizer(directory))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text."""
        return [len(ids) for ids in self._chat.encode(texts)]

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Messages in the model's chat template."""
        return self._chat.render(messages)

    def generate(self, prompts: Sequence[Prompt], **_: Any) -> list[Completion]:
        """The beginning of the first passage of each prompt."""
        return [
            Completion(" ".join(prompt.passages[0].text.split()[:6]), prompt.num_tokens, 6, 0.0, "stop", "")
            for prompt in prompts
        ]


class StubUnit(GenerateUnit):
    """Answers units of queries with the stub."""

    def __init__(self, settings: Config, *arguments: Any, **options: Any) -> None:
        directory = weights.resolve(settings.generator.model).directory
        assert directory is not None
        opened = generators.OpenedGenerator(typing.cast(Any, StubGenerator(directory)), "")
        with mock.patch.object(generators, "open_generator", return_value=opened):
            super().__init__(settings, *arguments, **options)


class EmptyUnit(stages.UnitWorker):
    """Does nothing, so that only the driver's work for a unit remains."""

    def __init__(self, settings: Config) -> None:
        self.settings = settings

    def run(self, unit: dict[str, Any]) -> str:
        """Return the unit."""
        return json.dumps(unit)


def main() -> None:
    """Build the index if it is missing, answer all questions, and print where the time went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    squad = "../shared/data/squad/squad-"
    parser.add_argument("--data", nargs="+", default=[f"{squad}v1.1-24articles.json", f"{squad}v2.0-articles.json"])
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--passages", type=int, default=6000)
    parser.add_argument("--shard-bytes", type=int, default=2**33)
    parser.add_argument(
        "--workspace", help="where the index is kept for the next run; by default a temporary directory"
    )
    parser.add_argument("settings", nargs="*", help="section.field=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as temporary:
        folder = Path(options.workspace or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        _write_texts(folder, options.data, options.passages)
        settings = Config().using(
            f"workspace={folder / 'workspace'}",
            f"corpus.path={folder / 'corpus.jsonl'}",
            f"queries.path={folder / 'queries.jsonl'}",
            f"queries.limit={options.queries}",
            "index.segment_passages=2000",
            f"cluster.shard_bytes={options.shard_bytes}",
            *options.settings,
        )
        build_index(settings)
        filesystem.remove(str(folder / "workspace" / "runs"))
        with session.ray_session(settings.cluster):
            _measure(settings)


def _write_texts(folder: Path, files: Sequence[str], num_passages: int) -> None:
    """The corpus, filled up with texts of drawn sentences, and the questions of all files."""
    articles = [article for file in files for article in json.loads(Path(file).read_text("utf-8"))["data"]]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    contexts = [paragraph["context"] for paragraph in paragraphs]
    questions = [each["question"] for paragraph in paragraphs for each in paragraph["qas"]]
    sentences = [each for text in contexts for each in re.split(r"(?<=[.!?]) ", text)]
    source = random.Random("bulk answering")
    drawn = [" ".join(source.choices(sentences, k=6)) for _ in range(num_passages - len(contexts))]
    corpus = [{"document_id": f"d{number}", "text": text} for number, text in enumerate(contexts + drawn)]
    asked = [{"query_id": f"q{number}", "text": text} for number, text in enumerate(questions)]
    for name, rows in (("corpus.jsonl", corpus), ("queries.jsonl", asked)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _measure(settings: Config) -> None:
    cores = _core_seconds()
    started = time.perf_counter()
    with mock.patch.object(answering, "GenerateUnit", StubUnit):
        manifest = artifacts.read_manifest(str(answering.answer(settings)))
    wall, count, busy = time.perf_counter() - started, manifest["num_answers"], manifest["busy_seconds"]
    cores = _core_seconds() - cores
    print(f"{count:,} questions, {manifest['statuses']}")
    worked = count / manifest["queries_per_second"]
    for name, seconds in (
        ("wall, with the start of actors", wall),
        ("wall, first to last unit of each stage", worked),
        ("searches, summed over the workers", busy["retrieval"]),
        ("prompts and rows, summed likewise", busy["generation"]),
        ("core-seconds, with the start of actors", cores),
    ):
        print(f"{name:40} {seconds:8.1f} s {count / seconds:8.0f} questions/s")
    busy_before, started = time.process_time(), time.perf_counter()
    _run_empty_units(settings)
    wall, busy_seconds = time.perf_counter() - started, time.process_time() - busy_before
    each = [1e3 * seconds / EMPTY_UNITS for seconds in (busy_seconds, wall)]
    print(f"{'driver, per unit that does nothing':40} {each[0]:8.2f} ms of a core, {each[1]:.2f} ms wall")


def _run_empty_units(settings: Config) -> None:
    pool = actors.Pool(
        EmptyUnit, {"settings": settings}, session.workers(0, 0), session.worker_options(settings.cluster)
    )
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        stages.run_stage("empty", folder, [{"unit": number} for number in range(EMPTY_UNITS)], stages.on_actors(pool))


def _core_seconds() -> float:
    """What this process and those that it has started have computed so far."""
    own = psutil.Process()
    each = [own, *own.children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in each if process.is_running())


if __name__ == "__main__":
    main()
