"""The generator as a teacher of the retriever: which passages make an answer likelier, and what is learnt from that.

In: questions with answers, candidate passages with the retriever's own scores, and a generator that gives likelihoods. Out:
examples whose teacher is the generator, and how good a judge it was. No qrels are needed; where there are some, they only examine
the teacher. This module knows nothing of indexes, weights, files or Ray.

A passage's *gain* is ln p(answer | question, passage) less ln p(answer | question), both per token of the answer, in nats. The
softmax of the gains over a temperature is what the retriever learns (perplexity distillation, Izacard et al. 2023; REPLUG, Shi
et al. 2023). Dividing by the answer's length keeps long answers from drowning short ones; what the generator knows without a
passage is subtracted, so that a passage gets no credit for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ragtune_ray import config
from ragtune_ray.answering import prompts
from ragtune_ray.evaluation.metrics import mrr_at_k
from ragtune_ray.generation.interface import Generator, GeneratorError, Prompt
from ragtune_ray.ingest.splits import positives
from ragtune_ray.schema import Passage, Query, Reject, RetrieverExample
from ragtune_ray.training.examples import Candidates, holds_answer

__all__ = ["Judgement", "blended", "chosen", "entropy", "passage_gains", "taught_example", "teacher_facts"]

MIN_GAIN_NATS = 0.1
"""By which the best passage must raise the likelihood of the answer, per token: else the generator read none of them."""
MAX_ENTROPY = 0.95
"""Of a question's distribution, as a share of the most it could have: beyond it the question teaches nothing."""
RERANKER_SHARE = 0.5
RERANKER_TEMPERATURE = 0.3


@dataclass(frozen=True, slots=True)
class Judgement:
    """How well teacher and retriever ranked one question's candidates."""

    teacher_reciprocal_rank: float | None
    """Of the first candidate that answers; None where none does."""
    retriever_reciprocal_rank: float | None
    entropy: float


def passage_gains(
    asked: Sequence[tuple[Query, Sequence[Passage]]], generator: Generator, settings: config.Config
) -> list[list[float] | str]:
    """By how many nats per answer token each passage raises the likelihood of a question's first answer.

    Args:
        asked: questions with answers, each with its candidates.
        generator: gives likelihoods.
        settings: prompt is used.

    Returns:
        Per question one number per candidate, in their order; or the reason why it has none.
    """
    try:
        return list(_gains(asked, generator, settings))
    except (prompts.PromptError, GeneratorError) as error:
        if len(asked) == 1:
            return [str(error)]
    # One question is too long: take them one by one to find it.
    return [gains for each in asked for gains in passage_gains([each], generator, settings)]


def _gains(
    asked: Sequence[tuple[Query, Sequence[Passage]]], generator: Generator, settings: config.Config
) -> list[list[float]]:
    alone = [query for query, _ in asked]
    paired = [(query, passage) for query, passages in asked for passage in passages]
    without = _built([query.text for query in alone], [()] * len(alone), generator, settings)
    with_one = _built([query.text for query, _ in paired], [(passage,) for _, passage in paired], generator, settings)
    answers = [(query.answers or ("",))[0] for query in alone] + [(query.answers or ("",))[0] for query, _ in paired]
    means = [total / max(1, count) for total, count in generator.log_likelihood([*without, *with_one], answers)]
    before, after = means[: len(alone)], iter(means[len(alone) :])
    return [[next(after) - base for _ in passages] for base, (_, passages) in zip(before, asked, strict=True)]


def _built(
    texts: Sequence[str], shown: Sequence[Sequence[Passage]], generator: Generator, settings: config.Config
) -> list[Prompt]:
    given = settings.prompt
    return prompts.build_prompts(
        texts,
        shown,
        # As answering asks: the arm that retrieves has its own instruction.
        system=given.system if shown and shown[0] else given.system_without_passages,
        max_tokens=given.max_tokens,
        count_tokens=generator.count_tokens,
        render=generator.render,
    )


def chosen(query: Query, candidates: Candidates, count: int) -> list[Passage]:
    """The passages that the teacher scores: those that the encoder, as it is now, ranks highest among the hits.

    Where none of them holds the answer, the best hit that does takes the last place: else nothing could be taught.

    Args:
        query: with answers.
        candidates: hits, more than `count`, with their cosines.
        count: how many.
    """
    order = np.argsort(-np.asarray(candidates.retrieved_cosines), kind="stable")
    kept = [candidates.retrieved[place] for place in order[:count]]
    answers = query.answers or ()
    if not any(holds_answer(passage.text, answers) for passage in kept):
        rescued = next((passage for passage in candidates.retrieved if holds_answer(passage.text, answers)), None)
        if rescued is not None:
            kept[-1] = rescued
    return kept


