"""Answers of the model itself, as answers to learn from: which of them can be trusted.

In: a question, what was answered to it, and what was found out about that answer. Out: why it is refused, or nothing; and
questions with pseudo-labels. Every check looks at the answer and its passages alone, never at a gold answer. This module knows
nothing of how anything was answered, of files or of Ray.

| check | an answer is refused that |
|---|---|
| support | is none, or does not stand in the passage it cites (or none is cited) |
| likelihood | the generator is less sure of than of answers to validation questions that were right often enough |
| agreement | too few of further, sampled answers say too |
| round trip | is not given again from its cited passage alone; of made questions: does not find its passage again |

Whether its passage makes it likelier is asked where the retriever's teacher is (`teaching`), which rejects others.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ragtune_ray.evaluation.metrics import Language, token_f1
from ragtune_ray.ingest.splits import draw
from ragtune_ray.schema import Answer, Passage, Query
from ragtune_ray.training.examples import holds_answer

__all__ = [
    "agreement_problem",
    "capped",
    "cited_passage",
    "confidence_problem",
    "labelled",
    "question_of",
    "question_problem",
    "regenerated_problem",
    "says_the_same",
    "support_problem",
    "trusted_confidence",
]

SAME_F1 = 0.6
"""Token F1 from which two answers say the same."""
FEWEST_ANSWERS = 20
"""Of which a share must have been right: fewer say nothing."""
MIN_QUESTION_WORDS = 3
MAX_ANSWER_WORDS = 20
"""A longer text is a passage told again, not an answer."""
_POINTS_AWAY = ("passage", "the text", "the article", "the author", "this question", "the question")
"""What only means something beside the passage."""
_LABEL = re.compile(r"^\W*(?:question|q|问题|問題)\s*\d*\s*[:：]\W*", re.IGNORECASE)
_QUESTION_END = re.compile(r"[?？]")


def cited_passage(answer: Answer, passages: Mapping[str, Passage]) -> Passage | None:
    """The passage that an answer cites first and that holds it; None: there is none.

    Args:
        answer: with citations.
        passages: by passage_id, the shown ones at least.
    """
    for citation in answer.citations:
        passage = passages.get(citation.passage_id)
        if passage is not None and holds_answer(passage.text, [_bare(answer.answer)]):
            return passage
    return None


def _bare(text: str) -> str:
    """An answer without what ends a sentence, which its passage may not have there."""
    return text.strip().rstrip(".。!！")


def support_problem(answer: Answer, passages: Mapping[str, Passage]) -> str:
    """Why nothing supports an answer; empty: a passage does.

    Args:
        answer: as bulk answering gives it.
        passages: by passage_id.
    """
    if answer.status != "ok" or answer.abstained:
        return "was not answered"
    if len(answer.answer.split()) > MAX_ANSWER_WORDS:
        return "its answer is no short phrase"
    return "" if cited_passage(answer, passages) else "its answer does not stand in a passage that it cites"


def says_the_same(answer: str, others: Sequence[str], language: Language) -> bool:
    """Whether an answer says what any of the others does (token F1 of `SAME_F1` or more)."""
    return token_f1(answer, others, language) >= SAME_F1


def confidence_problem(answer: Answer, least: float) -> str:
    """Why an answer is not sure enough; empty: it is. An engine that tells no confidence is not sure."""
    return "" if (answer.confidence or 0.0) >= least else "the generator is not sure enough of it"


def trusted_confidence(confidences: npt.ArrayLike, is_right: npt.ArrayLike, least: float) -> tuple[float | None, float]:
    """From which confidence on answers are right often enough, by the rule of succession (right + 1 of all + 2); None: from none.

    >>> trusted_confidence([0.9] * 38 + [0.5] * 30, [True] * 38 + [False] * 30, 0.8)
    (0.9, 0.975)

    Args:
        confidences: (num_answers,) of answers whose gold answer is known, 0 to 1.
        is_right: (num_answers,) whether they were right.
        least: share of them that must be.

    Returns:
        The lowest such confidence; and that share of the answers from there on or, where there is none, of the `FEWEST_ANSWERS`
        surest (0 where there are not so many).
    """
    sure, right = np.asarray(confidences, dtype=np.float64), np.asarray(is_right, dtype=np.float64)
    share = 0.0
    for cut in np.unique(sure):
        kept = right[sure >= cut]
        if len(kept) < FEWEST_ANSWERS:
            break
        share = float((kept.sum() + 1) / (len(kept) + 2))
        if share >= least:
            return float(cut), share
    return None, share


def agreement_problem(answer: str, samples: Sequence[str], least: float, language: Language) -> str:
    """Why an answer is too lonely among samples of the same model; empty: it is not.

    >>> agreement_problem("in 1969", ["1969", "1969", "Mars"], 0.6, "en")
    ''

    Args:
        answer: that was given without sampling.
        samples: further answers; none: nothing is asked.
        least: share of them that must say the same.
        language: of the answers.
    """
    if not samples:
        return ""
    same = sum(says_the_same(answer, [sample], language) for sample in samples) / len(samples)
    return "" if same >= least else "samples of its answer do not agree"


def regenerated_problem(answer: str, again: Answer | None, least: float, language: Language) -> str:
    """Why an answer did not survive the round trip through its passage; empty: it did.

    Args:
        answer: the pseudo-label.
        again: what was answered from its cited passage alone; None: nothing was.
        least: token F1 of both.
        language: of the answers.
    """
    if again is None or again.status != "ok":
        return "was not answered from its passage alone"
    if token_f1(again.answer, [answer], language) >= least:
        return ""
    return "another answer is given from its passage alone"


def question_of(text: str) -> str:
    """The question in what a generator wrote when asked for one: its first, without a label before it.

    >>> question_of("Question: Who was first on the Moon? Answer: Armstrong. Who was second?")
    'Who was first on the Moon?'

    Args:
        text: as generated; one that asks nothing is given back whole, to be refused.
    """
    plain = _LABEL.sub("", " ".join(text.split()))
    end = _QUESTION_END.search(plain)
    return plain[: end.end()] if end else plain


def question_problem(question: str, passage: str) -> str:
    """Why a made question is none to ask; empty: it is one.

    >>> question_problem("this passage?", "...")
    'is no question that stands by itself'

    Args:
        question: that a generator made.
        passage: of which it was made.
    """
    text = question.strip()
    if "\n" in text or not text.endswith(("?", "？")) or len(text) < 2 * MIN_QUESTION_WORDS:
        return "is no question"
    if any(word in text.casefold() for word in _POINTS_AWAY):
        return "is no question that stands by itself"
    if len(text.split()) < MIN_QUESTION_WORDS and text.isascii():
        return "is no question"
    return "is copied from its passage" if text.rstrip("?？").casefold() in passage.casefold() else ""


def labelled(query: Query, answer: str, passage: Passage) -> Query:
    """The question with its pseudo-label, as a training question; its passage's document is the positive."""
    return dataclasses.replace(
        query, answers=(_bare(answer),), document_ids=(passage.document_id,), relevances=(1.0,), split="train"
    )


def capped(pseudo: Sequence[Query], num_gold: int, share: float, seed: int) -> list[Query]:
    """As many pseudo-labelled questions as the share of all allows, drawn by the seed and their ids; all where no gold ones are.

    >>> query = Query("q", "Why?", ("so",), (), (), "train")
    >>> len(capped([query] * 5, num_gold=3, share=0.5, seed=0))
    3
    """
    most = round(num_gold * share / (1 - share)) if num_gold else len(pseudo)
    drawn = sorted(pseudo, key=lambda query: draw(query.query_id, seed))[:most]
    return sorted(drawn, key=lambda query: query.query_id)
