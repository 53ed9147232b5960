"""Which questions tuned arms are asked, and which tuned models are refused; no model is trained or asked here, and no Ray started."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import session, staged_queries
from ragtune_ray.cluster.answering import answer as answer_module
from ragtune_ray.cluster.answering import evaluate
from ragtune_ray.cluster.comparing import calibrate
from ragtune_ray.cluster.training import prepare as prepare_module
from ragtune_ray.ingest import splits
from ragtune_ray.ingest.inputs import ChangedError
from ragtune_ray.models import weights
from ragtune_ray.models.arms import Pair
from ragtune_ray.storage import artifacts


class AskedError(Exception):
    """Raised instead of answering."""


@pytest.fixture
def settings(settings_for, tmp_path: Path) -> config.Config:
    return settings_for(tmp_path / "workspace", "queries.split_by=document", "evaluate.arms=[base, ft]")


@pytest.fixture
def another_generator(generator_directory: Path, tmp_path: Path) -> str:
    directory = tmp_path / "another"
    shutil.copytree(generator_directory, directory)
    facts = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**facts, "rope_theta": 5.0}))
    return str(directory)


def publish(settings: config.Config, arm: str, kind: str, **facts: Any) -> str:
    """The manifest of a tuned model, without the model."""
    folder = Path(settings.workspace) / "models" / arm
    url = str(folder / "first")
    artifacts.publish(artifacts.stage(url), url, kind, **facts)
    artifacts.make_current(str(folder), "first")
    return url


def publish_generator(settings: config.Config, arm: str = "ft") -> str:
    base = weights.resolve(settings.generator.model)
    return publish(
        settings,
        arm,
        "model",
        config=settings.model_dump(mode="json"),
        base=base.name,
        base_fingerprint=base.fingerprint,
    )


def asked(settings: config.Config, monkeypatch: pytest.MonkeyPatch) -> config.Config:
    """The config that `evaluate` answers by."""
    found = []

    def answer(given: config.Config, _: str) -> str:
        found.append(given)
        raise AskedError

    monkeypatch.setattr(answer_module, "answer", answer)
    monkeypatch.setattr(evaluate, "require_index", lambda *_: None)
    monkeypatch.setattr(session, "ray_session", lambda *_: contextlib.nullcontext())
    with pytest.raises(AskedError):
        evaluate.evaluate(settings)
    return found[0]


def test_a_tuned_arm_is_evaluated_on_the_test_split(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_generator(settings)
    assert asked(settings, monkeypatch).queries.split == "test"
    assert "only the test split is used" in capsys.readouterr().err
    assert asked(settings.using("evaluate.arms=[base, rag]"), monkeypatch).queries.split == "all"
    assert capsys.readouterr().err == ""
    assert asked(settings.using("queries.split=validation"), monkeypatch).queries.split == "validation"
    assert "scores are somewhat too high; set queries.split=test" in capsys.readouterr().err


def test_a_tuned_arm_is_not_asked_its_own_training_questions(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_generator(settings)
    training = settings.using("queries.split=train")
    assert asked(training.using("evaluate.arms=[base]"), monkeypatch).queries.split == "train"
    with pytest.raises(evaluate.EvaluationError, match=r"queries\.split=train: an arm is tuned on these questions"):
        evaluate.held_out(training, training.evaluate.arms)


def test_another_name_of_the_same_file_is_the_same_file(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_generator(settings)
    path = Path(settings.queries.path)
    monkeypatch.chdir(path.parent)
    for name in (path.name, f"./{path.name}", f"{path.parent}/../{path.parent.name}/{path.name}"):
        assert asked(settings.using(f"queries.path={name}"), monkeypatch).queries.split == "test"


def test_questions_of_another_file_are_all_asked(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_generator(settings)
    others = tmp_path / "others.jsonl"
    others.write_text('{"query_id": "a", "text": "Who?", "answers": ["me"]}\n')
    given = settings.using(f"queries.path={others}", "queries.split_by=given")
    assert asked(given, monkeypatch).queries.split == "all"
    assert f"was trained on {settings.queries.path}" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [1, evaluate.MAX_CHANGES])
def test_arms_are_answered_again_where_the_index_changed_between_them(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: int
) -> None:
    given = settings.using("evaluate.arms=[rag, rag+ft]")
    content, found = [0], []

    def answer(asked_with: config.Config, _: str) -> str:
        found.append((asked_with.answer.arm, content[0]))
        content[0] += len(found) in range(1, 2 * changes, 2)  # published after the first arm, so often
        return f"{asked_with.answer.arm} on {content[0]}"

    monkeypatch.setattr(answer_module, "answer", answer)
    monkeypatch.setattr(evaluate, "_index_content", lambda _: str(content[0]))
    if changes == evaluate.MAX_CHANGES:
        with pytest.raises(evaluate.EvaluationError, match="changed 3 times"):
            evaluate._answered(given, {}, lambda _: None)
        return
    assert evaluate._answered(given, {}, lambda _: None) == {"rag": "rag on 1", "rag+ft": "rag+ft on 1"}
    assert found == [("rag", 0), ("rag+ft", 1), ("rag", 1), ("rag+ft", 1)]
    assert "answer again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("split_by", "folder"),
        ("split_shares", "[1.0, 1.0, 1.0]"),
        ("split_seed", "5"),
        ("split_record", "splits.json"),
    ],
)
def test_a_model_trained_on_other_splits_is_refused(settings: config.Config, field: str, value: str) -> None:
    publish_generator(settings.using(f"queries.{field}={value}"))
    with pytest.raises(evaluate.EvaluationError, match=rf"was trained with queries\.{field}=.*training\.arm=ft"):
        evaluate.evaluate(settings)


def test_a_calibration_refuses_a_model_trained_on_other_splits(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_generator(settings, "rag+ft")
    monkeypatch.setattr(session, "ray_session", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(evaluate.EvaluationError, match=r"queries\.split_seed=0, but this config has 5"):
        calibrate.calibrate(settings.using("answer.arm=rag+ft", "queries.split_seed=5"))


def test_a_model_trained_on_an_earlier_draw_is_refused(settings: config.Config, tmp_path: Path) -> None:
    given = settings.using(f"queries.split_record={tmp_path / 'splits.json'}")
    queries = list(splits.selected_queries(given.queries))
    assert len(queries) > 20
    first = splits.record_id(given.queries)
    publish(given, "ft", "model", config=given.model_dump(mode="json"), split_record_id=first)
    evaluate.check_tuned(given, "ft")
    Path(given.queries.split_record).unlink()
    smaller = given.using("queries.split_shares=[1, 1, 4]")
    assert list(splits.selected_queries(smaller.queries))
    with pytest.raises(evaluate.EvaluationError, match=r"were drawn before those in .*splits\.json"):
        evaluate.check_tuned(given, "ft")


@pytest.mark.parametrize("named", ["", "/first"])
def test_a_reranker_trained_on_these_questions_is_evaluated_on_the_test_split(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str
) -> None:
    publish(settings, "reranker", "model", config=settings.model_dump(mode="json"))
    given = settings.using(
        f"retrieval.reranker={settings.workspace}/models/reranker{named}", "evaluate.arms=[base, rag]"
    )
    assert asked(given, monkeypatch).queries.split == "test"
    others = tmp_path / "others.jsonl"
    others.write_text('{"query_id": "a", "text": "Who?", "answers": ["me"]}\n')
    for unaffected in (
        "evaluate.arms=[base]",
        "retrieval.reranker=cross-encoder/ms-marco-MiniLM-L-6-v2",
        f"queries.path={others}",
    ):
        another = given.using(unaffected, "queries.split_by=document")
        assert asked(another, monkeypatch).queries.split == "all"


@pytest.mark.parametrize(
    ("setting", "objective", "arms", "others"),
    [
        ("encoder.model", "contrastive", "[base, rag]", "[base]"),
        ("encoder.query_model", "query_side", "[base, rag]", "[base, staged]"),
        ("generator.model", "sft", "[base]", "[base@large]"),
        ("compare.hosted.small.model", "sft", "[base@small]", "[base@large]"),
    ],
)
def test_a_model_that_the_config_names_is_not_asked_what_it_was_trained_on(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch, setting: str, objective: str, arms: str, others: str
) -> None:
    hosted = "compare.hosted={small: {model: x, engine: transformers}, large: {model: x}}"
    given = settings.using(hosted, f"{setting}={settings.workspace}/models/trained", f"evaluate.arms={arms}")
    another = given.using(f"evaluate.arms={others}")
    publish(settings, "staged", "tuned", config=given.using("queries.path=x").model_dump(mode="json"))
    assert evaluate.held_out(given, given.evaluate.arms).queries.split == "all", "not trained yet"
    publish(settings, "trained", "model", objective=objective, config=given.model_dump(mode="json"))
    for named in (given, given.using(f"{setting}={settings.workspace}/models/trained/first")):
        assert asked(named, monkeypatch).queries.split == "test"
    assert evaluate.held_out(another, another.evaluate.arms).queries.split == "all", "no arm uses the model"
    elsewhere = given.using("queries.split_seed=5")
    with pytest.raises(evaluate.EvaluationError, match=rf"queries\.split_seed=0.*training\.objective={objective}"):
        evaluate.evaluate(elsewhere)
    evaluate.check_used_models(another.using("queries.split_seed=5"), another.evaluate.arms)


def test_an_embedded_model_was_not_trained_on_these_questions(settings: config.Config) -> None:
    url = publish(settings, "embedded", "model", source="a-wheel==1.0")
    given = settings.using(f"encoder.model={url}", f"generator.model={url}")
    assert evaluate.held_out(given, ["base", "rag"]).queries.split == "all"


def test_a_reranker_trained_on_other_splits_is_refused(settings: config.Config, tmp_path: Path) -> None:
    arms = "evaluate.arms=[base, rag]"
    given = settings.using(f"retrieval.reranker={settings.workspace}/models/reranker", arms)
    publish(given, "reranker", "model", config=given.using("queries.split_seed=5").model_dump(mode="json"))
    with pytest.raises(evaluate.EvaluationError, match=r"queries\.split_seed=5.*training\.objective=reranker"):
        evaluate.evaluate(given)
    evaluate.check_used_models(given, ["base"])


def test_a_reranker_trained_on_an_earlier_draw_is_refused(settings: config.Config, tmp_path: Path) -> None:
    given = settings.using(
        f"queries.split_record={tmp_path / 'splits.json'}", f"retrieval.reranker={settings.workspace}/models/reranker"
    )
    assert list(splits.selected_queries(given.queries))
    publish(given, "reranker", "model", config=given.model_dump(mode="json"), split_record_id="another")
    with pytest.raises(evaluate.EvaluationError, match=r"were drawn before those in .*splits\.json"):
        evaluate.check_used_models(given, ["rag"])


def test_a_model_tuned_from_another_generator_is_refused(
    settings: config.Config, another_generator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_generator(settings)
    changed = settings.using(f"generator.model={another_generator}")
    both = [weights.resolve(given.generator.model).fingerprint for given in (settings, changed)]
    with pytest.raises(evaluate.EvaluationError, match=r"set generator\.model back") as refused:
        evaluate.evaluate(changed)
    for named in (settings.generator.model, another_generator, *both, "ragtune train CONFIG training.arm=ft"):
        assert named in str(refused.value)
    served = changed.using("generator.engine=openai", "generator.base_url=http://127.0.0.1:9/v1")
    asked(served, monkeypatch)  # what a server answers with is not known


def test_a_mode_must_start_from_the_same_generator_whatever_its_name(
    settings: config.Config, another_generator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Pair.of(settings).facts()
    publish(settings, "staged", "tuned", config=settings.model_dump(mode="json"), pair=start, start=start)
    evaluate.check_tuned(settings, "staged")
    renamed = tmp_path / "renamed"
    renamed.symlink_to(settings.generator.model)
    evaluate.check_tuned(settings.using(f"generator.model={renamed}"), "staged")
    with pytest.raises(evaluate.EvaluationError, match=r"ragtune tune CONFIG tune\.mode=staged"):
        evaluate.check_tuned(settings.using(f"generator.model={another_generator}"), "staged")
    gone = {**start, "generator_model": str(tmp_path / "gone")}
    publish(settings, "joint", "tuned", config=settings.model_dump(mode="json"), pair=gone, start=gone)
    with pytest.raises(evaluate.EvaluationError, match=r"gone \(no longer available\)"):
        evaluate.check_tuned(settings, "joint")


def test_a_model_without_a_record_is_evaluated_with_a_note(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = publish(settings, "ft", "model")
    publish(settings, "staged", "tuned")
    asked(settings.using("evaluate.arms=[staged, ft]"), monkeypatch)
    assert f"{url}: has no record of queries.split_by" in capsys.readouterr().err


def test_a_missing_model_is_named_before_anything_is_answered(settings: config.Config) -> None:
    with pytest.raises(weights.ModelError, match=r"ragtune train CONFIG training\.arm=ft"):
        evaluate.evaluate(settings)


def test_an_evaluation_returns_metrics_and_differences_as_one_table(tmp_path: Path) -> None:
    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 4}

    url = str(tmp_path / "evaluate")
    staging = artifacts.stage(url)
    for arm, value in (("base", 0.25), ("rag", 0.75)):
        (staging / arm).mkdir()
        (staging / arm / "metrics.json").write_text(json.dumps({"EM": interval(value)}))
    (staging / "differences.json").write_text(json.dumps({"rag - base": {"EM": interval(0.5)}}))
    artifacts.publish(staging, url, "evaluate", runs={"base": "", "rag": ""})
    evaluation = evaluate.Evaluation(url)
    assert evaluation.metrics["rag"]["EM"] == interval(0.75)
    rows = evaluation.to_arrow().to_pylist()
    assert [(row["arm"], row["metric"], row["value"]) for row in rows] == [
        ("base", "EM", 0.25),
        ("rag", "EM", 0.75),
        ("rag - base", "EM", 0.5),
    ]


def test_questions_that_change_after_they_were_answered_are_not_scored(
    settings_for, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query_id": "a", "text": "Who?", "answers": ["me"]}\n')
    given = settings_for(tmp_path / "workspace", f"queries.path={queries}", "evaluate.arms=[base]")
    url = str(tmp_path / "workspace" / "runs" / "answer-base")
    facts = {"input": {"fingerprint": staged_queries.fingerprint(given), "num_queries": 1}}
    artifacts.publish(artifacts.stage(url), url, "answer", **facts)
    monkeypatch.setattr(session, "ray_session", lambda *_: contextlib.nullcontext())
    published: list[Any] = []
    monkeypatch.setattr(evaluate, "_publish", lambda *arguments: published.append(arguments))

    def answered(*_: Any) -> dict[str, str]:
        queries.write_text(queries.read_text().replace("me", "you"))
        return {"base": url}

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_answered", answered)
        with pytest.raises(ChangedError, match=r"queries\.jsonl or the index changed while .*; run again"):
            evaluate.evaluate(given)
    assert published == []
    queries.write_text(queries.read_text().replace("you", "me"))
    monkeypatch.setattr(evaluate, "_answered", lambda *_: {"base": url})
    evaluate.evaluate(given)
    assert len(published) == 1


def test_questions_that_change_between_the_splits_are_not_trained_on(
    settings_for, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = tmp_path / "queries.jsonl"
    lines = [{"id": n, "text": f"{n}?", "answers": ["x"], "document_id": f"d{n}"} for n in range(60)]
    queries.write_text("\n".join(map(json.dumps, lines)))
    given = settings_for(tmp_path / "workspace", f"queries.path={queries}", "queries.split_by=document")
    stage = prepare_module.staged_queries.staged_queries

    def meanwhile(settings: config.Config) -> Any:
        staged = stage(settings)
        if settings.queries.split == "train":
            lines.append({"id": "new", "text": "?", "answers": ["x"], "document_id": "d0"})
            queries.write_text("\n".join(map(json.dumps, lines)))
        return staged

    monkeypatch.setattr(prepare_module.staged_queries, "staged_queries", meanwhile)
    with pytest.raises(ChangedError, match=r"queries\.jsonl changed while it was read; run again$"):
        prepare_module.prepare(given)
