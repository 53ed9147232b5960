"""A team without gold answers gets a verdict by a judge, each answer is graded once, and a second run asks for nothing."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ragtune_ray.cluster.comparing import check, looks
from ragtune_ray.cluster.comparing.compare import compare, read_comparison
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.storage import artifacts, filesystem
from tests.support.comparisons import judged_comparison

pytestmark = [pytest.mark.timeout(900), pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]
NUM_QUESTIONS = 24


def quoted(content: str) -> dict:
    """The JSON object at the beginning of what the judge reads."""
    return json.JSONDecoder().raw_decode(content)[0]


def reply(content: str) -> str:
    """Answers "forty-two" with passages and "unclear" without; as the judge, accepts "forty-two" and never grades question 3."""
    if not content.startswith("{"):
        return "forty-two [1]" if "[1]" in content else "It is unclear to many people"
    asked = quoted(content)
    if "sentences" in asked:
        rows = [{"sentence": each["sentence"], "passages": [1]} for each in asked["sentences"]]
        return json.dumps({"sentences": rows, "reason": "r"})
    if asked["question"] == "What is 3?":
        return "I would say it is fine."
    grade = "right" if asked["answer"] == "forty-two" else "wrong"
    assert asked["passages"]
    return json.dumps({"reason": "because", "supported": grade, "relevant": grade})


def test_arms_are_compared_without_gold_answers(settings_for, openai_stub, tmp_path: Path) -> None:
    settings, asked = judged_comparison(
        settings_for,
        openai_stub,
        tmp_path,
        NUM_QUESTIONS,
        reply,
        "evaluate.metrics=[groundedness]",
        "evaluate.judge.million_prompt_tokens=2.0",
    )
    unnamed = check.check(settings.using("evaluate.judge.model=''"))
    assert any("set evaluate.judge.model" in text for text in unnamed.errors)
    build_index(settings)
    checked = check.check(settings)
    assert checked.errors == ()
    grades = checked.facts["grades"]
    assert grades["requests"] == 2 * 2 * NUM_QUESTIONS  # two metrics, two arms
    assert grades["price"] == pytest.approx(grades["prompt_tokens"] * 2e-6)
    assert "grades at most 96 grades" in " ".join(" ".join(checked.lines()).split())

    run = compare(settings)
    found = read_comparison(run)
    assert (found["verdict"]["outcome"], found["verdict"]["arm"], found["metric"]) == ("recommended", "rag", "judge")
    quality = {arm: found["arms"][arm]["quality"] for arm in ("base", "rag")}
    assert [quality[arm]["judge"]["value"] for arm in quality] == [0.0, 1.0]
    assert {quality[arm]["judge"]["n"] for arm in quality} == {NUM_QUESTIONS - 1}
    assert [quality[arm]["groundedness"]["value"] for arm in quality] == [0.0, 1.0]
    assert "EM" not in quality["rag"]
    said = " ".join(found["verdict"]["warnings"])
    assert "1 questions are left out, because the grade of an answer failed" in said
    assert "nobody has checked" in said
    assert "judge" in (Path(run) / "report.html").read_text()

    judged = [quoted(text) for text in asked if text.startswith("{")]
    first = {(each["question"], each.get("answer")) for each in judged}
    assert (
        len(judged) == len(first) == 2 * NUM_QUESTIONS + NUM_QUESTIONS
    )  # groundedness reads only the arm with passages
    evaluated = run.manifest["evaluated"]
    facts = artifacts.read_manifest(evaluated)["grading"]["judge"]
    assert facts["requests"] == 2 * NUM_QUESTIONS + 2 * 2, "two answers to question 3, asked for twice more"
    assert facts["prompt_tokens"] == 9 * facts["requests"]
    table = pq.read_table(Path(evaluated) / "rag" / "scores.parquet").to_pylist()
    by_id = {row["query_id"]: row for row in table}
    assert (by_id["q0"]["judge"], by_id["q0"]["judge_status"], by_id["q0"]["judge_reason"]) == (
        1.0,
        "graded",
        "because",
    )
    assert (by_id["q3"]["judge"], by_id["q3"]["judge_status"]) == (None, "failed")

    for name in filesystem.list_names(f"{settings.workspace}/runs"):
        if name.startswith(("evaluate-", "compare-")):
            filesystem.remove(f"{settings.workspace}/runs/{name}")
    asked.clear()
    again = read_comparison(compare(settings))
    assert again["verdict"]["headline"] == found["verdict"]["headline"]
    graded_again = {quoted(text)["question"] for text in asked if text.startswith("{")}
    assert graded_again == {"What is 3?"}, "only what failed is asked for again"


def test_asking_and_grading_stop_with_the_verdict(
    settings_for, openai_stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "BATCH_QUESTIONS", 20)
    overrides = ["compare.until=decided", "compare.margin=0.2", "answer.unit_queries=10"]
    settings, asked = judged_comparison(settings_for, openai_stub, tmp_path, 80, reply, *overrides)
    build_index(settings)
    found = read_comparison(compare(settings))
    assert (found["verdict"]["outcome"], found["verdict"]["arm"], found["metric"]) == ("recommended", "rag", "judge")
    (num_asked,) = set(found["looks"]["asked"].values())
    assert num_asked < found["looks"]["available"] == 80
    judged = [quoted(text) for text in asked if text.startswith("{")]
    graded = {(each["question"], each["answer"]) for each in judged}
    assert len(graded) == 2 * num_asked, "each answer to a question that was asked, and no other"
    assert found["arms"]["rag"]["quality"]["judge"]["n"] == num_asked - ("What is 3?" in {name for name, _ in graded})
