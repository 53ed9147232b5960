"""Answers without passages are checked against the passages of others, also where arms are not evaluated together."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cluster.comparing import calibrate, freshness, looks
from ragtune_ray.cluster.grading import workers
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.tuning import tune
from ragtune_ray.evaluation.grading.task import Grade, Task
from ragtune_ray.schema import Passage, Query
from tests.support.answered import grade_in_this_process, publish_answers
from tests.support.comparisons import answer_row


class Judge:
    """Accepts "right"; what it read is in `read`."""

    def __init__(self) -> None:
        self.read: dict[str, tuple[str, ...]] = {}

    def grade(self, tasks: list[Task]) -> list[Grade]:
        self.read |= {task.answer: task.passages for task in tasks}
        return [Grade({"judge": float(task.answer == "right")}) for task in tasks]


def judged(workspace: str) -> config.Config:
    return config.load_config(
        {"workspace": workspace, "compare.metric": "judge", "evaluate.judge": {"model": "m"}, "answer.arm": "rag"}
    ).with_compared_metric()


def unknown(count: int) -> list[Query]:
    return [Query(f"q{number}", "Who?", None, (), (), "test") for number in range(count)]


def test_a_calibration_grades_closed_book_answers_against_the_passages_of_the_others(
    workspace: str, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge()
    monkeypatch.setattr(workers.graders, "open_grader", lambda *_: judge)
    grade_in_this_process(monkeypatch)
    shown = (passages[0].passage_id,)
    closed = publish_answers(workspace, "closed", [answer_row("q0", "right"), answer_row("q1", "wrong")])
    opened = publish_answers(
        workspace,
        "opened",
        [answer_row(f"q{number}", "right", shown, index_version="000001") for number in (0, 1)],
        "000001",
    )
    rows, without, having = calibrate._paired(unknown(2), closed, opened, judged(workspace))
    assert [row.query_id for row in rows] == ["q0", "q1"]
    assert (without.tolist(), having.tolist()) == ([1.0, 0.0], [1.0, 1.0])
    assert judge.read == dict.fromkeys(("right", "wrong"), (passages[0].text,))


@pytest.mark.parametrize(("answers", "dropped"), [(None, ("rag+ft",)), (("me",), ("rag", "rag+ft"))])
def test_the_arm_whose_passages_the_judge_reads_goes_on_answering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: tuple[str, ...] | None, dropped: tuple[str, ...]
) -> None:
    settings = judged(str(tmp_path)).with_values({"compare.arms": ["base", "rag", "rag+ft"], "answer.unit_queries": 10})
    asked: list[tuple[str, ...]] = []

    def evaluated(given: config.Config, known: Mapping[str, str]) -> str:
        asked.append(given.evaluate.arms)
        return f"run {len(asked)}"

    rows = [Query(f"q{number}", "Who?", answers, (), (), "test") for number in range(200)]
    verdict: Any = SimpleNamespace(outcome="undecided", headline="")
    monkeypatch.setattr(looks.staged_queries, "selected_queries", lambda _: rows)
    monkeypatch.setattr(looks.evaluate, "evaluate", evaluated)
    monkeypatch.setattr(looks.runs, "read_manifest", lambda _: {"runs": dict.fromkeys(settings.compare.arms, "a")})
    monkeypatch.setattr(looks.decision, "differences", lambda *_: {})
    monkeypatch.setattr(looks.decision, "decide", lambda *_, **__: verdict)
    monkeypatch.setattr(looks.decision, "beaten", lambda *_: {"rag", "rag+ft"})
    found = looks.ask_until_decided(settings, lambda _, runs: dict.fromkeys(runs, SimpleNamespace(scores={})))
    assert found.looks.dropped == dropped
    assert asked == [("base", "rag", "rag+ft"), tuple(arm for arm in settings.compare.arms if arm not in dropped)]


def test_another_judge_is_another_calibration_and_another_tune(settings_for: Any, tmp_path: Path) -> None:
    plain = settings_for(tmp_path / "workspace")
    with_judges = [
        plain.using("compare.metric=judge", f"evaluate.judge.model={model}").with_compared_metric() for model in "ab"
    ]
    assert "graders" not in calibrate._rule(plain), "old calibrations stay"
    assert calibrate._rule(with_judges[0]) != calibrate._rule(with_judges[1])
    build_index(plain)
    assert "graders" not in tune._identity(plain), "old tunes stay"
    assert tune._identity(with_judges[0]) != tune._identity(with_judges[1])


@pytest.mark.parametrize(("metric", "rule"), [("groundedness", "always 0"), ("numeric_match", "gold answers for")])
def test_probe_questions_that_guard_nothing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, rule: str
) -> None:
    rows = [Query("q0", "Who?", ("me",), (), (), "all"), Query("q1", "Who?", None, (), (), "all")]
    monkeypatch.setattr(tune.staged_queries, "judged_queries", lambda _: rows)
    settings = judged(str(tmp_path)).with_values({"tune.probe_path": "probe.jsonl"})
    tune._check_probe(settings)
    with pytest.raises(tune.TuneError, match=rf"tune.probe_path=probe.jsonl: .*{rule}.*nothing would show"):
        tune._check_probe(settings.with_values({"compare.metric": metric}))


@pytest.mark.parametrize(("arm", "scored"), [("base", ["q1"]), ("rag", ["q0", "q1"])])
def test_answers_about_a_change_are_graded_only_where_something_tells_what_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str, scored: list[str]
) -> None:
    rows = [*unknown(1), Query("q1", "Who?", ("me",), (), (), "test")]
    seen: list[str] = []

    def scores_of(queries: list[Query], *_: Any) -> dict[str, dict[str, float]]:
        seen.extend(query.query_id for query in queries)
        return {query.query_id: {"judge": 1.0} for query in queries}

    monkeypatch.setattr(freshness.staged_queries, "judged_queries", lambda _: rows)
    monkeypatch.setattr(freshness.answer, "answer", lambda _: "run")
    monkeypatch.setattr(freshness.evaluate, "scores_of", scores_of)
    settings = judged(str(tmp_path)).with_values(
        {"compare.changed_queries_path": "changed.jsonl", "compare.deleted": ["d"]}
    )
    found = freshness.changed_scores(settings, settings, arm)
    assert found is not None
    assert (seen, found.n) == (scored, len(scored))
