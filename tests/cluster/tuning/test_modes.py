"""The rounds of `tune` in a world without Ray: what each mode does, accepts and refuses."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config, schema
from ragtune_ray.cluster.training import prepare as prepare_module
from ragtune_ray.cluster.tuning import labelling, tune
from ragtune_ray.cluster.tuning.rounds import TuneError
from ragtune_ray.evaluation.questions.writing import drawing, prompts
from ragtune_ray.ingest import splits
from ragtune_ray.models import arms, weights
from ragtune_ray.storage import artifacts, failpoints, filesystem
from tests.support import tuning_world
from tests.support.tuning_world import World, index_bytes, read_made, settings_of

MODES = ("staged", "joint", "iterative", "domain")


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, encoder_directory: Path, generator_directory: Path, write_index: Any
) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tuning_world.build(folder, encoder_directory, generator_directory, write_index)
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> World:
    return World(Path(shutil.copytree(made, tmp_path / "world")))


def steps(url: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(url) / "ledger.jsonl").read_text().splitlines()]


def verdicts(url: str) -> list[tuple[int, str, bool]]:
    return [(row["round"], row["component"], row["accepted"]) for row in steps(url) if "accepted" in row]


def step(url: str, name: str, number: int = 1) -> dict[str, Any]:
    (row,) = [row for row in steps(url) if (row["round"], row["step"]) == (number, name)]
    return row


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("staged", [(1, "generator", True), (1, "retriever", True)]),
        ("joint", [(1, "generator", True), (1, "retriever", True), (2, "generator", True), (2, "retriever", False)]),
        ("iterative", [(0, "generator", True), (1, "generator", False), (1, "retriever", True)]),
        ("domain", [(1, "retriever", True), (1, "generator", True)]),
    ],
)
def test_a_mode_accepts_better_models_and_becomes_an_arm(
    world: World, mode: str, expected: list[tuple[int, str, bool]]
) -> None:
    before = index_bytes(world.folder / "workspace")
    url = world.tune(mode)
    assert verdicts(url)[: len(expected)] == expected
    settings = settings_of(world.folder, mode)
    assert arms.tuned_model(settings.workspace, mode) == url
    pair = artifacts.read_manifest(url)["pair"]
    tuned = arms.with_tuned_models(settings.using(f"answer.arm={mode}"))
    assert arms.Pair.of(tuned).facts() == pair
    assert world.skill(pair["generator_model"]) > tuning_world.START_SKILL
    assert world.skill(pair["query_model"]) > tuning_world.START_SKILL
    assert pair["workspace"] == settings.workspace
    assert index_bytes(world.folder / "workspace") == before
    assert config.load(Path(url) / "tuned.yaml").generator.model == pair["generator_model"]
    calls = world.calls()
    assert world.tune(mode) == url
    assert world.calls() == calls, "a finished tune is not repeated"
    assert len(tune.report_lines(url)) > len(expected)


def test_the_result_of_a_tune_reads_its_pair_and_verdicts(world: World) -> None:
    result = tune.TuneResult(world.tune("staged", "tune.min_examples=100"))
    assert result.manifest["mode"] == "staged"
    assert result.manifest["pair"] == result.manifest["start"]
    rows = result.to_arrow().select(["round", "component", "accepted"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == verdicts(result.path)


def test_staged_teaches_each_component_its_own_failures(world: World) -> None:
    url = world.tune("staged")
    routed = step(url, "routed")
    routes = {name: row["count"] for name, row in routed["routes"].items()}
    # By hand: the questions whose passage is shown, and those whose passage is read.
    shown = {number for number in range(40) if splits.draw(f"What is the code of vessel{number}?", 1) < 0.3}
    read = {number for number in range(40) if splits.draw(f"What is the code of vessel{number}?", 2) < 0.3}
    assert routes == {
        "success": len(shown & read),
        "reading": len(shown - read),
        "retrieval": 40 - len(shown),
        "unanswerable": 0,
        "failed": 0,
    }
    learnt = [row for row in read_made(routed["retriever"]["path"]) if row.split == "train"]
    assert {f"q{number}" for number in range(40) if number not in shown} <= {row.query_id for row in learnt}
    assert len(learnt) == routed["retriever"]["num_questions"] == step(url, "retriever prepared")["num_examples"]
    assert all(row.document_ids == (f"d{row.query_id[1:]}",) for row in learnt)
    validation = [row.query_id for row in read_made(routed["retriever"]["path"]) if row.split == "validation"]
    assert validation == [f"q{number}" for number in tuning_world.SPLITS["validation"]]


def test_joint_without_qrels_judges_by_answers_in_hits(world: World) -> None:
    hidden = f"queries.path={world.folder / 'unjudged.jsonl'}"
    judged, unjudged = world.tune("joint"), world.tune("joint", hidden)
    assert judged != unjudged
    assert step(unjudged, "retriever judged")["before"] == pytest.approx(step(judged, "retriever judged")["before"])
    assert step(unjudged, "retriever judged")["accepted"]


def test_a_teacher_no_better_than_the_retriever_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = world.prepare

    def weak(settings: config.Config) -> str:
        url = prepare(settings)
        manifest = artifacts.read_manifest(url)
        if "teacher" in manifest:
            manifest["teacher"]["MRR"] = 0.4
            filesystem.remove(url)
            artifacts.publish(artifacts.stage(url), url, "examples", **{
                name: manifest[name] for name in ("num_train", "num_rejects", "kinds", "teacher")
            })  # fmt: skip
        return url

    monkeypatch.setattr(world, "prepare", weak)
    url = world.tune("joint", "tune.rounds=1")
    assert verdicts(url) == [(1, "generator", True), (1, "retriever", False)]
    assert "ranks passages no better than the retriever" in step(url, "retriever judged")["reason"]
    assert not any("retriever" in line for line in world.calls() if line.startswith("train")), world.calls()
    assert filesystem.list_names(filesystem.join(settings_of(world.folder, "joint").workspace, "models")) == [
        "joint",
        "joint-generator",
    ]


def test_iterative_starts_from_the_base_on_gold_and_filtered_answers(world: World) -> None:
    url = world.tune("iterative", "tune.pseudo_share=0.3")
    settings = settings_of(world.folder, "iterative")
    mixed = step(url, "mixed")
    assert mixed["gold"] == 20
    assert 0 < mixed["pseudo"] / (mixed["gold"] + mixed["pseudo"]) <= 0.31
    learnt = [row for row in read_made(mixed["path"]) if row.split == "train"]
    labels = {row.query_id: row.answers for row in learnt if row.query_id.startswith("asked-")}
    assert all(answers == (f"secret{name.removeprefix('asked-q')}",) for name, answers in labels.items()), "precision 1"
    assert all(int(name.removeprefix("asked-q")) % 2 for name in labels), "none of them had a gold answer"
    for number in (0, 1):
        trained = artifacts.read_manifest(step(url, "generator trained", number)["model"])
        assert trained["start"] == settings.generator.model
    refused = step(url, "filtered")["refused"]
    assert sum(refused.values()) + step(url, "filtered")["count"] == 20


@pytest.mark.parametrize("always_wrong", [False, True])
def test_iterative_uses_only_answers_of_trusted_confidence(
    world: World, monkeypatch: pytest.MonkeyPatch, *, always_wrong: bool
) -> None:
    answer_of = world.answer_of

    def misreads_when_unsure(settings: config.Config, query: schema.Query) -> schema.Answer:
        given = answer_of(settings, query)
        if not given.citations or not (always_wrong or (given.confidence or 0.0) < 0.7):
            return given
        return dataclasses.replace(given, answer="the next tide of the year")  # is in every passage

    monkeypatch.setattr(world, "answer_of", misreads_when_unsure)
    monkeypatch.setattr(labelling.checks, "FEWEST_ANSWERS", 2)
    url = world.tune("iterative", "tune.min_precision=0.75", "tune.rounds=1", "tune.components=[generator]")
    trusted = step(url, "trusted")
    if always_wrong:
        assert trusted["confidence"] is None
        assert 0 < trusted["precision"] <= 0.25  # none correct of two or more
        assert not [row for row in steps(url) if row["round"] == 1 and row["step"] != "trusted"]
        return
    assert trusted["confidence"] >= 0.69
    assert trusted["precision"] >= 0.75
    passed = [row for row in read_made(step(url, "passed")["path"]) if row.split == "train"]
    assert passed
    right = [row.answers == (f"secret{row.query_id.removeprefix('asked-q')}",) for row in passed]
    assert sum(right) / len(right) >= 0.8
    assert step(url, "filtered")["refused"]["the generator is not confident enough"] > 0


def test_iterative_stops_without_a_significant_gain(world: World) -> None:
    url = world.tune("iterative", "tune.rounds=5")
    *_, last = [row for row in steps(url) if "accepted" in row]
    of_last = [row for row in steps(url) if row["round"] == last["round"] and "accepted" in row]
    assert last["round"] < 5
    assert not any(row["accepted"] and row["low"] > 0 for row in of_last)


def test_random_pseudo_labels_are_refused_and_the_pair_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = labelling.pseudo_labels

    def random_labels(*given: Any) -> list[Any]:
        world.poisoned = "generator"
        return [dataclasses.replace(row, answers=("amber",)) for row in labels(*given)]

    monkeypatch.setattr(labelling, "pseudo_labels", random_labels)
    url = world.tune("iterative", "tune.components=[generator]")
    assert verdicts(url) == [(0, "generator", True), (1, "generator", False)]
    assert step(url, "generator judged")["reason"] == "a loss"
    assert artifacts.read_manifest(url)["pair"]["generator_model"] == step(url, "generator trained", 0)["model"]


@pytest.mark.parametrize("reindex", ["false", "true"])
def test_a_poisoned_round_changes_neither_models_nor_index(world: World, reindex: str) -> None:
    workspace = world.folder / "workspace"
    good = world.tune("joint", "tune.rounds=1", "tune.components=[generator]")
    before, current = index_bytes(workspace), (workspace / "models" / "joint" / "CURRENT").read_text()
    assert Path(good).name == current.strip()
    world.poisoned = "retriever"
    poisoned = world.tune("joint", "tune.rounds=1", "tune.components=[retriever]", f"tune.reindex={reindex}")
    assert verdicts(poisoned) == [(1, "retriever", False)]
    facts = artifacts.read_manifest(poisoned)
    assert facts["pair"] == facts["start"] == arms.Pair.of(settings_of(world.folder, "joint")).facts()
    assert index_bytes(workspace) == before
    assert list((workspace / "rounds").rglob("index")) == [], "the index of a refused encoder is removed"


def test_a_new_encoder_has_its_own_index(world: World) -> None:
    workspace = world.folder / "workspace"
    before = index_bytes(workspace)
    url = world.tune("joint", "tune.reindex=true", "tune.rounds=2", "tune.components=[retriever]")
    assert verdicts(url) == [(1, "retriever", True), (2, "retriever", True)]
    pairs_tried = [row["pair"] for row in steps(url) if "pair" in row]
    assert len({each["workspace"] for each in pairs_tried} | {str(workspace)}) == 3
    assert len({each["encoder_model"] for each in pairs_tried}) == 2
    assert all(each["query_model"] == "" for each in pairs_tried)
    kept = artifacts.read_manifest(url)["pair"]
    assert kept == pairs_tried[-1]
    assert (Path(kept["workspace"]) / "index").is_dir()
    assert not (Path(pairs_tried[0]["workspace"]) / "index").exists(), "the index of the previous round is removed"
    assert index_bytes(workspace) == before
    spelt = f"workspace={world.folder}/./workspace"  # the same finished tune, which must remove nothing
    world.tune("joint", "tune.reindex=true", "tune.rounds=2", "tune.components=[retriever]", spelt)
    assert (Path(kept["workspace"]) / "index").is_dir()


def test_reindexing_a_different_corpus_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(_: config.Config) -> str:
        url = str(world.folder / "other")
        artifacts.publish(artifacts.stage(url), url, "index", num_documents=3)
        return url

    monkeypatch.setattr(world, "build_index", other)
    with pytest.raises(TuneError, match="contains 3 documents and the index 90"):
        world.tune("staged", "tune.reindex=true")


def test_domain_generates_questions_only_from_training_passages(world: World) -> None:
    url = world.tune("domain")
    chosen = [row for row in read_made(step(url, "chosen")["path"]) if row.split == "train"]
    forbidden = {f"d{number}" for split in ("validation", "test") for number in tuning_world.SPLITS[split]}
    assert len(chosen) == 20
    assert not {row.document_ids[0] for row in chosen} & forbidden
    # Questions that retrieve their passage train the retriever; those also answered from it train the generator.
    found = [row for row in read_made(step(url, "found")["path"]) if row.split == "train"]
    numbers = {row.document_ids[0][1:] for row in found}
    asked_about = [row.document_ids[0][1:] for row in chosen]
    is_found = {name for name in asked_about if splits.draw(f"What is the code of vessel{name}?", 1) < 0.3}
    assert numbers == is_found
    assert step(url, "found")["refused"] == {"does not retrieve its document": 20 - len(found)}
    assert step(url, "retriever mixed")["pseudo"] == len(found) > 0
    assert all(f"vessel{row.document_ids[0][1:]}" in (row.answers or ("",))[0] for row in found)
    passed = [row for row in read_made(step(url, "passed")["path"]) if row.split == "train"]
    is_read = {name for name in is_found if splits.draw(f"What is the code of vessel{name}?", 2) < 0.3}
    assert {row.document_ids[0][1:] for row in passed} == is_read
    assert all(row.answers == (f"secret{row.document_ids[0][1:]}",) for row in passed)
    assert step(url, "passed")["refused"] == {"its answer is not in a passage that it cites": len(found) - len(passed)}
    assert step(url, "generator mixed")["pseudo"] == len(passed) < len(found)


def test_domain_trains_the_retriever_even_without_answers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_of = world.answer_of

    def asks_and_does_not_answer(settings: config.Config, query: schema.Query) -> schema.Answer:
        given = answer_of(settings, query)
        is_answer = query.query_id.startswith("made-") and query.text != prompts.ASK
        return dataclasses.replace(given, answer="It is told in many words.", citations=()) if is_answer else given

    monkeypatch.setattr(world, "answer_of", asks_and_does_not_answer)
    unlabelled = world.folder / "unlabelled.jsonl"
    rows = read_made(str(world.folder / "questions.jsonl"))
    with unlabelled.open("w") as file:
        for row in rows:
            answers = None if row.split == "train" else row.answers
            file.write(json.dumps(dataclasses.asdict(dataclasses.replace(row, answers=answers))) + "\n")
    url = world.tune("domain", f"queries.path={unlabelled}", "tune.passages=40", "tune.round_trip_hits=12")
    assert verdicts(url) == [(1, "retriever", True), (1, "generator", False)]
    assert step(url, "retriever mixed")["pseudo"] == step(url, "questions")["count"]
    assert step(url, "generator judged")["reason"].startswith("0 training questions")


def test_a_corpus_without_usable_passages_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MIN_CHARACTERS", 1000)
    with pytest.raises(TuneError, match="no passage of 1000 characters or more"):
        world.tune("domain")


@pytest.mark.parametrize("forgets", [True, False])
def test_a_retriever_that_forgets_is_refused_despite_a_gain(world: World, *, forgets: bool) -> None:
    world.forgets = forgets
    probe = world.folder / "probe.jsonl"
    with probe.open("w") as file:
        for number in range(85):
            row = {"query_id": f"p{number}", "text": f"Who knows of vessel{number}?", "document_ids": [f"d{number}"]}
            file.write(json.dumps(row) + "\n")
    url = world.tune("joint", "tune.rounds=1", "tune.components=[retriever]", f"tune.retriever_probe_path={probe}")
    (row,) = [row for row in steps(url) if "accepted" in row]
    assert row["after"] > row["before"]
    assert row["accepted"] != forgets
    assert row["reason"].startswith("it forgets: -0.") == forgets


def test_a_component_with_too_few_questions_stays_unchanged(world: World) -> None:
    url = world.tune("staged", "tune.min_examples=100")
    assert verdicts(url) == [(1, "generator", False), (1, "retriever", False)]
    assert "fewer than tune.min_examples (100)" in step(url, "generator judged")["reason"]
    assert not [line for line in world.calls() if line.startswith("train")]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["queries.path="], config.ConfigError, "queries.path is empty"),
        (["queries.limit=10"], TuneError, r"10 validation questions have `answers`.*at least 20"),
        (["compare.metric=numeric_match"], TuneError, r" 0 validation questions have `answers` for numeric_match"),
        (["generator.engine=openai"], TuneError, "a served model can neither be tuned nor teach"),
        (["encoder.model=hashing-64"], weights.ModelError, "has no weights to train"),
        (["tune.reindex=true", "corpus.path="], config.ConfigError, "corpus.path is empty"),
        (["tune.mode=iterative"], TuneError, "every training question has `answers`"),
    ],
)
def test_hopeless_configs_are_refused_at_once(
    world: World, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        world.tune("staged", *overrides)
    assert not [line for line in world.calls() if line.startswith("train")]


def test_a_leaked_document_is_an_error_before_answering(world: World) -> None:
    path = world.folder / "questions.jsonl"
    path.write_text(path.read_text().replace('["d50"]', '["d0"]'))
    with pytest.raises(splits.LeakError, match="'d0'"):
        world.tune("staged")
    assert world.calls() == []


class KilledError(BaseException):
    """Simulates a SIGKILL at a failpoint."""


@pytest.mark.parametrize("mode", MODES)
def test_a_tune_killed_at_any_step_resumes_without_repeating_work(
    mode: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = World(Path(shutil.copytree(made, tmp_path / "undisturbed" / "world")))
    expected = steps(undisturbed.tune(mode))
    world = World(Path(shutil.copytree(made, tmp_path / "killed" / "world")))
    spared: set[int] = set()

    def dies(name: str) -> None:
        """Kill once at every step."""
        (ledger,) = [*(world.folder / "workspace" / "rounds").glob("*/ledger.jsonl")] or [None]
        done = len(ledger.read_text().splitlines()) if ledger else 0
        if name == "tune.worked" and done not in spared:
            spared.add(done)
            raise KilledError

    monkeypatch.setattr(failpoints, "reach", dies)
    for _ in range(len(expected) + 1):
        try:
            url = world.tune(mode)
        except KilledError:
            assert not (world.folder / "workspace" / "models" / mode).exists(), "readers do not see it yet"
        else:
            break
    assert len(spared) == len(expected)

    def plain(rows: list[dict[str, Any]], folder: Path) -> Any:
        text = json.dumps([{name: value for name, value in row.items() if name != "seconds"} for row in rows])
        return json.loads(text.replace(str(folder), ""))

    def names_left_out(rows: Any) -> Any:
        """Make names of runs independent of the workspace's location."""
        return [{name: value for name, value in row.items() if not isinstance(value, str | dict)} for row in rows]

    assert names_left_out(plain(steps(url), world.folder)) == names_left_out(plain(expected, undisturbed.folder))
    assert len(world.calls()) == len(set(world.calls())) == len(undisturbed.calls())


def test_a_tune_killed_before_becoming_current_becomes_current_when_rerun(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(name: str) -> None:
        if name == "tune.published":
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "reach", dies)
        with pytest.raises(KilledError):
            world.tune("staged")
    settings = settings_of(world.folder, "staged")
    with pytest.raises(weights.ModelError, match=r"ragtune tune CONFIG tune.mode=staged"):
        arms.tuned_model(settings.workspace, "staged")
    calls = world.calls()
    url = world.tune("staged")
    assert arms.tuned_model(settings.workspace, "staged") == url
    assert world.calls() == calls


def test_a_generator_as_teacher_is_refused_for_contrastive() -> None:
    with pytest.raises(config.ConfigError, match=r"works with training\.objective distillation"):
        config.Config().using("training.teacher=generator", "training.objective=contrastive")
    assert "teacher" in prepare_module.EXAMPLE_SETTINGS
