"""Uses the generator as a teacher of the retriever: passages that make the answer more likely get higher scores.

A passage's *gain* is ln p(answer | question, passage) - ln p(answer | question), per answer token, in nats. The
retriever learns the softmax of the gains over a temperature (perplexity distillation, Izacard et al. 2023; REPLUG, Shi
et al. 2023). Dividing by the answer's length gives long and short answers the same weight. The second term removes the credit
for what the generator can answer without the passage. No qrels are needed; they only test the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ragtune_ray import config
from ragtune_ray.answering import prompts
from ragtune_ray.answering.pipeline import with_instruction
from ragtune_ray.evaluation.metrics.retrieval import mrr_at_k
from ragtune_ray.generation.interface import Generator, GeneratorError, Prompt
from ragtune_ray.ingest.splits import positives
from ragtune_ray.schema import Passage, Query, Reject, RetrieverExample
from ragtune_ray.training.examples import Candidates, holds_answer

MIN_GAIN_NATS = 0.1
"""The best passage must raise the answer's log-likelihood per token by at least this."""
MAX_ENTROPY = 0.95
"""A teacher's distribution with a higher entropy, as a share of the maximum, teaches nothing."""
UNDECIDED = "the generator's scores hardly distinguish its passages"
RERANKER_SHARE = 0.5
RERANKER_TEMPERATURE = 0.3


@dataclass(frozen=True, slots=True)
class Judgement:
    """How well teacher and retriever ranked the candidates of one question."""

    teacher_reciprocal_rank: float | None
    """Reciprocal rank of the first candidate that answers; None if no candidate does."""
    retriever_reciprocal_rank: float | None
    entropy: float
    """Entropy of the teacher's distribution, from `entropy`."""


def passage_gains(
    asked: Sequence[tuple[Query, Sequence[Passage]]], generator: Generator, settings: config.Config
) -> list[list[float] | str]:
    """How many nats per answer token each candidate passage adds to the log-likelihood of its question's first answer.

    Returns:
        For each question one gain per candidate, in their order, or the reason why it has none.
    """
    try:
        return list(_gains(asked, generator, settings))
    except (prompts.PromptError, GeneratorError) as error:
        if len(asked) == 1:
            return [str(error)]
    # One question is too long: compute the gains one by one to find it.
    return [gains for each in asked for gains in passage_gains([each], generator, settings)]


def _gains(
    asked: Sequence[tuple[Query, Sequence[Passage]]], generator: Generator, settings: config.Config
) -> list[list[float]]:
    queries = [query for query, _ in asked]
    pairs = [(query, passage) for query, passages in asked for passage in passages]
    without = _prompts(queries, [()] * len(queries), generator, settings)
    asked_again = [query for query, _ in pairs]
    with_passage = _prompts(asked_again, [(passage,) for _, passage in pairs], generator, settings)
    answers = [(query.answers or ("",))[0] for query in [*queries, *(query for query, _ in pairs)]]
    means = [total / max(1, count) for total, count in generator.log_likelihood([*without, *with_passage], answers)]
    before, after = means[: len(queries)], iter(means[len(queries) :])
    return [[next(after) - base for _ in passages] for base, (_, passages) in zip(before, asked, strict=True)]


def _prompts(
    queries: Sequence[Query], shown: Sequence[Sequence[Passage]], generator: Generator, settings: config.Config
) -> list[Prompt]:
    # As in answering: an arm that retrieves has its own instruction.
    system = settings.prompt.system if shown and shown[0] else settings.prompt.system_without_passages
    return prompts.build_prompts(
        [query.text for query in queries],
        shown,
        system=[with_instruction(system, query) for query in queries],
        max_tokens=settings.prompt.max_tokens,
        count_tokens=generator.count_tokens,
        render=generator.render,
        histories=[query.history for query in queries],
    )


def choose_candidates(query: Query, candidates: Candidates, count: int) -> list[Passage]:
    """Choose the hits that the teacher scores: those that the current encoder ranks highest.

    If none of them contains the answer, the best hit that does replaces the last one; otherwise there would be nothing
    to teach. The hits need cosines and must be more than `count`.
    """
    order = np.argsort(-np.asarray(candidates.retrieved_cosines), kind="stable")
    kept = [candidates.retrieved[place] for place in order[:count]]
    answers = query.answers or ()
    if not any(holds_answer(passage.text, answers) for passage in kept):
        answering = next((passage for passage in candidates.retrieved if holds_answer(passage.text, answers)), None)
        if answering is not None:
            kept[-1] = answering
    return kept


def entropy(scores: Sequence[float], temperature: float) -> float:
    """Entropy of softmax(scores / temperature), as a share of its maximum.

    >>> round(entropy([1.0, 1.0, 1.0], 0.1), 6)
    1.0
    """
    if len(scores) < 2:
        return 0.0
    shares = _softmax(scores, temperature)
    return float(-(shares * np.log(np.maximum(shares, 1e-300))).sum() / math.log(len(scores)))


