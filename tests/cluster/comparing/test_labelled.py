"""People's labels correct a judge that is wrong: the next comparison asks neither the arms nor the judge again."""

import json
from pathlib import Path

import pytest

from ragtune_ray.cluster.comparing import labelling
from ragtune_ray.cluster.comparing.compare import compare
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.evaluation.labelling import labels
from ragtune_ray.evaluation.labelling.labels import Label
from ragtune_ray.evaluation.report import plain_text
from tests.support.comparisons import judged_comparison

pytestmark = [pytest.mark.timeout(900), pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]
NUM_QUESTIONS, NUM_LABELLED = 30, 22


def reply(content: str) -> str:
    """Says "long" with passages and "short" without; as the judge, finds every "long" right and every "short" wrong."""
    if not content.startswith("{"):
        return "long" if "[1]" in content else "short"
    quoted = json.JSONDecoder().raw_decode(content)[0]
    grade = "right" if quoted["answer"] == "long" else "wrong"
    return json.dumps({"reason": "r", "correct": grade, "grade": grade, "supported": grade, "relevant": grade})


def test_labels_turn_the_verdict_round_and_nothing_is_asked_again(settings_for, openai_stub, tmp_path: Path) -> None:
    settings, asked = judged_comparison(settings_for, openai_stub, tmp_path, NUM_QUESTIONS, reply)
    build_index(settings)
    judged = compare(settings)
    assert (judged.comparison.verdict.arm, judged.comparison.checked) == ("rag", None)
    assert any("nobody has checked" in text for text in judged.comparison.verdict.warnings)

    assert judged.comparison.questions.kinds() == f"{NUM_QUESTIONS} without gold answers"
    assert {example.gold for example in judged.comparison.examples} == {None}
    assert "No gold answer is known." in (Path(judged.path) / "report.html").read_text(encoding="utf-8")

    desk = labelling.open_desk(settings, "ann", NUM_LABELLED)
    assert desk.path == tmp_path / "workspace" / "labels.jsonl"
    for place, item in enumerate(desk.items):
        desk.grade(place, [float(answer == "short") for answer in item.answers])
    labels.append(desk.path, [Label("q1", "?", "of another run", 1.0, "ann", "")])
    asked.clear()
    corrected = compare(settings)
    assert not [content for content in asked if content.startswith("{")], "the judge is not asked again"
    assert len(asked) <= 4, "the arms only to measure latency"
    found = corrected.comparison
    assert corrected.path != judged.path
    assert corrected.manifest["evaluated"] == judged.manifest["evaluated"]
    assert (found.verdict.outcome, found.verdict.arm) == ("recommended", "base")
    checked = found.checked
    assert checked is not None
    assert (checked.corrected, checked.answers, checked.questions, checked.others) == (True, 44, 22, 1)
    assert (checked.overall.alike, checked.overall.kappa) == (0, pytest.approx(-1.0))
    for arm, mean, alone in (("base", 1.0, 0.0), ("rag", 0.0, 1.0)):
        shown, before = found.arms[arm].quality["judge"], checked.arms[arm].alone
        assert shown is not None
        assert before is not None
        assert (shown.value, before.value) == (mean, alone)
        assert shown.high - shown.low > 0.005
    (row,) = found.differences
    assert (row.arm, row.against, row.value, row.labels) == ("rag", "base", -1.0, NUM_LABELLED)
    lines = "\n".join(plain_text.comparison_lines(found.content()))
    assert "corrected by these labels" in lines
    assert "judge uncorrected" in (Path(corrected.path) / "report.html").read_text(encoding="utf-8")
    assert compare(settings).path == corrected.path, "the same labels make the same comparison"
