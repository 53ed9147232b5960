"""Compares the serving engine with `model.generate` behind a lock: answers per second and time to the first token.

    python -m bench.continuous --requests 48

A closed loop in one process, without HTTP: each client asks again as soon as it has its answer. A prompt shows five
passages of data/space, including those of the question's document. The peer is what most people put behind FastAPI:
float32, `model.generate`, one lock. The benchmark also prints how many served texts equal those of bulk generation.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ragtune_ray.answering.prompts import build_prompts
from ragtune_ray.config import Config
from ragtune_ray.generation.continuous import ContinuousGenerator
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.generation.interface import Prompt
from ragtune_ray.ingest.chunking import chunk, word_spans
from ragtune_ray.models import weights
from ragtune_ray.schema import Document

_PASSAGE_WORDS = 150  # about 200 tokens, the default of `ragtune index`
Answer = Callable[[Prompt], Iterator[str]]


def main() -> None:
    """Measure each concurrency and the peer, and print one row for each."""
    options = _options()
    torch.set_num_threads(options.threads)
    generator = TransformersGenerator(options.model, precision="auto", batch_tokens=Config().generator.batch_tokens)
    prompts = _prompts(generator, options)
    mean = sum(prompt.num_tokens for prompt in prompts) / len(prompts)
    print(f"{len(prompts)} prompts of {mean:.0f} tokens, {options.new_tokens} new tokens, {options.threads} threads")
    print(f"{'':32}{'answers/s':>10}{'first token p50':>17}{'p95':>8}")
    engine = ContinuousGenerator(generator)

    def answer(prompt: Prompt) -> Iterator[str]:
        return engine.submit(prompt, max_new_tokens=options.new_tokens).pieces()

    list(answer(prompts[0]))
    served: dict[int, tuple[float, list[str]]] = {}
    for concurrency in options.concurrency:
        some = prompts[: len(prompts) if concurrency > 1 else max(1, len(prompts) // 4)]
        served[concurrency] = _load(f"continuous, {concurrency} at once", answer, some, concurrency)
    engine.close()
    rate, texts = served[options.concurrency[-1]]
    first_rate, _ = served[options.concurrency[0]]
    print(f"concurrency {options.concurrency[-1]} / concurrency {options.concurrency[0]}: {rate / first_rate:.2f}")

    bulk = [one.text for one in generator.generate(prompts, max_new_tokens=options.new_tokens)]
    print(f"served == bulk: {sum(map(str.__eq__, texts, bulk)) / len(bulk):.1%} of {len(bulk)} texts", flush=True)
    some = prompts[: options.peer_requests]
    peer_rate, _ = _load("model.generate under one lock", _peer(options, generator), some, options.concurrency[-1])
    print(f"continuous / one lock, at concurrency {options.concurrency[-1]}: {rate / peer_rate:.2f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = weights.resolve(Config().generator.model).directory
    parser.add_argument("--model", type=Path, default=default, help="directory of a causal language model")
    parser.add_argument("--data", type=Path, default=Path("data/space"))
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--peer-requests", type=int, default=16)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--passages", type=int, default=Config().retrieval.top_k)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _prompts(generator: TransformersGenerator, options: argparse.Namespace) -> list[Prompt]:
    passages = [
        passage
        for path in sorted((options.data / "documents").glob("*.md"))
        for passage in chunk(
            Document(path.name, path.read_text(encoding="utf-8"), path.stem, "{}", ""), word_spans, _PASSAGE_WORDS, 0
        )
    ]
    lines = (options.data / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    source = random.Random(0)
    questions = source.sample([json.loads(line) for line in lines], options.requests)
    shown = []
    for question in questions:
        gold = [passage for passage in passages if passage.document_id in question["document_ids"]]
        shown.append([*gold, *source.sample(passages, options.passages)][: options.passages])
    return build_prompts(
        [question["text"] for question in questions],
        shown,
        system=Config().prompt.system,
        max_tokens=Config().prompt.max_tokens,
        count_tokens=generator.count_tokens,
        render=generator.render,
    )


def _load(name: str, answer: Answer, prompts: list[Prompt], concurrency: int) -> tuple[float, list[str]]:
    """Answer all prompts with `concurrency` clients, print a row, and return answers per second and the texts."""
    texts, first = [""] * len(prompts), [0.0] * len(prompts)
    turns, lock = iter(range(len(prompts))), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                turn = next(turns, None)
            if turn is None:
                return
            asked = time.perf_counter()
            for piece in answer(prompts[turn]):
                first[turn] = first[turn] or time.perf_counter() - asked
                texts[turn] += piece

    clients = [threading.Thread(target=client) for _ in range(concurrency)]
    started = time.perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    rate = len(prompts) / (time.perf_counter() - started)
    median, late = np.percentile(first, [50, 95])
    print(f"{name:32}{rate:10.2f}{median:15.2f} s{late:6.2f} s", flush=True)
    return rate, texts


def _peer(options: argparse.Namespace, generator: TransformersGenerator) -> Answer:
    """Return `model.generate` behind a lock. The whole answer is one piece, so its first token arrives with its last."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    lock = threading.Lock()

    def answer(prompt: Prompt) -> Iterator[str]:
        batch = tokenizer(generator.render(prompt.messages), return_tensors="pt", add_special_tokens=False)
        with lock, torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=options.new_tokens, do_sample=False)
        yield str(tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


if __name__ == "__main__":
    main()
