"""`ragtune compare --check`: what it finds on questions made by script, with numbers computed by hand; no Ray, no model."""

import dataclasses
import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.cli import main
from ragtune_ray.cluster import session
from ragtune_ray.cluster.answering import evaluate
from ragtune_ray.cluster.comparing import compare, forecast
from ragtune_ray.cluster.comparing.check import check
from ragtune_ray.cluster.tuning.forecast import tuning
from ragtune_ray.evaluation.questions import check as questions
from ragtune_ray.evaluation.questions import gold_answers, power
from ragtune_ray.ingest import splits
from ragtune_ray.models.layout import ModelError
from ragtune_ray.storage import artifacts
from tests.support import index_changes as indexes

SIZES = forecast.Sizes(num_questions=100, num_train=320, question_tokens=20.0, answer_tokens=4.0)


def ask(path: Path, *rows: dict[str, Any]) -> Path:
    full = ({"query_id": f"q{n}", "text": f"Question {n}?", "answers": ["x"], **row} for n, row in enumerate(rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in full))
    return path


@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    """An index of three documents (moon, mars, rover), and 60 questions on them with splits that share no document."""
    indexes.build_standing(tmp_path)
    names = {"train": "moon", "validation": "mars", "test": "rover"}
    splits = ["train"] * 30 + ["validation"] * 10 + ["test"] * 20
    ask(tmp_path / "q.jsonl", *({"split": split, "document_ids": [names[split]]} for split in splits))
    return indexes.settings_of(tmp_path).using(
        f"queries.path={tmp_path / 'q.jsonl'}", f"generator.model={tmp_path / 'g'}"
    )


