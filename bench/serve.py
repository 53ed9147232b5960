"""Measures the endpoint under load: what continuous batching gains, what serving costs, and what faults do to answers.

    python -m bench.serve --data SQUAD.json [--model DIRECTORY] [--seconds 30] [--only overload,kill]

Each part starts the endpoint on a local Ray and loads it from a second process over loopback. A part with a number of
clients is a closed loop; the others are open loops, whose requests leave on schedule, even if earlier ones are late.
Each figure is printed with the bar that it has to reach.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from starlette.requests import Request

from ragtune_ray import config
from ragtune_ray.cluster import session
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.indexing.update import upsert_documents
from ragtune_ray.cluster.serving.serve import running
from ragtune_ray.index import versions
from ragtune_ray.models import weights
from ragtune_ray.serving.backend import Failed, Finished, Job, Shown
from ragtune_ray.storage import artifacts

CHAT = "/v1/chat/completions"
# The endpoint refuses to run behind HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1) without an API key, so every run has one.
KEY = "a-key-of-the-benchmark"
HEADERS = {"Authorization": f"Bearer {KEY}"}
TURNS = 3


class StubGenerator:
    """Replaces the generator and answers at once with the start of the first passage."""

    def __init__(self, settings: config.Config) -> None:
        del settings

    async def complete(self, job: Job, _: float) -> tuple[Shown, Finished] | Failed:
        """Return the first 20 characters of the first passage."""
        from ragtune_ray import schema

        text = job.passages[0].text[:20] if job.passages else ""
        ids = tuple(passage.passage_id for passage in job.passages)
        row: Any = (
            "ask",
            job.question,
            text,
            (),
            ids,
            job.scores,
            False,
            0.0,
            1,
            1,
            "ok",
            "",
            job.index_version,
            "stub",
        )
        return Shown(job.passages, job.scores, 1), Finished(schema.Answer(*row), text, "stop", 0.0, 0.0)

    async def status(self) -> dict[str, Any]:
        """Report an idle generator."""
        return {"model": "stub", "refused": None, "running": 0, "waiting": 0}


def main() -> None:
    """Run the chosen parts and print their rows."""
    options = _options()
    if options.load:
        print(json.dumps(asyncio.run(_load(json.loads(options.load)))))
        return
    parts: dict[str, Callable[[argparse.Namespace, config.Config, list[str]], None]] = {
        "batching": _batching,
        "stub": _stub,
        "empty": _empty,
        "overload": _overload,
        "oversized": _oversized,
        "kill": _kill,
        "swap": _swap,
        "models": _models,
        "leave": _leave,
    }
    os.environ["RAGTUNE_API_KEYS"] = KEY
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        settings = _settings(options, folder)
        build_index(settings)
        questions = _questions(options.data)
        for name in options.only or parts:
            parts[name](options, settings, questions)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="SQuAD JSON")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--encoder", default="all-MiniLM-L6-v2")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each measurement")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="parts, separated by commas")
    parser.add_argument("--set", action="append", default=[], help="section.field=value")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.data and not options.load:
        parser.error(
            "--data is missing: give a SQuAD JSON file, whose contexts are served and whose questions are asked"
        )
    return options


def _settings(options: argparse.Namespace, folder: str) -> config.Config:
    return config.Config().using(
        f"workspace={folder}/workspace",
        f"corpus.path={options.data}",
        f"encoder.model={options.encoder}",
        f"generator.model={options.model}",
        f"generator.max_new_tokens={options.new_tokens}",
        "retrieval.top_k=2",
        "serve.port=0",
        *options.set,
    )


def _questions(path: Path) -> list[str]:
    data = json.loads(path.read_text(encoding="utf-8"))["data"]
    found = [qa["question"] for article in data for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    random.Random(0).shuffle(found)
    return found[:1000]


def _row(what: str, value: str, bar: str = "") -> None:
    print(f"{what:<74} {value:>26}   {bar}", flush=True)


# The load generator, which runs in a process of its own.


async def _load(plan: dict[str, Any]) -> dict[str, Any]:
    """Send requests as the plan says; return when each left (seconds from the start), its duration, status and facts."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    results: list[dict[str, Any]] = []
    async with aiohttp.ClientSession(plan["address"], headers=HEADERS, connector=connector, timeout=timeout) as session:
        started = time.perf_counter()

        async def one(number: int) -> None:
            left = time.perf_counter()
            body = _body(plan, number)
            fact: dict[str, Any] = {"left": left - started}
            for attempt in range(1 + int(plan.get("retries", 0))):
                try:
                    async with session.post(plan["path"], json=body) as reply:
                        text = await reply.read()
                        fact |= {"status": reply.status, "retry_after": reply.headers.get("Retry-After")}
                        if reply.status == 200:
                            fact |= _facts(plan, text)
                            break
                except (aiohttp.ClientError, TimeoutError) as error:
                    fact |= {"status": 0, "error": type(error).__name__}
                await asyncio.sleep(0.5 * 2**attempt if plan.get("retries") else 0)
            results.append(fact | {"seconds": time.perf_counter() - left})

        if "rate" in plan:
            await _open_loop(plan, one, started)
        else:
            await _closed_loop(plan, one, started)
    return {"wall": time.perf_counter() - started, "results": results}


