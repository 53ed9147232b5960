"""What a comparison says about metrics that see another arm ahead, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ragtune_ray import config, schema
from ragtune_ray.cluster.comparing import summary
from ragtune_ray.evaluation.verdict import Disagreement, Verdict
from tests.support.comparisons import answer_row


def test_contested_metrics_show_both_answers_and_both_scores_of_the_questions_that_differ_most() -> None:
    queries = [schema.Query(f"q{n}", f"Question {n}?", (f"gold {n}",), (), (), "all") for n in range(6)]
    lead = {"q1": 0.5, "q4": 1.0}

    def measured(arm: str) -> Any:
        is_ahead = arm == "rag"  # by the judge
        scores = {
            query.query_id: {"token_F1": 0.2, "judge": 0.5 + (lead.get(query.query_id, 0.0) / 2) * is_ahead}
            for query in queries
        }
        scores["q0"] = {"token_F1": 1.0}  # its grade failed
        rows = {query.query_id: answer_row(query.query_id, f"{arm} says {query.query_id}") for query in queries}
        return SimpleNamespace(scores=scores, rows=rows)

    verdict = Verdict(
        "recommended", "ft", "Use ft.", disagreements=(Disagreement("rag", "judge", 0.65, 0.5, 0.05, 0.25, 5),)
    )
    (found,) = summary._contested(config.Config(), {arm: measured(arm) for arm in ("rag", "ft")}, queries, verdict)
    assert (found.metric, found.arm, found.against, found.score, found.against_score) == (
        "judge",
        "rag",
        "ft",
        0.65,
        0.5,
    )
    assert (found.low, found.high, found.n) == (0.05, 0.25, 5)
    assert [each.query_id for each in found.questions] == ["q4", "q1"], "the other questions do not differ"
    shown = found.questions[0]
    assert (shown.query, shown.gold) == ("Question 4?", ("gold 4",))
    assert {arm: (each.text, each.score, each.other) for arm, each in shown.answers.items()} == {
        "rag": ("rag says q4", 0.2, 1.0),
        "ft": ("ft says q4", 0.2, 0.5),
    }