def changed(settings: config.Config, change: dict[int, dict[str, Any]]) -> None:
    path = Path(settings.queries.path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ask(path, *({**row, **change.get(number, {})} for number, row in enumerate(rows)))


def test_splits_and_kinds_of_answers_are_counted(settings: config.Config) -> None:
    changed(
        settings,
        {0: {"answers": []}, 1: {"answers": None}, 41: {"answers": ["one " * 13, "two " * 20]}, 42: {"answers": []}},
    )
    found = check(settings)
    assert found.errors == ()
    assert found.facts["splits"] == {
        "train": {"questions": 30, "answerable": 28, "unanswerable": 1, "unlabelled": 1},
        "validation": {"questions": 10, "answerable": 10},
        "test": {"questions": 20, "answerable": 19, "unanswerable": 1},
    }
    answers = found.facts["answers"]
    assert (answers["n"], answers["short"], answers["long"], answers["median"]) == (19, 18, 1, 1.0)
    assert found.facts["index"]["num_passages"] > 0


def test_power_is_that_of_the_test_questions_and_too_few_are_a_warning(settings: config.Config) -> None:
    found = check(settings)
    shows = found.facts["power"]
    # z(.975) + z(.8) = 2.8016; N = n + 2 solves (N / 4 + 3 / 2) / N^2 = (.02 / 2.8016)^2.
    assert shows["needed_for_margin"] == pytest.approx(4911, abs=3)
    # 2.8016 * sqrt((22 / 4 + 3 / 2) / 22^2) = .337.
    assert shows["smallest_difference"] == pytest.approx(0.337, abs=1e-3)
    assert shows["n"] == 20
    (warning,) = [text for text in found.warnings if "too few" in text]
    assert f"about {shows['needed_for_margin']:,} are needed" in warning
    few = check(settings.using("queries.limit=12"))
    assert any("12 questions are fewer than 20" in text for text in few.warnings)
    assert not [text for text in check(settings.using("compare.margin=0.5")).warnings if "too few" in text]


@pytest.mark.parametrize("n", [30, 200, 5000])
def test_the_smallest_difference_is_one_that_these_questions_show_and_no_smaller_one(n: int) -> None:
    found = power.smallest_difference(n, 0.99)
    assert power.needed_questions(found, 0.99) <= n < power.needed_questions(found * 0.99, 0.99)


def test_a_leak_is_an_error_where_an_arm_is_tuned(settings: config.Config) -> None:
    changed(settings, {59: {"document_ids": ["moon"]}})
    (error,) = check(settings).errors
    assert "both train and test ('moon')" in error
    alone = check(settings.using("compare.arms=[base, rag]"))
    assert alone.errors == ()
    assert alone.facts["leak"] == error


def test_no_verdict_is_given_with_a_leak_even_if_all_models_exist(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(settings, {59: {"document_ids": ["moon"]}})
    monkeypatch.setattr(compare, "_require_inputs", lambda _: None)
    monkeypatch.setattr(compare, "_train_if_missing", lambda *_: pytest.fail("it has begun"))
    monkeypatch.setattr(session, "ray_session", lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(splits.LeakError, match="both train and test"):
        compare.compare(settings)


def test_what_makes_a_comparison_fail_is_an_error(settings: config.Config, tmp_path: Path) -> None:
    changed(settings, {n: {"answers": None} for n in range(40, 60)})
    assert any("no test question has `answers`" in text for text in check(settings).errors)
    changed(settings, {n: {"split": "test", "answers": ["x"]} for n in range(30, 40)})
    assert any("no question has split validation" in text for text in check(settings).errors)
    without = check(settings.using(f"workspace={tmp_path / 'new'}"))
    assert any("ragtune index" in text for text in without.errors)
    assert without.facts["index"]["text"].startswith("to be built, and cannot be planned")
    assert not any("ragtune index" in text for text in check(settings.using("compare.arms=[base, ft]")).errors)


@pytest.mark.parametrize(
    ("overrides", "answers", "metric"),
    [
        (["compare.metric=numeric_match"], ["x"], "numeric_match"),
        (["evaluate.metrics=[judge]", "evaluate.judge.model=m"], None, "token_F1"),
    ],
)
def test_a_metric_that_no_question_has_is_an_error_before_anything_is_trained(
    settings: config.Config, overrides: list[str], answers: list[str] | None, metric: str
) -> None:
    changed(settings, {n: {"answers": answers} for n in range(40, 60)})
    given = settings.using(*overrides)
    found = check(given)
    assert any(f"for {metric}, so no arm can be recommended" in text for text in found.errors)
    with pytest.raises(evaluate.EvaluationError, match=f"for {metric}"):
        compare._require_inputs(given.using("compare.arms=[base, rag]", "queries.split=test"))
    changed(settings, {n: {"answers": ["7"]} for n in range(40, 45)})
    found = check(given)
    assert found.facts["power"]["n"] == 5, "only the questions that have it count"
    assert not any("no arm can be recommended" in text for text in found.errors)


def test_a_judge_without_gold_answers_and_passages_is_an_error(settings: config.Config) -> None:
    changed(settings, {n: {"answers": None} for n in range(40, 60)})
    given = settings.using(
        "compare.metric=judge", "evaluate.judge.model=m", "compare.arms=[base]", "queries.split=test"
    )
    assert any("no arm of compare.arms retrieves" in text for text in check(given).errors)
    found = check(given.using("compare.arms=[base, rag]"))
    assert found.errors == ()
    assert found.facts["power"]["n"] == 20


def test_missing_documents_and_repeated_questions_are_named(settings: config.Config) -> None:
    changed(settings, {0: {"document_ids": ["pluto"]}, 2: {"text": "What  is it?"}, 45: {"text": "what is it"}})
    found = check(settings)
    assert found.facts["unindexed"] == {"left_out": 1, "partly": 0}
    assert found.facts["splits"]["train"]["questions"] == 29
    assert found.facts["duplicates"] == {
        "texts": 1,
        "in_two_splits": 1,
        "contradicting": 0,
        "nearly_in_two_splits": 0,
    }
    assert any("1 questions are left out" in text and "'pluto'" in text for text in found.warnings)
    assert any("asked more than once" in text and "'q2', 'q45'" in text for text in found.warnings)
    assert any("'pluto'" in text for text in check(settings.using("corpus.strict=true")).errors)


def test_short_answers_are_looked_up_in_their_documents(settings: config.Config) -> None:
    rows = [
        {"answers": ["no such words"], "document_ids": ["moon"]},
        {"answers": ["The Earth and Apollo"], "document_ids": ["moon"]},
        {"answers": ["no such words, but in a sentence that any number of words can say."], "document_ids": ["moon"]},
        {"answers": ["phobos", "dust storms"], "document_ids": ["rover", "mars", "pluto"]},
        {"answers": ["hydrogen"], "document_ids": ["sun"]},  # deleted
    ]
    ask(Path(settings.queries.path), *rows)
    found = questions.check(settings)
    assert found.documents.missing == 1
    assert found.documents.grounding == gold_answers.Grounding(3, ("q0",))
    (warning,) = [text for text in found.warnings if "stand in none" in text]
    assert "1 of 3 short gold answers" in warning
    assert "'q0'" in warning
    assert any("stand in none" in text for text in check(settings).warnings)


def test_another_metric_is_proposed_in_one_line(settings: config.Config) -> None:
    changed(settings, {n: {"answers": ["It opens at seven, and the driver reports to the office."]} for n in range(60)})
    (line,) = [line for line in check(settings.using("compare.metric=EM")).lines() if line.startswith("metric")]
    assert line.startswith("metric     compare.metric=EM; ROUGE_L fits better: 60 of 60 gold answers are")
    (line,) = [line for line in check(settings.using("compare.metric=ROUGE_L")).lines() if line.startswith("metric")]
    assert line.startswith("metric     compare.metric=ROUGE_L: 60 of 60 gold answers are")
    changed(settings, {n: {"answers": ["at seven"]} for n in range(60)})
    assert not any(line.startswith("metric") for line in check(settings.using("compare.metric=EM")).lines())


def test_answers_and_prompts_that_do_not_fit_are_warnings(settings: config.Config) -> None:
    # Without a tokenizer, a token is 3 bytes.
    changed(settings, {n: {"answers": ["x" * 150]} for n in range(40, 44)} | {50: {"text": "y" * 3000}})
    found = check(settings.using("prompt.max_tokens=500"))
    assert found.facts["answers"]["over_limit"] == 4
    assert any("4 of 20 gold answers are longer than generator.max_new_tokens=48" in text for text in found.warnings)
    assert found.facts["prompts"]["too_long"] == 1
    assert any("such as 'q50'" in text for text in found.warnings)
    either = check(settings.using("generator.max_new_tokens=51"))
    assert not any("gold answers are longer" in text for text in either.warnings)


def test_looking_draws_no_splits_and_says_where_they_are_uneven(settings: config.Config, tmp_path: Path) -> None:
    changed(settings, {n: {"document_ids": ["moon"]} for n in range(60)})
    given = settings.using("queries.split_by=document")
    assert any("queries.split_record" in text for text in check(given).warnings)
    check(given.using(f"queries.split_record={tmp_path / 'splits.json'}"))
    assert not (tmp_path / "splits.json").exists()


# --- Forecast


def write_model(directory: Path) -> forecast.Geometry:
    """A model of 2 layers and 1,000 weights, as far as its headers say."""
    directory.mkdir()
    shape = {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    (directory / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 512}))
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [30, 30], "data_offsets": [0, 3600]}, "b": {"dtype": "F32", "shape": [100]}}
    )
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return forecast.read_geometry(directory)


