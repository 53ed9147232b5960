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
import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ragtune_ray.config import Language, Normalization
from ragtune_ray.evaluation.metrics.answers import token_f1
from ragtune_ray.ingest.splits import draw
from ragtune_ray.schema import Answer, Passage, Query
from ragtune_ray.training.examples import holds_answer

SAME_F1 = 0.6
"""Two answers with at least this token F1 say the same."""
FEWEST_ANSWERS = 20
"""The share of correct answers is not reliable with fewer answers."""
MIN_QUESTION_WORDS = 3
MAX_ANSWER_WORDS = 20
"""A longer text retells a passage instead of answering."""
_POINTS_AWAY = ("passage", "the text", "the article", "the author", "this question", "the question")
"""Words of questions that make sense only to a reader of the passage."""
_LABEL = re.compile(r"^\W*(?:question|q|问题|問題)\s*\d*\s*[:：]\W*", re.IGNORECASE)
_QUESTION_END = re.compile(r"[?？]")


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


def says_the_same(
    answer: str, others: Sequence[str], language: Language, normalization: Normalization = "strict"
) -> bool:
    """Whether an answer has a token F1 of `SAME_F1` or more with any of the others."""
    return token_f1(answer, others, language, normalization) >= SAME_F1


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


def question_of(text: str) -> str:
    """Extract the first question from generated text, without a label before it; without a question the whole text.

    >>> question_of("Question: Who was first on the Moon? Answer: Armstrong. Who was second?")
    'Who was first on the Moon?'
    """
    plain = _LABEL.sub("", " ".join(text.split()))
    end = _QUESTION_END.search(plain)
    return plain[: end.end()] if end else plain


def question_problem(question: str, passage: str) -> str:
    """Why a question generated from a passage is not usable; empty if it is.

    >>> question_problem("this passage?", "...")
    'is not a self-contained question'
    """
    text = question.strip()
    if "\n" in text or not text.endswith(("?", "？")) or len(text) < 2 * MIN_QUESTION_WORDS:
        return "is not a question"
    if any(word in text.casefold() for word in _POINTS_AWAY):
        return "is not a self-contained question"
    if len(text.split()) < MIN_QUESTION_WORDS and text.isascii():
        return "is not a question"
    return "is copied from its passage" if text.rstrip("?？").casefold() in passage.casefold() else ""


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
