"""Forecasts how many grades a comparison asks the judge for, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ragtune_ray import config, schema
from ragtune_ray.evaluation import costs
from ragtune_ray.evaluation.grading import graders, groundedness, judge

REPLY_TOKENS = 60
"""Of a grade with its reason, without what a model thinks before it."""

CountTokens = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True, slots=True)
class Grading:
    """What grading will take at most; equal answers and known grades are not asked for."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    price: float | None
    """None if the judge's prices are unknown."""
    currency: str

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "price": self.price,
        }

    def text(self) -> str:
        """For a person.

        >>> Grading(1000, 400_000, 60_000, 0.5, "USD").text()
        'at most 1,000 grades, about 400,000 tokens of prompts and 60,000 of replies: 0.50 USD'
        """
        tokens = f"about {self.prompt_tokens:,} tokens of prompts and {self.completion_tokens:,} of replies"
        price = "" if self.price is None else f": {self.price:.2f} {self.currency}"
        return f"at most {self.requests:,} grades, {tokens}{price}"


def forecast(
    settings: config.Config, queries: Sequence[schema.Query], count: CountTokens, num_runs: int
) -> Grading | None:
    """What the judge will be asked; None if no metric of `evaluate.metrics` asks it.

    Args:
        settings: of the comparison.
        queries: that are scored.
        count: counts tokens.
        num_runs: how often each question is answered, in all arms together.
    """
    asked = [metric for metric in settings.evaluate.metrics if graders.asks_the_judge(settings, metric)]
    if not asked:
        return None
    passages = settings.retrieval.top_k * settings.chunking.size_tokens
    texts = count([query.text for query in queries])
    golds = count(["\n".join(query.answers or ()) for query in queries])
    rubrics = [groundedness.SYSTEM, judge.WITH_GOLD, judge.WITHOUT_GOLD]
    rubric_tokens = dict(zip(rubrics, count(rubrics), strict=True))
    requests = read = 0
    for metric in asked:
        for query, text, gold in zip(queries, texts, golds, strict=True):
            if query.answers == ():  # graded without the judge
                continue
            has_gold = metric == "judge" and query.answers is not None
            with_gold = judge.WITH_GOLD if has_gold else judge.WITHOUT_GOLD
            rubric = groundedness.SYSTEM if metric == "groundedness" else with_gold
            answer = gold or settings.generator.max_new_tokens
            requests += num_runs
            read += num_runs * (rubric_tokens[rubric] + text + answer + (gold if has_gold else passages))
    rule = settings.evaluate.judge
    written = requests * REPLY_TOKENS
    prices = settings.prices.model_copy(
        update=rule.model_dump(include={"million_prompt_tokens", "million_completion_tokens"})
    )
    is_priced = bool(rule.million_prompt_tokens or rule.million_completion_tokens)
    price = costs.tokens_price(read, written, prices) if is_priced else None
    return Grading(requests, read, written, price, prices.currency)
