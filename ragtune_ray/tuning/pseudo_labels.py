"""Decides which of the model's own answers can serve as training labels, without looking at gold answers.

| check | refuses an answer if |
|---|---|
| support | it is missing, or no passage that it cites contains it |
| likelihood | the generator's confidence is below `trusted_confidence`, measured on validation questions |
| agreement | too few sampled answers say the same |
| round trip | the cited passage alone leads to another answer; or a generated question does not find its passage |

Later, `teaching` checks whether the passage makes the answer more likely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ragtune_ray.config import Language, Normalization
from ragtune_ray.evaluation.metrics.answers import token_f1
from ragtune_ray.evaluation.questions.writing.agreement import says_the_same
from ragtune_ray.ingest.splits import draw
from ragtune_ray.schema import Answer, Passage, Query
from ragtune_ray.training.examples import holds_answer

FEWEST_ANSWERS = 20
"""The share of correct answers is not reliable with fewer answers."""
MAX_ANSWER_WORDS = 20
"""A longer text retells a passage instead of answering."""


def cited_passage(answer: Answer, passages: Mapping[str, Passage]) -> Passage | None:
    """The first cited passage that contains the answer, or None; `passages` (by id) must include those that were shown."""
    for citation in answer.citations:
        passage = passages.get(citation.passage_id)
        if passage is not None and holds_answer(passage.text, [_unpunctuated(answer.answer)]):
            return passage
    return None


def _unpunctuated(text: str) -> str:
    """An answer without final punctuation, because the passage may continue differently."""
    return text.strip().rstrip(".。!！")


def support_problem(answer: Answer, passages: Mapping[str, Passage]) -> str:
    """Why no passage supports an answer; empty if one of `passages` (by id) does."""
    if answer.status != "ok" or answer.abstained:
        return "was not answered"
    if answer.cut:
        return "its answer was cut at generator.max_new_tokens"
    if len(answer.answer.split()) > MAX_ANSWER_WORDS:
        return "its answer is not a short phrase"
    return "" if cited_passage(answer, passages) else "its answer is not in a passage that it cites"


def confidence_problem(answer: Answer, least: float) -> str:
    """Why the generator is not confident enough of an answer; empty if it is. No confidence counts as 0."""
    return "" if (answer.confidence or 0.0) >= least else "the generator is not confident enough"


def trusted_confidence(confidences: npt.ArrayLike, is_right: npt.ArrayLike, least: float) -> tuple[float | None, float]:
    """The lowest confidence above which enough answers are correct, by the rule of succession (correct + 1) / (all + 2).

    >>> trusted_confidence([0.9] * 38 + [0.5] * 30, [True] * 38 + [False] * 30, 0.8)
    (0.9, 0.975)

    Arrays are (num_answers,), and `least` is the required share of correct answers.

    Returns:
        The lowest such confidence, or None; and the share of correct answers above it, or without it that of the most
        confident `FEWEST_ANSWERS` (0 if there are fewer).
    """
    values, right = np.asarray(confidences, dtype=np.float64), np.asarray(is_right, dtype=np.float64)
    share = 0.0
    for cut in np.unique(values):
        kept = right[values >= cut]
        if len(kept) < FEWEST_ANSWERS:
            break
        share = float((kept.sum() + 1) / (len(kept) + 2))
        if share >= least:
            return float(cut), share
    return None, share


def agreement_problem(
    answer: str, samples: Sequence[str], least: float, language: Language, normalization: Normalization = "strict"
) -> str:
    """Why too few sampled answers agree with the greedy one; empty if a share of at least `least` does, or without samples.

    >>> agreement_problem("in 1969", ["1969", "1969", "Mars"], 0.6, "en")
    ''
    """
    if not samples:
        return ""
    same = sum(says_the_same(answer, [sample], language, normalization) for sample in samples) / len(samples)
    return "" if same >= least else "samples of its answer do not agree"


def regenerated_problem(
    answer: str,
    regenerated: Answer | None,
    least: float,
    language: Language,
    normalization: Normalization = "strict",
) -> str:
    """Why the cited passage alone does not lead to the same answer; empty if it does, with a token F1 of at least `least`."""
    if regenerated is None or regenerated.status != "ok":
        return "was not answered from its passage alone"
    same = token_f1(regenerated.answer, [answer], language, normalization) >= least
    return "" if same else "its passage alone leads to another answer"


def labelled(query: Query, answer: str, passage: Passage) -> Query:
    """The question as a training question with a pseudo-label; the passage's document becomes relevant."""
    return dataclasses.replace(
        query, answers=(_unpunctuated(answer),), document_ids=(passage.document_id,), relevances=(1.0,), split="train"
    )


def capped(pseudo: Sequence[Query], num_gold: int, share: float, seed: int) -> list[Query]:
    """Limit pseudo-labelled questions to a share of all, drawn by the seed and their ids; all if there are no gold ones.

    >>> query = Query("q", "Why?", ("so",), (), (), "train")
    >>> len(capped([query] * 5, num_gold=3, share=0.5, seed=0))
    3
    """
    most = round(num_gold * share / (1 - share)) if num_gold else len(pseudo)
    drawn = sorted(pseudo, key=lambda query: draw(query.query_id, seed))[:most]
    return sorted(drawn, key=lambda query: query.query_id)
