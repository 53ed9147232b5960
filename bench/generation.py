"""Compares bulk generation with a plain transformers loop, and checks that batching does not change answers.

    python -m bench.generation --model DIRECTORY --data SQUAD.json --prompts 200

Each prompt shows five SQuAD contexts, the gold one among them. The peer is the loop that most people write: float32,
`model.generate`, one prompt at a time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ragtune_ray.answering.prompts import build_prompts
from ragtune_ray.config import Config
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.generation.interface import Completion, Prompt
from ragtune_ray.models import weights
from ragtune_ray.schema import Passage

_BATCH_ROWS = 32
Result = TypeVar("Result")


def main() -> None:
    """Measure the rates, then compare texts, and print."""
    options = _options()
    torch.set_num_threads(options.threads)
    fast = TransformersGenerator(options.model, precision="auto", batch_tokens=options.batch_tokens)
    prompts = _prompts(fast, options.data, options.prompts)
    mean = sum(prompt.num_tokens for prompt in prompts) / len(prompts)
    print(f"{len(prompts)} prompts of {mean:.0f} tokens, {options.new_tokens} new tokens, {options.threads} threads")
    fast.generate(prompts[:2], max_new_tokens=2)

    _, bulk_rate = _timed(lambda: fast.generate(prompts, max_new_tokens=options.new_tokens), len(prompts))
    _print_rate("bulk, precision auto", bulk_rate)
    torch.set_num_threads(1)
    some = prompts[: max(1, len(prompts) // 4)]
    _, single_rate = _timed(lambda: fast.generate(some, max_new_tokens=options.new_tokens), len(some))
    _print_rate("bulk, precision auto, 1 thread", single_rate)
    torch.set_num_threads(options.threads)
    peer_prompts = prompts[: options.peer_prompts or len(prompts)]
    peer_texts, peer_rate = _peer(options, fast, peer_prompts)
    _print_rate("plain transformers loop, float32", peer_rate)
    print(f"bulk / plain loop: {bulk_rate / peer_rate:.2f}")
    _equality("auto", options, prompts)
    full = _equality("float32", options, peer_prompts)
    same = _share_equal([one.text for one in full], peer_texts)
    print(f"float32 bulk == plain loop: {same:.1%} of {len(peer_prompts)} texts")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = weights.resolve(Config().generator.model).directory
    parser.add_argument("--model", type=Path, default=default, help="directory of a causal language model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/squad/squad-v1.1-24articles.json"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--peer-prompts", type=int, default=0, help="prompts for the slow loops; 0 means all")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=Config().generator.batch_tokens)
    return parser.parse_args()


def _prompts(generator: TransformersGenerator, path: Path, num_prompts: int) -> list[Prompt]:
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    passages = [
        Passage(f"{article['title']}{number}#0", article["title"], item["context"], article["title"], "{}", 0, 0)
        for article in articles
        for number, item in enumerate(article["paragraphs"])
    ]
    items = [item for article in articles for item in article["paragraphs"]]
    pairs = [(q["question"], passage) for item, passage in zip(items, passages, strict=True) for q in item["qas"]]
    source = random.Random(0)
    chosen = source.sample(pairs, num_prompts)
    shown = [source.sample([gold, *source.sample(passages, 4)], 5) for _, gold in chosen]
    return build_prompts(
        [question for question, _ in chosen],
        shown,
        system=Config().prompt.system,
        max_tokens=Config().prompt.max_tokens,
        count_tokens=generator.count_tokens,
        render=generator.render,
    )


def _peer(options: argparse.Namespace, fast: TransformersGenerator, prompts: list[Prompt]) -> tuple[list[str], float]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    def answer(prompt: Prompt) -> str:
        batch = tokenizer(fast.render(prompt.messages), return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=options.new_tokens, do_sample=False)
        return str(tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))

    return _timed(lambda: [answer(prompt) for prompt in prompts], len(prompts))


def _equality(
    precision: Literal["auto", "float32"], options: argparse.Namespace, prompts: list[Prompt]
) -> list[Completion]:
    new_tokens = options.new_tokens
    longest = max(prompt.num_tokens for prompt in prompts) + new_tokens
    generator = TransformersGenerator(options.model, precision=precision, batch_tokens=_BATCH_ROWS * longest)
    batched = []
    for start in range(0, len(prompts), _BATCH_ROWS):
        batched += generator.generate(prompts[start : start + _BATCH_ROWS], max_new_tokens=new_tokens)
    alone = [generator.generate([prompt], max_new_tokens=new_tokens)[0] for prompt in prompts]
    same = _share_equal([one.text for one in batched], [one.text for one in alone])
    print(f"{precision}: batches of {_BATCH_ROWS} == batches of 1: {same:.1%} of {len(prompts)} texts", flush=True)
    return batched


def _share_equal(left: list[str], right: list[str]) -> float:
    return sum(one == other for one, other in zip(left, right, strict=True)) / len(left)


def _timed(call: Callable[[], Result], num_prompts: int) -> tuple[Result, float]:
    started = time.perf_counter()
    result = call()
    return result, num_prompts / (time.perf_counter() - started)


def _print_rate(name: str, rate: float) -> None:
    print(f"{name:36} {rate:6.2f} prompts/s", flush=True)


if __name__ == "__main__":
    main()
