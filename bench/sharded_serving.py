"""Measures what it costs to divide the endpoint's index among shards: the time of a request, and whether hits are equal.

    python -m bench.sharded_serving --data SQUAD.json [--shards 3] [--questions 100] [--turns 5] [--set section.field=value]

Two endpoints run side by side, one with the whole index and one with shards, each with a Ray of its own. One client asks both in
turns, so that a machine whose speed changes slows both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx

from bench.serve import StubGenerator
from ragtune_ray import config
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.serving.serve import running

WARMING = 10
"""Requests to each endpoint before the first one that counts."""


def main() -> None:
    """Measure and print, or run one endpoint."""
    options = _options()
    if options.serve:
        _serve(config.Config.model_validate_json(options.serve))
        return
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder, contextlib.ExitStack() as endpoints:
        settings = config.Config().using(
            f"workspace={folder}/workspace",
            f"corpus.path={options.data}",
            f"index.segment_passages={options.segment_passages}",
            "serve.port=0",
            "serve.retriever.num_cpus=0.1",
            "serve.generator.num_cpus=0.1",
            *options.set,
        )
        build_index(settings)
        whole, sharded = (
            endpoints.enter_context(_endpoint(settings.using(f"serve.retriever.shards={number}")))
            for number in (1, options.shards)
        )
        _compare(options, whole, sharded)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="SQuAD JSON")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--segment-passages", type=int, default=100)
    parser.add_argument("--questions", type=int, default=100, help="per turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="section.field=value")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.data and not options.serve:
        parser.error(
            "--data is missing: give a SQuAD JSON file, whose contexts are served and whose questions are asked"
        )
    return options


def _compare(options: argparse.Namespace, whole: httpx.Client, sharded: httpx.Client) -> None:
    data = json.loads(options.data.read_text(encoding="utf-8"))["data"]
    questions = [qa["question"] for article in data for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    step = max(1, len(questions) // (options.questions * options.turns + WARMING))
    asked = iter(questions[::step])
    for _ in range(WARMING):
        question = next(asked)
        _ask(whole, question), _ask(sharded, question)
    differences, num_asked, num_equal = [], 0, 0
    for turn in range(1, options.turns + 1):
        seconds: dict[str, list[float]] = {"whole": [], "shards": []}
        for question in [next(asked) for _ in range(options.questions)]:
            one, expected = _ask(whole, question)
            other, found = _ask(sharded, question)
            seconds["whole"].append(one)
            seconds["shards"].append(other)
            num_asked += 1
            num_equal += found == expected
        middles = {name: statistics.median(each) * 1000 for name, each in seconds.items()}
        differences.append(middles["shards"] - middles["whole"])
        print(
            f"turn {turn}: p50 {middles['whole']:.1f} ms whole, {middles['shards']:.1f} ms in {options.shards} shards",
            flush=True,
        )
    print(
        f"p50 in {options.shards} shards - whole: {statistics.median(differences):+.1f} ms "
        f"({min(differences):+.1f} to {max(differences):+.1f})   <= +15 ms"
    )
    print(f"equal ids and scores: {num_equal} of {num_asked}   all")


def _ask(client: httpx.Client, question: str) -> tuple[float, list[tuple[str, float]]]:
    started = time.perf_counter()
    reply = client.post("/v1/retrieve", json={"query": question, "top_k": 5})
    seconds = time.perf_counter() - started
    reply.raise_for_status()
    return seconds, [(source["id"], source["score"]) for source in reply.json()["data"]]


@contextlib.contextmanager
def _endpoint(settings: config.Config) -> Iterator[httpx.Client]:
    """Run an endpoint in a process of its own, with a generator that does nothing, and yield a client of it."""
    command = [sys.executable, "-m", "bench.sharded_serving", "--serve", settings.model_dump_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address: Any = process.stdout.readline().strip()
        try:
            with httpx.Client(base_url=address, timeout=60) as client:
                yield client
        finally:
            process.stdin.close()


def _serve(settings: config.Config) -> None:
    """Serve, after a line with the address, until stdin ends."""
    with running(settings, StubGenerator) as address:
        print(address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
