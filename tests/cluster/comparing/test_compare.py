"""`ragtune compare` on tiny models: verdict and files, resuming, refusals, changed documents, calibration."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import staged_queries
from ragtune_ray.cluster.answering import answer, evaluate
from ragtune_ray.cluster.comparing import calibrate, freshness, measure
from ragtune_ray.cluster.comparing import compare as compare_module
from ragtune_ray.cluster.comparing.compare import ComparisonResult, compare, read_comparison
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.training.train import train
from ragtune_ray.cluster.tuning import judging
from ragtune_ray.evaluation import adaptive
from ragtune_ray.index import contents, snapshot, versions
from ragtune_ray.storage import artifacts, filesystem
from tests.support.corpora import write_corpus, write_queries

pytestmark = [pytest.mark.timeout(1500), pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("shared_ray")]

TIMED = {
    "latency",
    "throughput",
    "cost",
    "break_even",
    "created",
    "seconds",
    "visible_seconds",
    "reason",
    "weighed",
    "config",
    "model",
}
"""Keys in which two runs with the same seed may differ: timings, sentences that cite them, and paths."""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("changes")
    write_corpus(folder / "changes.jsonl", 4, seed=9)
    text = (folder / "changes.jsonl").read_text().replace("secret", "novel")
    (folder / "changes.jsonl").write_text(text)
    write_queries(folder / "changed.jsonl", 4)
    text = (folder / "changed.jsonl").read_text().replace('["secret', '["novel')
    (folder / "changed.jsonl").write_text(text)
    write_queries(folder / "probe.jsonl", 5)
    return [
        "queries.split_by=document",
        "retrieval.top_k=2",
        "training.batch_examples=8",
        "training.max_tokens=900",
        "training.precision=float32",
        "training.max_steps=2",
        "training.gold_left_out_share=0",
        "compare.latency_queries=2",
        "cluster.encoder_workers=1",
        "cluster.generator_workers=1",
        f"compare.changes_path={folder / 'changes.jsonl'}",
        f"compare.changed_queries_path={folder / 'changed.jsonl'}",
        f"compare.probe_path={folder / 'probe.jsonl'}",
    ]


@pytest.fixture(scope="module")
def compared(
    settings_for, options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[config.Config, ComparisonResult]:
    settings = settings_for(tmp_path_factory.mktemp("compare") / "workspace", *options)
    build_index(settings)
    return settings, compare(settings, "ragtune compare a.yaml")


def without_timings(value: Any) -> Any:
    match value:
        case dict():
            return {name: without_timings(each) for name, each in value.items() if name not in TIMED}
        case list():
            return [without_timings(each) for each in value]
    return value


def test_four_arms_are_trained_and_compared(compared: tuple[config.Config, ComparisonResult]) -> None:
    url = compared[1]
    found = read_comparison(url)
    assert list(found["arms"]) == ["base", "rag", "ft", "rag+ft"]
    num_test = found["questions"]["total"]
    assert 0 < num_test < 40
    for name, arm in found["arms"].items():
        assert arm["statuses"] == {"ok": num_test, "failed": 0}
        assert sum(arm["losses"].values()) == num_test
        assert arm["latency"]["n"] == 2
        assert (arm["index_version"] == "") == (name in ("base", "ft"))
        assert (arm["cost"]["training"] > 0) == ("ft" in name)
        assert (arm["cost"]["index"] > 0) == ("rag" in name)
        assert (arm["forgetting"] is not None) == ("ft" in name)
        assert arm["freshness"]["changed"]["n"] == 4
    others = set(found["arms"]) - {found["verdict"]["arm"]}
    assert {(row["arm"], row["against"]) for row in found["differences"]} == {
        (arm, found["verdict"]["arm"]) for arm in others
    }
    assert set(found["ceilings"]["tuned model"]) == {"closed_book", "retrieved", "gold_passage"}
    assert found["retrieval"]["recall@5"]["n"] == num_test
    assert found["command"] == "ragtune compare a.yaml"
    assert url.manifest["verdict"]["arm"] == found["verdict"]["arm"]
    report = (Path(url) / "report.html").read_text()
    assert found["verdict"]["headline"] in report
    table = url.to_arrow().to_pylist()
    assert {row["arm"] for row in table} == set(found["arms"])
    assert {row["metric"]: row["value"] for row in table if row["arm"] == "rag"}["EM"] == (
        found["arms"]["rag"]["quality"]["EM"]["value"]
    )


def test_scores_are_recomputed_from_the_answers(compared: tuple[config.Config, ComparisonResult]) -> None:
    settings, url = compared
    found = read_comparison(url)
    judged = staged_queries.judged_queries(settings.using("queries.split=test"))
    for name, arm in found["arms"].items():
        run = artifacts.read_manifest(url.manifest["evaluated"])["runs"][name]
        rows = {row.query_id: row for row in evaluate.read_answers(run)}
        contained = [any(gold in rows[query.query_id].answer for gold in query.answers or ()) for query in judged]
        assert arm["quality"]["contains_answer"]["value"] == pytest.approx(sum(contained) / len(contained))


def test_finished_comparison_is_not_repeated(
    compared: tuple[config.Config, ComparisonResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, url = compared

    def never(*_: Any) -> None:
        raise AssertionError("nothing must be measured again")

    monkeypatch.setattr(measure, "measure", never)
    assert compare(settings) == url


@pytest.mark.long
def test_same_seed_gives_the_same_comparison(settings_for, options: list[str], tmp_path: Path) -> None:
    found = []
    for name in ("first", "second"):
        # With one answer, the cost of training decides which arm is cheaper, not a close race of two timings.
        plain = [*(option for option in options if "_path" not in option), "compare.answers=1"]
        settings = settings_for(tmp_path / name, *plain, "compare.arms=[rag, rag+ft]", "compare.gold_passages=false")
        build_index(settings)
        found.append(without_timings(read_comparison(compare(settings))))
    assert found[0] == found[1]


def test_killed_comparison_answers_nothing_twice(
    compared: tuple[config.Config, ComparisonResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = compared[0].using("compare.margin=0.5")  # a different comparison of the same answers

    def dies(*_: Any) -> None:
        raise RuntimeError("killed")

    answered = []
    monkeypatch.setattr(answer, "_generate", lambda *_: answered.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(compare_module.summary, "comparison_of", dies)
        with pytest.raises(RuntimeError, match="killed"):
            compare(settings.using("compare.changes_path=", "compare.changed_queries_path="))
    url = compare(settings.using("compare.changes_path=", "compare.changed_queries_path="))
    assert not answered
    assert read_comparison(url)["margin"] == 0.5


def test_changes_are_applied_to_a_copy_of_the_index(compared: tuple[config.Config, ComparisonResult]) -> None:
    settings = compared[0]
    assert versions.current_version(settings.workspace) == "000001"
    assert not [
        name
        for name in filesystem.list_names(filesystem.join(settings.workspace, "runs", ".work"))
        if "changed" in name
    ]
    changed, seconds = freshness.follow_changes(settings)
    assert seconds > 0
    asked = changed.using(f"queries.path={settings.compare.changed_queries_path}", "queries.split_by=given")
    rows = evaluate.read_answers(str(answer.answer(asked)))
    assert {row.index_version for row in rows} == {"000002"}
    freshness.remove_copy(settings)


def test_of_an_index_in_shards_the_one_with_the_changes_is_opened(
    compared: tuple[config.Config, ComparisonResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = compared[0].using("cluster.shard_bytes=1")
    opened = []
    open_index = snapshot.open_index

    def note(*given: Any, **named: Any) -> snapshot.Index:
        opened.append(open_index(*given, **named))
        return opened[-1]

    monkeypatch.setattr(snapshot, "open_index", note)
    changed, _ = freshness.follow_changes(settings)
    (index,) = opened
    assert index.version == versions.current_version(changed.workspace) == "000002"
    added = contents.difference(
        changed.workspace, *(versions.read_version(changed.workspace, name) for name in ("000001", "000002"))
    )
    assert set(index.passages["document_id"].to_pylist()) == {*added["added"], *added["changed"]}
    freshness.remove_copy(settings)


def test_model_trained_on_other_splits_is_refused(settings_for, options: list[str], tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "workspace", *options, "compare.arms=[ft]")
    train(settings.using("queries.split_seed=5", "training.arm=ft"))
    with pytest.raises(evaluate.EvaluationError, match=r"queries.split_seed=5, but this config has 0"):
        compare(settings)


@pytest.mark.long
def test_arms_from_different_generators_are_refused(
    settings_for, options: list[str], generator_directory: Path, tmp_path: Path
) -> None:
    settings = settings_for(tmp_path / "workspace", *options, "compare.arms=[base, ft]")
    train(settings.using("training.arm=ft"))
    another = tmp_path / "another"
    shutil.copytree(generator_directory, another)
    (another / "added.txt").write_text("another model")
    with pytest.raises(evaluate.EvaluationError, match=rf"was trained from {generator_directory} .*={another} is"):
        compare(settings.using(f"generator.model={another}"))


def other_questions(settings: config.Config, path: Path, rows: list[dict[str, Any]], *overrides: str) -> config.Config:
    """A config that asks other questions in the compared workspace."""
    path.write_text("".join(json.dumps({**row, "split": "test"}) + "\n" for row in rows))
    return settings.using(
        f"queries.path={path}",
        "queries.split_by=given",
        "compare.latency_queries=1",
        "compare.changes_path=",
        "compare.changed_queries_path=",
        *overrides,
    )


@pytest.fixture
def rows(queries: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in queries.read_text().splitlines()]


def test_failed_rows_are_counted_in_the_comparison(
    compared: tuple[config.Config, ComparisonResult], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    for row in rows[:30:2]:
        row["text"] += " please" * 400
    overrides = ("prompt.max_tokens=400", "compare.arms=[base]", "answer.max_failed_share=0.6")
    found = read_comparison(compare(other_questions(compared[0], tmp_path / "queries.jsonl", rows[:30], *overrides)))
    assert found["arms"]["base"]["statuses"] == {"ok": 15, "failed": 15}
    assert found["arms"]["base"]["losses"]["failed"] == 15
    assert any("50.0% of the rows of base failed" in line for line in found["verdict"]["warnings"])


@pytest.mark.parametrize(("number", "gold", "arms"), [(1, ["secret0"], "[base]"), (25, [], "[base, rag]")])
def test_one_question_or_only_unanswerable_ones_give_a_verdict(
    compared: tuple[config.Config, ComparisonResult],
    rows: list[dict[str, Any]],
    tmp_path: Path,
    number: int,
    gold: list[str],
    arms: str,
) -> None:
    asked = [{**row, "answers": gold} for row in rows[:number]]
    found = read_comparison(
        compare(other_questions(compared[0], tmp_path / "queries.jsonl", asked, f"compare.arms={arms}"))
    )
    # 25 questions without a difference prove little.
    assert found["verdict"]["outcome"] == "too_few_questions"
    assert found["verdict"]["arm"] == "base"
    answerable = number if gold else 0
    assert sum(found["arms"]["base"]["losses"].values()) == answerable


def test_questions_without_gold_answers_are_refused(
    compared: tuple[config.Config, ComparisonResult], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    asked = [{"query_id": row["query_id"], "text": row["text"]} for row in rows[:3]]
    with pytest.raises(evaluate.EvaluationError, match="no query has `answers`"):
        compare(other_questions(compared[0], tmp_path / "queries.jsonl", asked, "compare.arms=[base]"))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (("workspace=WORKSPACE",), "has no index"),
        (("queries.split_shares=[1, 0, 0]",), "contains no usable query"),
        (("compare.probe_path=nowhere.jsonl",), r"nowhere\.jsonl"),
        (("compare.changes_path=nowhere",), "nowhere"),
    ],
)
def test_unreadable_inputs_are_refused_before_training(
    compared: tuple[config.Config, ComparisonResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: tuple[str, ...],
    error: str,
) -> None:
    monkeypatch.setattr(compare_module, "_train_if_missing", lambda *_: pytest.fail("training began"))
    asked = compared[0].using(*(each.replace("WORKSPACE", str(tmp_path)) for each in wrong))
    with pytest.raises((ValueError, RuntimeError), match=error):
        compare(asked)


def test_calibrated_arm_reports_the_effect_of_skipping_retrieval(
    settings_for, options: list[str], tmp_path: Path
) -> None:
    plain = settings_for(
        tmp_path / "workspace",
        *[option for option in options if not option.startswith("compare.c") and "probe" not in option],
        "compare.arms=[base, rag]",
        "queries.split=test",
    )
    build_index(plain)
    url = calibrate.calibrate(plain)
    found = adaptive.read_calibration(plain)
    closed = evaluate.read_answers(url.manifest["closed_book"])
    assert {row.query_id for row in closed} == {row.query_id for row in judging.queries_of(plain, "validation")}
    assert not any(row.passage_ids for row in closed)
    assert calibrate.calibrate(plain) == url
    # Too few questions to find a threshold: retrieval is never skipped, and nothing is reported.
    assert found == adaptive.RetrievalCalibration(None, 0.0, None, closed[0].model)
    first = compare(plain)
    assert read_comparison(first)["arms"]["rag"]["adaptive"] is None
    adaptive.publish_calibration(plain, "sure", dataclasses.replace(found, threshold=1e-9, share=1.0))
    second = compare(plain)
    assert second != first
    arms = read_comparison(second)["arms"]
    told = arms["rag"]["adaptive"]
    assert told["share"]["value"] == 1
    # The same generator without passages is the base arm.
    gained = arms["base"]["quality"]["token_F1"]["value"] - arms["rag"]["quality"]["token_F1"]["value"]
    assert told["difference"]["value"] == pytest.approx(gained)
    assert told["saved_seconds"] < arms["rag"]["latency"]["total"]["p50_seconds"]
    assert arms["base"]["adaptive"] is None