def test_the_shape_of_a_model_is_read_from_its_headers(tmp_path: Path) -> None:
    assert write_model(tmp_path / "g") == forecast.Geometry(1000, 2, 8, 2 * 2 * 2, 50, 512)


@pytest.mark.parametrize("length", [0, 7, 40])
def test_a_damaged_model_is_named(tmp_path: Path, length: int) -> None:
    write_model(tmp_path / "g")
    path = tmp_path / "g" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"g: model\.safetensors is damaged .*copy or download"):
        forecast.read_geometry(tmp_path / "g")


def test_forecasts_are_the_work_divided_by_the_speed(settings: config.Config, tmp_path: Path) -> None:
    write_model(tmp_path / "g")
    given = settings.using("generator.precision=float32", "training.precision=float32", "retrieval.top_k=2")
    answers, steps = forecast.ANSWERING_STARTS, forecast.TRAINING_STARTS
    base = forecast.answering(given, "base", SIZES, 1e6)
    # 100 questions: 52 tokens read at .8e6, 48 written at .17e6 operations a second, 2,000 operations a token.
    assert base.seconds == pytest.approx(answers + 100 * 2000 * (52 / 0.8e6 + 48 / 0.17e6))
    assert base.memory_bytes == 4 * (1000 + 32768 * 2 * 8)
    rag = forecast.answering(given, "rag", SIZES, 1e6)
    assert rag.seconds == pytest.approx(answers + 100 * 2000 * ((52 + 2 * 8) / 0.8e6 + 48 / 0.17e6))
    tuned = forecast.training(given, "ft", SIZES, 1e6)
    assert tuned.seconds == pytest.approx(steps + 320 * 6000 * 56 / 1.1e6)
    short = forecast.training(given.using("training.max_steps=2"), "ft", SIZES, 1e6)
    assert short.seconds == pytest.approx(steps + 32 * 6000 * 56 / 1.1e6)
    assert tuned.memory_bytes == 16 * 1000 + 2048 * 2 * 8 * 34 + 2 * 4 * 2048 * 50
    assert forecast.training(given, "staged", SIZES, 1e6).seconds is None
    context = check(given)
    assert any("more than the 512 tokens" in text for text in context.warnings)


def test_a_step_that_ran_before_is_forecast_from_its_rate(settings: config.Config, tmp_path: Path) -> None:
    write_model(tmp_path / "g")
    model = forecast.generator_fingerprint(settings.generator)
    for name, rate, values in (("answer-rag-1", 4.0, {}), ("answer-rag-2", 9.0, {"answer.gold_passage": True})):
        url = f"{settings.workspace}/runs/{name}"
        given = settings.with_values({"answer.arm": "rag", **values})
        facts = {"config": given.model_dump(mode="json"), "model": model, "queries_per_second": rate}
        artifacts.publish(artifacts.stage(url), url, "answer", **facts)
    found = forecast.answering(settings, "rag", SIZES, 1e6)
    assert (found.seconds, found.source) == (25.0, "the rate of an earlier run")
    assert forecast.answering(settings, "base", SIZES, 1e6).source == "the speed of this machine"


