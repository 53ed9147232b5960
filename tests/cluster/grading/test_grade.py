"""All arms are graded together, each distinct answer once, and a failed grade is never a 0; no Ray is started here."""

from pathlib import Path

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.cluster.grading import grade, workers
from ragtune_ray.evaluation.grading.task import Grade, GradingError, Task
from ragtune_ray.models.entailment import EntailmentModel
from ragtune_ray.schema import Answer, Passage, Query
from tests.support.answered import grade_in_this_process, publish_answers
from tests.support.comparisons import answer_row
from tests.support.models import save_nli_model


class Scripted:
    """Grades by the answer's text: its number of characters / 10; "broken" fails."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def grade(self, tasks: list[Task]) -> list[Grade]:
        self.seen += [task.answer for task in tasks]
        return [
            Grade(error="it broke")
            if task.answer == "broken"
            else Grade({"semantic": len(task.answer) / 10}, requests=1)
            for task in tasks
        ]


@pytest.fixture
def grader(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    grader = Scripted()
    monkeypatch.setattr(workers.graders, "open_grader", lambda *_: grader)
    grade_in_this_process(monkeypatch)
    return grader


@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    return config.load_config(
        {"workspace": str(tmp_path), "encoder.model": "hashing-64", "evaluate.metrics": ["semantic"]}
    )


def queries(count: int) -> list[Query]:
    return [Query(f"q{number}", "Who?", ("me",), (), (), "test") for number in range(count)]


def rows(*texts: str) -> list[Answer]:
    return [answer_row(f"q{number}", text) for number, text in enumerate(texts)]


def test_equal_answers_of_two_arms_are_graded_once_and_never_again(settings: config.Config, grader: Scripted) -> None:
    runs = {
        "base": publish_answers(settings.workspace, "base", rows("me", "you", "")),
        "ft": publish_answers(settings.workspace, "ft", rows("me", "nobody", "they")),
    }
    found = grade.grade(settings, queries(3), runs)
    assert found.values == {
        "base": {"q0": {"semantic": 0.2}, "q1": {"semantic": 0.3}, "q2": {"semantic": 0.0}},
        "ft": {"q0": {"semantic": 0.2}, "q1": {"semantic": 0.6}, "q2": {"semantic": 0.4}},
    }
    assert sorted(grader.seen) == ["me", "nobody", "they", "you"]
    assert found.facts["semantic"] == {
        "answers": 4, "known": 0, "failed": 0, "requests": 4, "prompt_tokens": 0, "completion_tokens": 0,
    }  # fmt: skip
    again = grade.grade(settings, queries(3), runs)
    assert again.values == found.values
    assert len(grader.seen) == 4
    assert again.facts["semantic"]["known"] == 4
    assert again.facts["semantic"]["requests"] == 0


def test_the_order_mixes_the_arms_and_depends_on_the_seed(settings: config.Config, grader: Scripted) -> None:
    orders = []
    for seed in (0, 1):
        given = settings.with_values({"seed": seed, "workspace": f"{settings.workspace}/{seed}"})
        runs = {
            arm: publish_answers(given.workspace, arm, rows(*(f"{arm} {number}" for number in range(20))))
            for arm in ("base", "ft")
        }
        grader.seen.clear()
        grade.grade(given, queries(20), runs)
        orders.append(list(grader.seen))
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    first = [text.startswith("base") for text in orders[0][:20]]
    assert 3 < sum(first) < 17


def test_a_failed_grade_leaves_its_question_out_in_every_arm(settings: config.Config, grader: Scripted) -> None:
    runs = {
        "base": publish_answers(settings.workspace, "base", rows("broken", "you", "we")),
        "ft": publish_answers(settings.workspace, "ft", rows("me", "nobody", "they")),
    }
    settings = settings.with_values({"evaluate.max_failed_grades": 0.2})
    found = grade.grade(settings, queries(3), runs)
    assert [found.values[arm]["q0"] for arm in runs] == [{}, {}]
    assert found.columns["base"]["q0"] == {"semantic_status": "failed", "semantic_reason": "it broke"}
    assert found.columns["ft"]["q0"] == {"semantic_status": "left_out", "semantic_reason": ""}
    assert found.columns["ft"]["q1"]["semantic_status"] == "graded"
    assert found.facts["semantic"]["failed"] == 1
    grader.seen.clear()
    grade.grade(settings, queries(3), runs)
    assert grader.seen == ["broken"], "only what failed is tried again"


def test_too_many_failed_grades_fail_the_run_and_keep_the_others(settings: config.Config, grader: Scripted) -> None:
    runs = {"base": publish_answers(settings.workspace, "base", rows("broken", "you"))}
    strict = settings.with_values({"evaluate.max_failed_grades": 0.4})
    with pytest.raises(GradingError, match=r"1 of 2 grades of semantic failed.*it broke.*run again"):
        grade.grade(strict, queries(2), runs)
    grader.seen.clear()
    with pytest.raises(GradingError):
        grade.grade(strict, queries(2), runs)
    assert grader.seen == ["broken"]


def test_questions_without_gold_answers_have_no_semantic_score(settings: config.Config, grader: Scripted) -> None:
    runs = {"base": publish_answers(settings.workspace, "base", rows("me", "you"))}
    unknown = Query("q1", "Who?", None, (), (), "test")
    assert grade.grade(settings, [*queries(1), unknown], runs).values["base"] == {"q0": {"semantic": 0.2}, "q1": {}}


def test_passages_are_read_from_the_index_and_shared_with_arms_that_have_none(
    workspace: str, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[Task] = []

    class Keeping:
        def grade(self, given: list[Task]) -> list[Grade]:
            tasks.extend(given)
            return [Grade({"judge": 1.0}) for _ in given]

    monkeypatch.setattr(workers.graders, "open_grader", lambda *_: Keeping())
    grade_in_this_process(monkeypatch)
    first, second = passages[3], passages[0]
    query = Query("q0", "Who?", None, (), (), "test")
    asked = answer_row("q0", "they", (first.passage_id, second.passage_id), index_version="000001")
    runs = {
        "base": publish_answers(workspace, "base", rows("me")),
        "rag": publish_answers(workspace, "rag", [asked], "000001"),
    }
    given = config.load_config(
        {"workspace": workspace, "evaluate.metrics": ["judge"], "evaluate.judge": {"model": "m"}}
    )
    grade.grade(given, [query], runs)
    assert {task.answer: task.passages for task in tasks} == dict.fromkeys(("me", "they"), (first.text, second.text))
    gone = answer_row("q0", "they", ("gone#0",), index_version="000001")
    with pytest.raises(
        GradingError, match=r"1 passages of its prompts are not in index version 000001, such as 'gone#0'"
    ):
        grade.grade(given, [query], {"rag": publish_answers(f"{workspace}", "rag2", [gone], "000001")})


def test_grading_stops_where_nothing_succeeds(
    settings: config.Config, grader: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        grader, "grade", lambda tasks: grader.seen.extend("x" for _ in tasks) or [Grade(error="refused")] * len(tasks)
    )
    many = rows(*(f"answer {number}" for number in range(100)))
    runs = {"base": publish_answers(settings.workspace, "base", many)}
    lenient = settings.with_values({"evaluate.max_failed_grades": 1.0})
    with pytest.raises(GradingError, match=r"all of the first 32 new grades of semantic failed.*refused"):
        grade.grade(lenient, queries(100), runs)
    assert len(grader.seen) == grade.FIRST_FAILURES


def test_a_killed_run_keeps_what_it_graded(
    settings: config.Config, grader: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {"base": publish_answers(settings.workspace, "base", rows(*(f"answer {number}" for number in range(100))))}
    plain = grader.grade

    def killed(tasks: list[Task]) -> list[Grade]:
        if len(grader.seen) >= 2 * grade.UNIT_TASKS:
            raise KeyboardInterrupt
        return plain(tasks)

    with monkeypatch.context() as patched:
        patched.setattr(grader, "grade", killed)
        with pytest.raises(KeyboardInterrupt):
            grade.grade(settings, queries(100), runs)
    assert len(grader.seen) == 2 * grade.UNIT_TASKS
    found = grade.grade(settings, queries(100), runs)
    assert sorted(grader.seen) == sorted(f"answer {number}" for number in range(100)), "each once, over both runs"
    assert len(found.values["base"]) == 100


def test_an_nli_model_grades_without_any_judge(
    workspace: str,
    passages: list[Passage],
    encoder_directory: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path_factory.mktemp("nli")
    save_nli_model(directory, encoder_directory)
    grade_in_this_process(monkeypatch)
    query = Query("q0", "Who?", None, (), (), "test")
    answers = {"one": "the sun is a star.", "two": "mars is red. the moon is far."}
    runs, expected = {}, {}
    model = EntailmentModel(str(directory), "cpu")
    for arm, text in answers.items():
        row = answer_row("q0", text, (passages[0].passage_id,), index_version="000001")
        runs[arm] = publish_answers(workspace, arm, [row], "000001")
        sentences = [f"{part.rstrip('.')}." for part in text.split(". ")]
        expected[arm] = np.mean(model.probabilities([(passages[0].text, each) for each in sentences]) >= 0.5)
    given = config.load_config(
        {"workspace": workspace, "evaluate.metrics": ["groundedness"], "evaluate.nli_model": str(directory)}
    )
    found = grade.grade(given, [query], runs)
    assert {arm: found.values[arm]["q0"]["groundedness"] for arm in runs} == expected
    assert found.facts["groundedness"]["requests"] == 0


def test_a_few_answers_that_fail_again_do_not_stop_a_run_that_allows_them(
    settings: config.Config, grader: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"answer {number}" for number in range(100)]
    runs = {"base": publish_answers(settings.workspace, "base", rows(*texts))}
    hard = set(texts[:40])

    def grade_all(tasks: list[Task]) -> list[Grade]:
        grader.seen += [task.answer for task in tasks]
        return [Grade(error="prose") if task.answer in hard else Grade({"semantic": 1.0}) for task in tasks]

    monkeypatch.setattr(grader, "grade", grade_all)
    lenient = settings.with_values({"evaluate.max_failed_grades": 0.4})
    assert grade.grade(lenient, queries(100), runs).facts["semantic"]["failed"] == 40
    grader.seen.clear()
    assert grade.grade(lenient, queries(100), runs).facts["semantic"]["failed"] == 40
    assert set(grader.seen) == hard, "these alone are asked for, and all of them fail"
    with pytest.raises(GradingError, match=r"all of the first 32 new grades"):
        grade.grade(settings.with_values({"evaluate.max_failed_grades": 0.3}), queries(100), runs)