async def _open_loop(plan: dict[str, Any], one: Callable[[int], Any], started: float) -> None:
    tasks = []
    for number in range(int(plan["rate"] * plan["seconds"])):
        await asyncio.sleep(max(0.0, started + number / plan["rate"] - time.perf_counter()))
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)


async def _closed_loop(plan: dict[str, Any], one: Callable[[int], Any], started: float) -> None:
    numbers = iter(range(10**9))

    async def client() -> None:
        while time.perf_counter() - started < plan["seconds"]:
            await one(next(numbers))

    await asyncio.gather(*(client() for _ in range(plan["clients"])))


def _body(plan: dict[str, Any], number: int) -> dict[str, Any]:
    question = plan["questions"][number % len(plan["questions"])]
    if plan.get("oversized"):
        system = [{"role": "system", "content": question.ljust(8000, "x")}] * 30
        return {"messages": [*system, {"role": "user", "content": question}]}
    if plan["path"] == CHAT:
        return {"messages": [{"role": "user", "content": question}], "stream": bool(plan.get("stream"))}
    return {"query": question} if plan["path"] == "/v1/retrieve" else {"question": question}


def _facts(plan: dict[str, Any], text: bytes) -> dict[str, Any]:
    if plan.get("stream"):
        return {"complete": text.rstrip().endswith(b"[DONE]"), "error_event": b'"error"' in text}
    value = json.loads(text)
    return {
        "version": value.get("index_version"),
        "model": value.get("generator"),
        "generation": value.get("timings", {}).get("generation_seconds"),
        "tokens": value.get("usage", {}).get("completion_tokens"),
    }


