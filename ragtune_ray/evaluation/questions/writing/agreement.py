"""Decides whether two answers say the same, by their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ragtune_ray.config import Language, Normalization
from ragtune_ray.evaluation.metrics.answers import contains_answer, token_f1
from ragtune_ray.evaluation.metrics.normalization import normalize_answer

SAME_F1 = 0.6
"""Two short answers with at least this token F1 say the same."""
SHORT_TOKENS = 8
"""A longer answer can be worded in many ways."""


def says_the_same(
    answer: str,
    others: Sequence[str],
    language: Language,
    normalization: Normalization = "strict",
    least: float = SAME_F1,
) -> bool:
    """Whether an answer has a token F1 of at least `least` with any of the others.

    >>> says_the_same("in the year 1969", ["1969"], "en"), says_the_same("in 1969", ["1969"], "en")
    (False, True)
    """
    return token_f1(answer, others, language, normalization) >= least


def is_short(answer: str, language: Language, normalization: Normalization = "strict") -> bool:
    """Whether an answer has at most `SHORT_TOKENS` tokens."""
    return len(normalize_answer(answer, language, normalization).split()) <= SHORT_TOKENS


def gives(
    reply: str,
    answer: str,
    language: Language,
    normalization: Normalization = "strict",
    *,
    least: float = SAME_F1,
    least_long: float,
) -> bool:
    """Whether a reply gives an answer: a short one by containing it or by a token F1 of `least`, a long one by `least_long`.

    >>> gives("It was launched in 1990 by the shuttle Discovery.", "1990", "en", least_long=0.35)
    True
    """
    if is_short(answer, language, normalization):
        same = says_the_same(reply, [answer], language, normalization, least)
        return same or bool(contains_answer(reply, [answer], language, normalization))
    return says_the_same(reply, [answer], language, normalization, least_long)
