"""Proposes the metric that fits the gold answers of a set of questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ragtune_ray.config import DecidingMetric
from ragtune_ray.evaluation.questions.answer_kinds import IN_SENTENCES, AnswerKind

NEARLY_ALL = 0.9
"""Share of numbers among the gold answers from which `numeric_match` is proposed: it scores no other answers."""
MOST = 0.5
"""Share of sentences, lists and longer answers above which they decide."""
SHORT: frozenset[DecidingMetric] = frozenset({"EM", "token_F1", "contains_answer"})
_GRADED = frozenset[DecidingMetric]({"judge", "groundedness"})


@dataclass(frozen=True, slots=True)
class Proposal:
    """A metric for `compare.metric`."""

    metric: DecidingMetric
    reason: str
    fitting: frozenset[DecidingMetric]
    """Metrics that fit as well, the proposed one included."""
    is_makeshift: bool = False
    """Whether a model that grades would fit better, and none is set."""

    def advice(self, metric: DecidingMetric) -> str:
        """One line for someone who set this metric; empty if there is nothing to say."""
        if metric not in self.fitting:
            return f"compare.metric={metric}; {self.metric} fits better: {self.reason}"
        return f"compare.metric={metric}: {self.reason}" if self.is_makeshift and metric not in _GRADED else ""


def propose(kinds: Mapping[AnswerKind, int], *, has_judge: bool) -> Proposal:
    """The metric for questions with gold answers of these kinds (kind -> questions).

    >>> propose({"short phrase": 70, "sentence": 30}, has_judge=False).metric
    'token_F1'
    >>> propose({"short phrase": 30, "sentence": 70}, has_judge=False).metric
    'ROUGE_L'
    """
    answered = sum(count for kind, count in kinds.items() if kind not in ("none known", "unanswerable"))
    worded = sum(count for kind, count in kinds.items() if kind in IN_SENTENCES)
    numbers = kinds.get("number", 0)
    if not answered:
        return _without_gold_answers(has_judge=has_judge)
    if numbers >= NEARLY_ALL * answered:
        reason = f"{numbers:,} of {answered:,} gold answers are numbers, which may be written with other words, units or digits"
        return Proposal("numeric_match", reason, frozenset({"numeric_match"}))
    if worded <= MOST * answered:
        reason = f"{answered - worded:,} of {answered:,} gold answers are short, so their words decide"
        return Proposal("token_F1", reason, SHORT)
    told = f"{worded:,} of {answered:,} gold answers are sentences, lists or longer"
    if has_judge:
        return Proposal("judge", f"{told}, of which several wordings are right", frozenset({"judge"}))
    reason = (
        f"{told}, and no judge is set (evaluate.judge). Words in their order count, so a wrong fact costs only its share of the"
        " words, and another wording than the gold answers costs more: give several wordings, or set a judge"
    )
    return Proposal("ROUGE_L", reason, frozenset({"ROUGE_L", "token_F1", "judge"}), is_makeshift=True)


def _without_gold_answers(*, has_judge: bool) -> Proposal:
    if has_judge:
        return Proposal("judge", "no question has a gold answer, so a model must grade", _GRADED)
    reason = (
        "no question has a gold answer, and no judge is set (evaluate.judge); groundedness with evaluate.nli_model asks only"
        " whether passages support an answer"
    )
    return Proposal("groundedness", reason, _GRADED, is_makeshift=True)