@contextlib.contextmanager
def _loading(**plan: Any) -> Iterator[Callable[[], dict[str, Any]]]:
    """Run a load while the block runs; the yielded function waits for its results."""
    command = [sys.executable, "-m", "bench.serve", "--load", json.dumps(plan)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def result() -> dict[str, Any]:
            output, _ = process.communicate()
            return dict(json.loads(output))

        yield result


def _loaded(**plan: Any) -> dict[str, Any]:
    with _loading(**plan) as result:
        return result()


def _percentile(values: Sequence[float], share: float) -> float:
    ordered: list[float] = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _good(load: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in load["results"] if each["status"] == 200]


def _rate(load: dict[str, Any]) -> float:
    return len(_good(load)) / float(load["wall"])


def _rate_within(load: dict[str, Any], start: float, end: float) -> float:
    """Return answers per second between two times; an answer counts by the share of its duration between them."""
    shares: list[float] = [
        max(0.0, min(end, each["left"] + each["seconds"]) - max(start, each["left"])) / each["seconds"]
        for each in _good(load)
    ]
    return sum(shares) / (end - start)


# The parts of the benchmark.


def _batching(options: argparse.Namespace, settings: config.Config, questions: list[str]) -> None:
    with running(settings) as address:
        plan = {"address": address, "path": CHAT, "questions": questions, "seconds": options.seconds}
        _loaded(**plan | {"clients": 2, "seconds": 3})
        one, many = _loaded(**plan, clients=1), _loaded(**plan, clients=16)
        overhead = [(each["seconds"] - each["generation"]) * 1000 for each in _good(one)]
    _row("answers/s at concurrency 1", f"{_rate(one):.2f}")
    _row("answers/s at concurrency 16", f"{_rate(many):.2f}")
    _row("concurrency 16 / concurrency 1", f"{_rate(many) / _rate(one):.2f}", ">= 3")
    _row(
        "HTTP + Serve + retrieval over generation, p50 at concurrency 1",
        f"{statistics.median(overhead):.1f} ms",
        "< 40 ms",
    )
    with _peer(settings) as address:
        peer = _loaded(**plan | {"address": address, "path": "/ask", "clients": 16})
    _row("answers/s of FastAPI + model.generate behind one lock, concurrency 16", f"{_rate(peer):.2f}")
    _row("ours / FastAPI behind one lock", f"{_rate(many) / _rate(peer):.2f}", ">= 3")


def _stub(options: argparse.Namespace, settings: config.Config, questions: list[str]) -> None:
    with running(settings.using("serve.generator.num_cpus=0"), StubGenerator) as address:
        best = _highest_rate("stub generator", address, questions, options.seconds)
    _row("stub generator: requests/s at p99 < 100 ms", str(best), ">= 150")


def _empty(options: argparse.Namespace, settings: config.Config, questions: list[str]) -> None:
    with _doing_nothing(settings) as address:
        best = _highest_rate("Serve alone", address, questions, options.seconds)
    _row("Serve alone, three deployments that do nothing: requests/s at p99 < 100 ms", str(best))


def _highest_rate(what: str, address: str, questions: list[str], seconds: float) -> int:
    """Return the highest rate at which every request is answered and 99 % of them within 100 ms."""
    plan = {"address": address, "path": CHAT, "questions": questions, "seconds": min(10.0, seconds)}
    _loaded(**plan | {"clients": 4, "seconds": 3})
    best = 0
    for rate in (10, 20, 30, 40, 50, 75, 100, 150, 200, 250, 300, 400):
        load = _loaded(**plan, rate=rate)
        late = _percentile([each["seconds"] for each in load["results"]], 0.99) * 1000
        _row(f"{what} at {rate} requests/s: p99", f"{late:.0f} ms, {len(_good(load))} of {len(load['results'])}")
        if late > 100 or len(_good(load)) < len(load["results"]):
            break
        best = rate
    return best


def _overload(options: argparse.Namespace, settings: config.Config, questions: list[str]) -> None:
    """Measure peak and overload in turns, since the machine's speed may change; counting starts once the batch is full."""
    filled, end = options.seconds / 2, options.seconds * 1.5
    loads: list[dict[str, Any]] = []
    peaks: list[float] = []
    memories: list[tuple[int, int]] = []
    with running(settings) as address:
        plan = {"address": address, "path": CHAT, "questions": questions, "seconds": end}
        _loaded(**plan | {"clients": 16, "seconds": 3})
        for _ in range(TURNS):
            peaks.append(_rate_within(_loaded(**plan, clients=16), filled, end))
            memory = _memory()
            loads.append(_loaded(**plan, rate=10 * peaks[-1]))
            memories.append((memory, _memory()))
        started = time.perf_counter()
        _loaded(**plan | {"clients": 1, "seconds": 0.1})
        normal = time.perf_counter() - started
    goodputs = [_rate_within(load, filled, end) for load in loads]
    load = {"results": [each for load in loads for each in load["results"]]}
    refused = [each for each in load["results"] if each["status"] in (429, 503)]
    others = len(load["results"]) - len(_good(load)) - len(refused)
    _row("overload: requests neither answered nor refused", str(others), "0")
    by_turn = ", ".join(f"{goodput:.2f}/{peak:.2f}" for goodput, peak in zip(goodputs, peaks, strict=True))
    _row("overload at 10x: answers/s under overload/at peak, per turn", by_turn)
    _row("overload at 10x: goodput / peak, all turns together", f"{sum(goodputs) / sum(peaks):.2f}", ">= 0.90")
    late = _percentile([each["seconds"] * 1000 for each in refused], 0.99)
    middle = _percentile([each["seconds"] * 1000 for each in refused], 0.5)
    _row("overload: refusals, p50 and p99", f"{middle:.0f} ms, {late:.0f} ms", "< 50 ms")
    with_header = sum(each["retry_after"] is not None for each in refused)
    _row("overload: refusals with Retry-After", f"{with_header} of {len(refused)}", "all")
    by_turn = ", ".join(f"{before >> 20}/{after >> 20}" for before, after in memories)
    _row("overload: memory of all replicas, before/after in MiB, per turn", by_turn, "flat")
    _row("overload: next answer after it", f"{normal:.1f} s", "< 5 s")


def _oversized(options: argparse.Namespace, settings: config.Config, questions: list[str]) -> None:
    """Measure what 16 requests/s over the limit on characters cost them and another client."""
    with running(settings) as address:
        plan = {"address": address, "path": CHAT, "questions": questions, "seconds": options.seconds}
        _loaded(**plan | {"clients": 2, "seconds": 3})
        alone = _loaded(**plan, clients=1)
        with _loading(**plan, rate=16, oversized=True) as result:
            beside = _loaded(**plan, clients=1)
            refused = [each for each in result()["results"] if each["status"] == 400]
    late = _percentile([each["seconds"] * 1000 for each in refused], 0.99)
    _row("oversized at 16 rps: p99 of the refusals", f"{late:.0f} ms of {len(refused)}", "< 100 ms")
    seconds = [statistics.median(each["seconds"] for each in _good(load)) for load in (alone, beside)]
    _row("oversized at 16 rps: p50 of another client, alone and beside them", f"{seconds[0]:.2f} s, {seconds[1]:.2f} s")
    _row("oversized at 16 rps: beside / alone", f"{seconds[1] / seconds[0]:.2f}", "<= 1.5")


def _kill(options: argparse.Namespace, settings: config.Config, questions: list[str]) -> None:
    # A model that two cores can run at this rate; the texts do not matter.
    tiny = Path(settings.workspace) / "tiny"
    _write_tiny_model(options.model, tiny)
    # Two replicas of each, as in a deployment that must not lose requests: a single one takes seconds to restart. Deep queues,
    # since this part counts requests that are lost, not those that a busy machine refuses.
    replicas = ("min_replicas=2", "max_replicas=2", "num_cpus=0.25", "max_queued_requests=1000")
    quick = settings.using(
        f"generator.model={tiny}",
        "generator.max_new_tokens=1",
        *(f"serve.{name}.{each}" for name in ("retriever", "generator") for each in replicas),
    )
    with running(quick) as address:
        plan = {"address": address, "path": CHAT, "questions": questions, "seconds": options.seconds, "rate": 20}
        _loaded(**plan | {"rate": 2, "seconds": 3})
        for deployment, retries in (("Retriever", 0), ("Generator", 0), ("Ingress", 2)):
            for stream in (False, True):
                with _loading(**plan, stream=stream, retries=retries) as result:
                    time.sleep(options.seconds / 3)
                    os.kill(_replica_pids(deployment)[0], signal.SIGKILL)
                    load = result()
                good = _good(load)
                name = f"SIGKILL of the {deployment.lower()} at 20 rps, {'streams' if stream else 'plain'}"
                if stream:
                    silent = sum(not each["complete"] and not each["error_event"] for each in good)
                    _row(f"{name}: ended without a message", f"{silent} of {len(load['results'])}", "0")
                else:
                    client = ", a client that retries" if retries else ""
                    failed = len(load["results"]) - len(good)
                    statuses = sorted({each["status"] for each in load["results"]} - {200})
                    _row(f"{name}{client}: failed", f"{failed} of {len(load['results'])} {statuses or ''}", "0")
                _wait_ready(address)


def _write_tiny_model(base: str, directory: Path) -> None:
    """Save a Llama of two small layers with random weights and the tokenizer of `base`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # slow, and not needed by the load generator

    tokenizer = AutoTokenizer.from_pretrained(weights.resolve(base).directory)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8192, **shape)
    LlamaForCausalLM(settings).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _swap(options: argparse.Namespace, settings: config.Config, questions: list[str]) -> None:
    with running(settings.using("serve.poll_seconds=0.2")) as address:
        plan = {"address": address, "path": "/v1/retrieve", "questions": questions, "seconds": options.seconds}
        _loaded(**plan | {"clients": 2, "seconds": 3})
        before = _memory("Retriever")
        with _loading(**plan, rate=20) as result, tempfile.TemporaryDirectory() as folder:
            for number in range(3):
                path = Path(folder) / "new.jsonl"
                path.write_text(json.dumps({"document_id": f"new{number}", "text": f"Fresh news {number}."}) + "\n")
                upsert_documents(settings, str(path))
            load = result()
        after = _memory("Retriever")
    seen = sorted({each["version"] for each in _good(load)})
    _row("index swap at 20 rps: failed", f"{len(load['results']) - len(_good(load))} of {len(load['results'])}", "0")
    _row(
        "index swap: number of versions seen, last version",
        f"{len(seen)}, {seen[-1]}",
        versions.current_version(settings.workspace),
    )
    _row("index swap: memory of the retriever, before and after", f"{before >> 20} MiB, {after >> 20} MiB", "flat")


def _models(options: argparse.Namespace, settings: config.Config, questions: list[str]) -> None:
    """Swap models of arm ft, whose prompts are short enough for 5 requests/s on two cores; all have the same weights."""
    base = weights.resolve(options.model).directory
    assert base is not None
    tuned = Path(settings.workspace) / "models" / "ft"

    def publish(name: str) -> None:
        staging = artifacts.stage(str(tuned / name))
        shutil.copytree(base, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(artifacts.MANIFEST))
        (staging / "note.json").write_text(json.dumps(name))  # changes the fingerprint
        artifacts.publish(staging, str(tuned / name), "model")
        artifacts.make_current(str(tuned), name)

    publish("first")
    quick = settings.using("answer.arm=ft", "generator.max_new_tokens=2", "serve.poll_seconds=0.2")
    with running(quick) as address:
        plan = {"address": address, "path": CHAT, "questions": questions, "seconds": options.seconds}
        _loaded(**plan | {"clients": 2, "seconds": 3})
        before = _memory("Generator")
        with _loading(**plan, rate=5) as result:
            for name in ("second", "third"):
                time.sleep(options.seconds / 4)
                publish(name)
            load = result()
        time.sleep(5)  # the old model is released after its last answer
        after = _memory("Generator")
    good = _good(load)
    _row("model swap at 5 rps: failed", f"{len(load['results']) - len(good)} of {len(load['results'])}", "0")
    _row("model swap: models seen", str(len({each["model"] for each in good})), "3")
    _row("model swap: memory of the generator, before and after", f"{before >> 20} MiB, {after >> 20} MiB", "flat")


def _leave(options: argparse.Namespace, settings: config.Config, questions: list[str]) -> None:
    del options
    with running(settings) as address:
        seconds = [asyncio.run(_left(address, question)) for question in questions[:5]]
    _row("client disconnects in mid-stream: generation stops after, longest of 5", f"{max(seconds):.2f} s", "< 1 s")


async def _left(address: str, question: str) -> float:
    body = {"messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 512, "temperature": 1.0}
    async with aiohttp.ClientSession(address, headers=HEADERS) as session:
        async with session.post(CHAT, json=body) as reply:
            while not await _is_generating(session):
                await reply.content.readline()
            await asyncio.sleep(1.1)  # /readyz may be up to a second old; wait until the next call refreshes it
            reply.close()
        started = time.perf_counter()
        while time.perf_counter() - started < 30:
            await asyncio.sleep(0.1)
            if not await _is_generating(session):
                break
    return time.perf_counter() - started


async def _is_generating(session: aiohttp.ClientSession) -> bool:
    async with session.get("/readyz", raise_for_status=True) as ready:
        return any(replica["running"] for replica in (await ready.json())["generators"])


# The processes of the endpoint, and the peers.


def _replica_pids(deployment: str = "") -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if f"ServeReplica:ragtune:{deployment}" in " ".join(process.info["cmdline"] or [])
    ]


def _memory(deployment: str = "") -> int:
    return sum(psutil.Process(process).memory_info().rss for process in _replica_pids(deployment))


def _wait_ready(address: str) -> None:
    async def ready() -> bool:
        async with aiohttp.ClientSession(address, headers=HEADERS) as session, session.get("/readyz") as reply:
            return reply.status == 200

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            if asyncio.run(ready()):
                return
        time.sleep(0.2)


class Nothing:
    """A deployment that answers at once."""

    async def answer(self, question: str) -> str:
        """Return the question."""
        return question


class EmptyIngress:
    """Calls the retriever, then the generator: the calls that a request to the endpoint costs Serve, and no more."""

    def __init__(self, retriever: Any, generator: Any) -> None:
        self._retriever, self._generator = retriever, generator

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Return the text of the first message."""
        question = json.loads(await request.body())["messages"][0]["content"]
        return {"text": await self._generator.answer.remote(await self._retriever.answer.remote(question))}


@contextlib.contextmanager
def _doing_nothing(settings: config.Config) -> Iterator[str]:
    """Serve an application with the endpoint's three deployments, started in the same way, that do nothing."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with session.ray_session(settings.cluster):
        from ray import serve

        quiet = {"enable_access_log": False, "log_level": "WARNING"}
        options: dict[str, Any] = {"max_ongoing_requests": 512, "logging_config": quiet}
        options["ray_actor_options"] = {"num_cpus": 0}
        behind = [serve.deployment(Nothing, name=name, **options).bind() for name in ("Retriever", "Generator")]
        app: Any = serve.deployment(EmptyIngress, name="Ingress", **options).bind(*behind)
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
        try:
            serve.run(app, route_prefix="/")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


@contextlib.contextmanager
def _peer(settings: config.Config) -> Iterator[str]:
    """Serve `bench.serve_peer`, the service that most people write first, with the same model, retriever and prompts."""
    command = [sys.executable, "-m", "bench.serve_peer", settings.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


if __name__ == "__main__":
    main()