def blended(gains: Sequence[float], reranker_scores: Sequence[float], temperature: float) -> list[float]:
    """Scores whose softmax over `temperature` is a mixture of the distributions of the generator and of a cross-encoder."""
    scores = np.asarray(reranker_scores, dtype=np.float64)
    spread = float(scores.max() - scores.min()) or 1.0
    others = _softmax((scores - scores.min()) / spread, RERANKER_TEMPERATURE)
    shares = (1 - RERANKER_SHARE) * _softmax(gains, temperature) + RERANKER_SHARE * others
    return [float(value) for value in temperature * np.log(np.maximum(shares, 1e-12))]


def _softmax(scores: Sequence[float] | np.ndarray, temperature: float) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64) / temperature
    shares = np.exp(values - values.max())
    return np.asarray(shares / shares.sum())


def taught_example(
    query: Query,
    candidates: Candidates,
    passages: Sequence[Passage],
    gains: Sequence[float],
    settings: config.Config,
    count_tokens: Callable[[Sequence[str]], list[int]],
    *,
    reranker_scores: Sequence[float] | None = None,
) -> tuple[RetrieverExample | Reject, Judgement]:
    """Make the example of one question, with its passages ordered by the teacher's scores, and judge their order.

    `passages` are from `choose_candidates`, `gains` from `passage_gains`. `count_tokens` counts the encoder's tokens, up to its
    maximum length. A cross-encoder's `reranker_scores` are mixed into the teacher's.
    """
    temperature = settings.training.teacher_temperature
    scores = blended(gains, reranker_scores, temperature) if reranker_scores is not None else list(gains)
    judgement = _judgement(query, candidates, passages, scores, temperature)
    order = sorted(range(len(passages)), key=lambda place: -scores[place])
    problem = _problem(query, passages, gains, order, judgement)
    if problem:
        return Reject(query.query_id, problem, "row"), judgement
    texts = [passages[place].text for place in order]
    return RetrieverExample(
        query_id=query.query_id,
        query=query.text,
        passage_ids=tuple(passages[place].passage_id for place in order),
        passages=tuple(texts),
        teacher_scores=tuple(scores[place] for place in order),
        num_tokens=sum(count_tokens([query.text] if settings.training.keeps_index else [query.text, *texts])),
    ), judgement


def _problem(
    query: Query, passages: Sequence[Passage], gains: Sequence[float], order: Sequence[int], judgement: Judgement
) -> str:
    """Why the teacher's scores of a question cannot be trusted; empty if they can."""
    if max(gains) < MIN_GAIN_NATS:
        return "no passage makes its answer likelier"
    answering = [holds_answer(passage.text, query.answers or ()) for passage in passages]
    if any(answering) and not answering[order[0]]:
        return "the generator prefers a passage that does not contain the answer to one that does"
    return UNDECIDED if judgement.entropy > MAX_ENTROPY else ""


def _judgement(
    query: Query, candidates: Candidates, passages: Sequence[Passage], scores: Sequence[float], temperature: float
) -> Judgement:
    relevant = set(positives(query))
    answering = {
        passage.passage_id: 1.0
        for passage in passages
        if (passage.document_id in relevant if relevant else holds_answer(passage.text, query.answers or ()))
    }
    spread = entropy(scores, temperature)
    if not answering:
        return Judgement(None, None, spread)
    names = [passage.passage_id for passage in passages]
    hits = (passage.passage_id for passage in candidates.retrieved)
    cosines = dict(zip(hits, candidates.retrieved_cosines, strict=True))
    by_teacher = [names[place] for place in sorted(range(len(names)), key=lambda place: -scores[place])]
    by_retriever = sorted(names, key=lambda name: -cosines[name])
    return Judgement(
        teacher_reciprocal_rank=mrr_at_k(answering, by_teacher, len(names)),
        retriever_reciprocal_rank=mrr_at_k(answering, by_retriever, len(names)),
        entropy=spread,
    )


def teacher_facts(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Means for the gate: `MRR`, `retriever_MRR` and `entropy`; and `n`, the number of questions with both ranks."""
    ranked = [
        (each.teacher_reciprocal_rank, each.retriever_reciprocal_rank)
        for each in judgements
        if each.teacher_reciprocal_rank is not None and each.retriever_reciprocal_rank is not None
    ]
    means = np.mean(ranked, axis=0) if ranked else np.zeros(2)
    return {
        "MRR": round(float(means[0]), 4),
        "retriever_MRR": round(float(means[1]), 4),
        "entropy": round(float(np.mean([each.entropy for each in judgements])), 4) if judgements else 0.0,
        "n": len(ranked),
    }
