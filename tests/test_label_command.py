"""`ragtune label` over a finished run of `evaluate`: in the terminal, resumed, extended, and from the command line."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ragtune_ray import cli, config
from ragtune_ray.cluster.answering import evaluate
from ragtune_ray.cluster.comparing import labelling
from ragtune_ray.evaluation.labelling import checking, labels
from ragtune_ray.evaluation.labelling.labels import LabelError
from ragtune_ray.storage import artifacts

GOLDEN = Path(__file__).parent / "data" / "golden" / "workspace"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Config:
    """A workspace with a comparison of three arms, in a copy of its folder; paths in it are relative."""
    shutil.copytree(GOLDEN, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return config.load("ragtune.yaml", [])


def label(monkeypatch: pytest.MonkeyPatch, typed: str, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with pytest.raises(SystemExit) as leaving:
        cli.main(["label", "ragtune.yaml", "--terminal", "--labeller", "ann", *options])
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def test_answers_are_labelled_in_the_terminal_and_the_work_is_resumed(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = labelling.open_desk(settings, "ann", 2)
    assert label(monkeypatch, "9\n" + "3\n" * len(desk.items[0].answers), "--questions", "2") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(Path.cwd() / "workspace/labels.jsonl")
    assert f"question  {desk.items[0].query}" in err
    assert "1 wrong, 2 partly, 3 right" in err
    assert not re.search(r"\b(rag|base)\b", err.partition("-- 0 of")[2].rpartition("label:")[0]), "the origin is hidden"
    found = labels.read("workspace/labels.jsonl")
    assert [row.key for row in found.rows] == list(desk.items[0].keys)
    assert {row.grade for row in found.rows} == {1.0}
    again = labelling.open_desk(settings, "ann", 2)
    assert (again.next_place(), again.num_done()) == (1, 1)
    more = labelling.open_desk(settings, "ann", 3).items
    back = "s\nu\n" + "1\n" * sum(len(item.answers) for item in more[1:])
    assert label(monkeypatch, back, "--questions", "3", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["done"], facts["total"], facts["labeller"]) == (len(more), len(more), "ann")


def test_more_questions_extend_the_same_order_with_all_arms_answers(settings: config.Config) -> None:
    few, all_of_them = labelling.open_desk(settings, "ann", 2), labelling.open_desk(settings, "ann", 1000)
    assert all_of_them.items[: len(few.items)] == few.items
    run = labelling.newest_run(settings)
    answers = {
        arm: {row.query_id: row.answer for row in evaluate.read_answers(url)}
        for arm, url in artifacts.read_manifest(run)["runs"].items()
    }
    scored = set(evaluate.read_scores(run, "base"))
    shown = {(item.query_id, answer) for item in all_of_them.items for answer in item.answers}
    assert shown == {(name, texts[name]) for texts in answers.values() for name in scored}
    other = labelling.open_desk(settings.with_values({"seed": 1}), "ann", 1000)
    assert [item.query_id for item in other.items] != [item.query_id for item in all_of_them.items]


def test_the_run_with_all_compared_arms_is_labelled_though_another_is_newer(
    settings: config.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = labelling.newest_run(settings)
    newer = Path(compared).with_name("evaluate-ffffffffffffffff")
    manifest = artifacts.read_manifest(compared)
    two = {arm: manifest["runs"][arm] for arm in ("base", "rag")}
    assert artifacts.publish(artifacts.stage(str(newer)), str(newer), "evaluate", config=manifest["config"], runs=two)
    assert labelling.newest_run(settings) == compared
    assert "label:" not in capsys.readouterr().err
    two_arms = settings.with_values({"compare.arms": ["base", "rag"]})
    assert labelling.newest_run(two_arms) == str(newer), "of those that have all arms, the newest"
    assert labelling.newest_run(settings.with_values({"compare.arms": ["base", "ft"]})) == str(newer)
    assert "evaluate-ffffffffffffffff has no answers of ft, which compare.arms names" in capsys.readouterr().err


def test_a_question_that_changed_since_it_was_answered_is_shown_as_it_was(settings: config.Config) -> None:
    before = labelling.open_desk(settings, "ann", 1000).items
    path = Path(settings.queries.path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    changed = before[0].query_id
    for row in rows:
        for name in {"text", "query", "question"} & row.keys():
            row[name] = "Another?" if changed in row.values() else row[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    now = labelling.open_desk(settings, "ann", 1000).items
    assert [item.query for item in now] == [item.query for item in before]
    assert {item.golds for item in now if item.query_id == changed} == {None}, (
        "its gold answers are of another question"
    )
    assert [item for item in now if item.query_id != changed] == [item for item in before if item.query_id != changed]


def test_the_sources_are_those_of_all_arms_and_gold_answers_are_shown(settings: config.Config) -> None:
    desk = labelling.open_desk(settings, "ann", 1000)
    assert all(item.golds is not None for item in desk.items)
    run = artifacts.read_manifest(labelling.newest_run(settings))["runs"]["rag"]
    (row,) = [row for row in evaluate.read_answers(run) if row.query_id == desk.items[0].query_id]
    shown = desk.sources(row.query_id)
    assert len(shown) >= len(set(row.passage_ids)) > 0
    assert all(source.text for source in shown)


def test_a_torn_line_is_reported_when_labelling_goes_on(
    settings: config.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("workspace/labels.jsonl").write_bytes(b'nonsense\n{"query_id": "q')
    labelling.open_desk(settings, "ann", 1)
    said = capsys.readouterr().err
    assert "labels.jsonl.torn; give this label again" in said
    assert "1 lines are no labels and do not count; the first: line 1: this is no JSON object" in said


def test_without_answers_there_is_nothing_to_label(settings: config.Config) -> None:
    with pytest.raises(LabelError, match=r"no answers of other\.jsonl to label; run ragtune evaluate"):
        labelling.newest_run(settings.with_values({"queries.path": "other.jsonl"}))


def test_the_page_is_served_until_it_is_interrupted(settings: config.Config) -> None:
    import signal
    import urllib.request

    command = [
        sys.executable,
        "-m",
        "ragtune_ray.cli",
        "label",
        "ragtune.yaml",
        "--labeller",
        "ann",
        "--questions",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        address = next(line.split()[2] for line in process.stderr if line.startswith("label: open http://127.0.0.1:"))
        with urllib.request.urlopen(address) as page:
            assert b"label answers" in page.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (0, str(Path.cwd() / "workspace/labels.jsonl"))
    assert "0 of" in err


def test_evaluate_says_how_labels_and_scores_agree(settings: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from ragtune_ray import terminal

    run = labelling.newest_run(settings)
    assert terminal.label_lines(run, settings) == [], "no judge and no labels"
    desk = labelling.open_desk(settings, "ann", 1000)
    for place, item in enumerate(desk.items):
        desk.grade(place, [1.0] * len(item.answers))
    said = " ".join(" ".join(terminal.label_lines(run, settings)).split())
    num_answers = sum(len(item.answers) for item in desk.items)
    assert f"of {num_answers} answers alike" in said
    assert "judge" not in said

    # The same answers with a judge that finds every answer wrong.
    questions = sorted({item.query_id for item in desk.items})
    monkeypatch.setattr(evaluate, "read_scores", lambda *_: {name: {"judge": 0.0} for name in questions})
    judged = settings.with_values({"evaluate.judge.model": "j", "evaluate.metrics": ["judge"]})
    said = " ".join(" ".join(terminal.label_lines(run, judged)).split())
    assert f"People and judge: 0 of {num_answers} answers alike" in said
    assert f"{20 - len(questions)} more questions must be labelled to correct the judge." in said
    monkeypatch.setattr(checking, "MIN_QUESTIONS", len(questions))
    lines = [line.split() for line in terminal.label_lines(run, judged) if line.startswith("judge, corrected")]
    assert [line[4:-2] for line in lines[:3]] == [["base"], ["rag"], ["rag+ft"]]
    assert [line[-2] for line in lines] == ["1.000"] * 3 + ["+0.000"] * 3
    Path("workspace/labels.jsonl").unlink()
    assert terminal.label_lines(run, judged) == [
        "judge: nobody has checked this judge: label some answers (ragtune label CONFIG)"
    ]