def entropy(scores: Sequence[float], temperature: float) -> float:
    """Entropy of the softmax of scores over a temperature, as a share of the most that it could be.

    >>> round(entropy([1.0, 1.0, 1.0], 0.1), 6)
    1.0
    """
    if len(scores) < 2:
        return 0.0
    shares = _softmax(scores, temperature)
    return float(-(shares * np.log(np.maximum(shares, 1e-300))).sum() / math.log(len(scores)))


def blended(gains: Sequence[float], reranked: Sequence[float], temperature: float) -> list[float]:
    """The generator's distribution mixed with a cross-encoder's, as scores whose softmax over the temperature it is."""
    scores = np.asarray(reranked, dtype=np.float64)
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
    reranked: Sequence[float] | None = None,
) -> tuple[RetrieverExample | Reject, Judgement]:
    """The example of one question, its passages in the order of the teacher's scores, and how well the teacher judged.

    Args:
        query: with answers.
        candidates: of the index, with cosines.
        passages: of them, from `chosen`.
        gains: of the passages, from `passage_gains`.
        settings: training is used.
        count_tokens: the encoder's, as far as it reads.
        reranked: a cross-encoder's scores of the passages; None: there is none.
    """
    temperature = settings.training.teacher_temperature
    scores = blended(gains, reranked, temperature) if reranked is not None else list(gains)
    judgement = _judgement(query, candidates, passages, scores, temperature)
    order = sorted(range(len(passages)), key=lambda place: -scores[place])
    problem = _problem(query, passages, gains, order, judgement)
    if problem:
        return Reject(query.query_id, problem, "row"), judgement
    ranked = [(passages[place], scores[place]) for place in order]
    texts = [passage.text for passage, _ in ranked]
    read = [query.text] if settings.training.keeps_index else [query.text, *texts]
    return RetrieverExample(
        query_id=query.query_id,
        query=query.text,
        passage_ids=tuple(passage.passage_id for passage, _ in ranked),
        passages=tuple(texts),
        teacher_scores=tuple(score for _, score in ranked),
        num_tokens=sum(count_tokens(read)),
    ), judgement


def _problem(
    query: Query, passages: Sequence[Passage], gains: Sequence[float], order: Sequence[int], judgement: Judgement
) -> str:
    """Why a question teaches nothing that can be trusted; empty: it does."""
    answers = query.answers or ()
    if max(gains) < MIN_GAIN_NATS:
        return "no passage makes its answer likelier"
    holding = [holds_answer(passage.text, answers) for passage in passages]
    if any(holding) and not holding[order[0]]:
        return "the generator prefers a passage that does not hold the answer to one that does"
    if judgement.entropy > MAX_ENTROPY:
        return "the generator tells its passages apart too little"
    return ""


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
    cosines = dict(
        zip((passage.passage_id for passage in candidates.retrieved), candidates.retrieved_cosines, strict=True)
    )
    by_teacher = sorted(range(len(passages)), key=lambda place: -scores[place])
    by_retriever = sorted(range(len(passages)), key=lambda place: -cosines[passages[place].passage_id])
    ranks = [
        mrr_at_k(answering, [passages[place].passage_id for place in order], len(passages))
        for order in (by_teacher, by_retriever)
    ]
    return Judgement(ranks[0], ranks[1], spread)


def teacher_facts(judgements: Sequence[Judgement]) -> dict[str, float]:
    """What the gate of a teacher looks at: `MRR`, `retriever_MRR`, `entropy`, and `n`, the questions that can examine it."""
    examined = [
        (each.teacher_reciprocal_rank, each.retriever_reciprocal_rank)
        for each in judgements
        if each.teacher_reciprocal_rank is not None and each.retriever_reciprocal_rank is not None
    ]
    means = np.mean(examined, axis=0) if examined else np.zeros(2)
    return {
        "MRR": round(float(means[0]), 4),
        "retriever_MRR": round(float(means[1]), 4),
        "entropy": round(float(np.mean([each.entropy for each in judgements])), 4) if judgements else 0.0,
        "n": len(examined),
    }