def test_the_stages_of_a_comparison_are_listed_in_their_order(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "g")
    monkeypatch.setattr(forecast, "product_flops", lambda: 1e6)
    given = settings.using("compare.latency_queries=10")
    stages = forecast.comparison(given, ["ft"], dataclasses.replace(SIZES, reads_gold=True))
    answers = [f"answer {arm}" for arm in ("base", "rag", "ft", "rag+ft")]
    golden = [f"answer {arm} from gold passages" for arm in ("rag", "rag+ft")]
    assert [stage.name for stage in stages] == ["train ft", *answers, *golden, "measure and report"]
    seconds = [stage.seconds or 0 for stage in stages]
    assert seconds[5] < seconds[2], "one passage is shown instead of five"
    assert seconds[-1] == pytest.approx(sum(seconds[1:5]) / 10), "10 of 100 questions"
    short = forecast.comparison(
        given.using("compare.until=decided", "compare.variants={a: {retrieval.top_k: 3}}"), [], SIZES
    )
    assert [stage.name for stage in short] == [
        "choose settings of retrieval",
        "answer until the verdict stands",
        "measure and report",
    ]
    assert short[1].seconds == pytest.approx(sum(seconds[1:5]))
    lines = list(check(given).lines())
    assert any(line.startswith("stage 1    train ft: about ") for line in lines)
    assert lines[[line.startswith("in all") for line in lines].index(True)].startswith("in all     9 stages, about ")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["tune.mode=staged"], ["answer the training questions", *(f"round 1: {verb} the {name}" for name in ("generator", "retriever") for verb in ("train", "judge"))]),
        (["tune.mode=joint", "tune.components=[generator]"], [f"round {number}: {verb} the generator" for number in (1, 2) for verb in ("train", "judge")]),
        (["tune.mode=joint", "tune.in_loop=true", "tune.rounds=1"], ["round 1: train the retriever and generator", "round 1: judge the retriever", "round 1: judge the generator"]),
        (["tune.mode=iterative", "tune.rounds=1", "tune.components=[generator]"], ["round 0: train the generator", "round 0: judge the generator", "round 1: make training questions", "round 1: train the generator", "round 1: judge the generator"]),
        (["tune.mode=domain", "tune.components=[retriever]"], ["round 1: make training questions", "round 1: train the retriever", "round 1: judge the retriever"]),
    ],
)  # fmt: skip
def test_the_stages_of_a_tune_are_listed_in_their_order(
    settings: config.Config, tmp_path: Path, values: list[str], expected: list[str]
) -> None:
    write_model(tmp_path / "g")
    stages = tuning(settings.using(*values), [], SIZES)
    assert [stage.name for stage in stages] == expected
    known = {stage.name.rpartition(": ")[2] for stage in stages if stage.seconds is not None}
    assert known <= {"answer the training questions", "train the generator", "judge the generator"}


def test_a_matrix_product_is_timed_whatever_is_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('imported')")
    monkeypatch.chdir(tmp_path)
    assert 1e8 < forecast.product_flops() < 1e15


# --- Command


def test_the_command_prints_facts_and_exits_by_the_errors(
    settings: config.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(settings.model_dump(mode="json")))
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path / "c.yaml"), "--check", "--json"])
    assert ended.value.code == 0
    shown = capsys.readouterr()
    facts = json.loads(shown.out)
    assert facts["errors"] == []
    assert facts["power"]["n"] == 20
    for line in ("test       20 questions: 20 answerable", "warning    20 questions are too few"):
        assert line in shown.err
    assert max(map(len, shown.err.splitlines())) <= 120
    changed(settings, {59: {"document_ids": ["moon"]}})
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path / "c.yaml"), "--check"])
    assert ended.value.code == 1
    assert "error      1 document(s) are relevant" in capsys.readouterr().err


def test_ten_thousand_questions_are_checked_in_seconds(settings: config.Config) -> None:
    source = random.Random(0)
    names = ["moon", "mars", "rover", *(f"d{number}" for number in range(2000))]
    rows = ({"document_ids": [names[min(int(source.paretovariate(0.5)), 2000)]]} for _ in range(10_000))
    ask(Path(settings.queries.path), *rows)
    record = str(Path(settings.queries.path).with_name("splits.json"))
    given = settings.with_values(
        {"queries.split_by": "document", "queries.split_record": record, "queries.unindexed": "keep"}
    )
    started = time.process_time()
    found = check(given)
    assert time.process_time() - started < 10, "processor time, which other processes do not lengthen"
    assert sum(each["questions"] for each in found.facts["splits"].values()) == 10_000
    assert np.isfinite(found.facts["power"]["smallest_difference"])
    assert dataclasses.is_dataclass(found)
