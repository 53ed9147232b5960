"""`ragtune train` on tiny models: from queries to a model directory, with several workers, and its errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ragtune_ray import config, schema
from ragtune_ray.cluster.answering import evaluate
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.training import prepare
from ragtune_ray.cluster.training import train as train_module
from ragtune_ray.cluster.training.train import train
from ragtune_ray.ingest import inputs, splits
from ragtune_ray.models import arms
from ragtune_ray.models import weights as weights_module
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.training import trainable
from ragtune_ray.training.optimization import TrainingError
from tests.support.corpora import write_queries
from tests.support.models import save_model, save_tokenizer

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]


@pytest.fixture(scope="module")
def given(settings_for, tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """An indexed corpus with 40 queries, split by document, and settings for a training of a few seconds."""
    settings: config.Config = settings_for(
        tmp_path_factory.mktemp("training") / "workspace",
        "queries.split_by=document",
        "retrieval.top_k=2",
        "training.batch_examples=8",
        "training.max_tokens=900",
        "training.micro_batch_tokens=4000",
        "training.learning_rate=0.001",
        "training.precision=float32",
        "training.evaluate_steps=2",
        "training.hard_negatives=2",
        "training.negative_margin=0",
    )
    build_index(settings)
    return settings


def metrics(url: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(url) / "metrics.jsonl").read_text().splitlines()]


def steps(url: str) -> list[dict[str, Any]]:
    return [row for row in metrics(url) if "learning_rate" in row]


def with_encoder(settings: config.Config, encoder_directory: Path, workspace: Path) -> config.Config:
    changed = settings.using(
        f"workspace={workspace}", f"encoder.model={encoder_directory}", "encoder.precision=float32"
    )
    build_index(changed)
    return changed


@pytest.mark.slow
def test_the_four_arms_are_trained_answered_and_compared(
    given: config.Config, capfd: pytest.CaptureFixture[str]
) -> None:
    compared = given.using("evaluate.arms=[base, rag, ft, rag+ft]", "queries.split=test", "training.epochs=2")
    with pytest.raises(weights_module.ModelError, match=r"ragtune train CONFIG training.arm=ft"):
        evaluate.evaluate(compared)
    urls = {arm: train(given.using(f"training.arm={arm}", "training.epochs=2")).path for arm in ("ft", "rag+ft")}
    for arm, url in urls.items():
        manifest = artifacts.read_manifest(url)
        assert Path(url).parent == Path(given.workspace) / "models" / arm
        assert manifest["best"]["score"] >= manifest["start"]["score"]
        assert len(steps(url)) == manifest["num_steps"]
        assert arms.tuned_model(given.workspace, arm) == url
        assert (Path(url) / "README.md").read_text().startswith("---\nbase_model:")
        assert list((Path(url) / "tensorboard").glob("events.*"))
    shown = pq.read_table(Path(artifacts.read_manifest(urls["rag+ft"])["examples"]) / "train.parquet").to_pylist()
    assert all(row["passage_ids"] for row in shown)
    run = str(evaluate.evaluate(compared))
    fingerprints = {arm: evaluate.read_answers(artifacts.read_manifest(run)["runs"][arm])[0].model for arm in urls}
    assert fingerprints == {arm: weights_module.resolve(url).fingerprint for arm, url in urls.items()}
    capfd.readouterr()
    assert train(given.using("training.arm=ft", "training.epochs=2")).path == urls["ft"]
    assert "already trained; nothing to do" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_workspace_and_model_may_be_relative_paths(tmp_path: Path, generator_directory: Path) -> None:
    write_queries(tmp_path / "queries.jsonl", 20)
    shutil.copytree(generator_directory, tmp_path / "generator")
    given = {
        "workspace": "workspace/here",
        "queries": {"path": "queries.jsonl", "split_by": "document"},
        "generator": {"model": "./generator"},
        "training": {"arm": "ft", "max_steps": 1, "batch_examples": 4},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(given))
    command = [sys.executable, "-m", "ragtune_ray.cli", "train", "c.yaml"]
    trained = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert trained.returncode == 0, trained.stderr
    assert artifacts.is_finished(str(tmp_path / trained.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    ["sft", "contrastive", *(pytest.param(each, marks=pytest.mark.long) for each in ("joint", "reranker"))],
)
def test_two_workers_have_the_losses_of_one(
    objective: str, given: config.Config, encoder_directory: Path, tmp_path: Path
) -> None:
    settings = with_encoder(given, encoder_directory, tmp_path / "workspace").using(
        f"training.objective={objective}", "training.epochs=10", "training.max_steps=20", "training.evaluate_steps=20"
    )
    runs = {}
    for workers in (1, 2):
        apart = settings.using(f"training.workers={workers}", f"training.name=with{workers}")
        runs[workers] = steps(train(apart).path)
        assert artifacts.read_manifest(arms.tuned_model(settings.workspace, f"with{workers}"))["num_workers"] == workers
    one, two = runs[1], runs[2]
    assert len(one) == len(two) == 20
    assert two[0]["gradient_norm"] == pytest.approx(one[0]["gradient_norm"], rel=1e-5)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5, abs=1e-5)
    assert one[-1]["loss"] < one[0]["loss"]


@pytest.mark.slow
def test_a_query_side_encoder_keeps_its_index_and_no_other(
    given: config.Config, encoder_directory: Path, tmp_path: Path
) -> None:
    from ragtune_ray.index.retriever import open_retriever

    settings = with_encoder(given, encoder_directory, tmp_path / "workspace").using(
        "training.objective=query_side", "training.learning_rate=0.01", "training.epochs=4"
    )
    url = train(settings).path
    assert artifacts.read_manifest(url)["best"]["step"] > 0
    tuned = settings.using(f"encoder.query_model={url}")
    assert open_retriever(tuned).search_ordinals(["What is the code of vessel1?"], 3)[1].shape == (1, 3)
    with pytest.raises(weights_module.ModelError, match="trained for another passage encoder"):
        open_retriever(tuned.using("encoder.passage_prefix=x"))


@pytest.mark.slow
def test_retrieval_uses_the_reranker_that_was_trained(
    given: config.Config, encoder_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from ragtune_ray.index.retriever import open_retriever
    from ragtune_ray.models.reranker import Reranker

    # The config may name the result before it exists, and again when it does.
    settings = with_encoder(given, encoder_directory, tmp_path / "workspace").using(
        "training.objective=reranker",
        f"retrieval.reranker={tmp_path}/workspace/models/reranker",
        "retrieval.rerank_candidates=4",
        "training.max_steps=2",
    )
    url = train(settings).path
    manifest = artifacts.read_manifest(url)
    assert manifest["objective"] == "reranker"
    assert manifest["base"] == settings.encoder.model
    assert train(settings).path == url
    assert "already trained" in capfd.readouterr().err
    weight = manifest["best"]["first_stage_weight"]
    assert json.loads((Path(url) / "reranker.json").read_text()) == {"first_stage_weight": weight}
    question = "What is the code of vessel1?"
    (first,) = open_retriever(settings.using("retrieval.reranker=")).search([question], 4)
    (found,) = open_retriever(settings).search([question], 3)
    scores = Reranker(url).score([(question, hit.passage.text) for hit in first])
    expected = {
        hit.passage.passage_id: float(score) + weight * hit.score / first[0].score
        for hit, score in zip(first, scores, strict=True)
    }
    best = sorted(expected.values(), reverse=True)[:3]
    assert [hit.score for hit in found] == pytest.approx(best, rel=0.02, abs=0.02)  # bfloat16 where the CPU has it


def test_an_index_refuses_another_encoders_weights(
    given: config.Config, encoder_directory: Path, tmp_path: Path
) -> None:
    from ragtune_ray.index.retriever import open_retriever

    settings = with_encoder(given, encoder_directory, tmp_path / "workspace").using(
        "training.objective=distillation", "training.evaluate_steps=1", "training.max_steps=3"
    )
    tuned = settings.using(f"encoder.model={Path(train(settings).path).parent}")
    if artifacts.read_manifest(arms.tuned_model(settings.workspace, "retriever"))["best"]["step"]:
        with pytest.raises(artifacts.ArtifactError, match="was built by encoder"):
            open_retriever(tuned)


def test_a_run_without_improvement_returns_the_start(given: config.Config, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    result = train(given.using("training.arm=ft", "training.name=hopeless", "training.learning_rate=1e-30"))
    url = result.path
    assert "no step was better than the start" in capfd.readouterr().err
    start, end = (load_file(Path(path) / "model.safetensors") for path in (given.generator.model, url))
    assert all((start[name] == end[name]).all() for name in start)
    assert result.to_arrow().to_pylist() == [
        dict.fromkeys(result.to_arrow().column_names) | row for row in metrics(url)
    ]


def test_a_non_finite_loss_is_an_error_with_its_step(
    given: config.Config, tmp_path: Path, generator_directory: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(generator_directory, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"step 1: loss nan, .* Lower training.learning_rate"):
        train(given.using(f"generator.model={broken}", "training.arm=ft", "training.name=broken"))


def test_too_many_workers_are_refused_at_once(given: config.Config) -> None:
    with pytest.raises(config.ConfigError, match=r"training\.workers=64"):
        train(
            given.using("training.arm=ft", "training.workers=64", "training.batch_examples=64", "training.name=crowd")
        )


@pytest.mark.parametrize(
    ("overrides", "num_examples", "smallest"),
    [
        (("batch_examples=4", "workers=8"), 32, 4),
        (("batch_examples=16", "workers=2"), 1, 1),
        (("batch_examples=4", "workers=4"), 9, 3),
    ],
)
def test_a_worker_without_an_example_is_refused(overrides: tuple[str, ...], num_examples: int, smallest: int) -> None:
    given = config.Config().using(*(f"training.{override}" for override in overrides)).training
    fields = r"training\.workers=\d.* training\.batch_examples=\d"
    with pytest.raises(config.ConfigError, match=rf"{fields}.* {num_examples} examples has {smallest};"):
        train_module._require_rows(given, num_examples)


def test_one_example_per_worker_in_the_smallest_step_suffices() -> None:
    train_module._require_rows(config.Training(batch_examples=4, workers=3), 9)


def test_too_few_cpus_are_refused_only_on_a_local_machine(monkeypatch: pytest.MonkeyPatch, shared_ray: None) -> None:
    settings = config.Config().using("training.workers=1000")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(config.ConfigError, match=r"training\.workers=1000: the cluster has CPUs for \d+; lower it"):
        train_module._require_room(settings)
    train_module._require_room(settings.using("cluster.address=ray://head:10001"))


def test_fsdp_is_refused_for_an_encoder(given: config.Config) -> None:
    with pytest.raises(
        config.ConfigError, match=r"training\.objective=contrastive: only sft .* training\.strategy=ddp"
    ):
        train(given.using("training.objective=contrastive", "training.strategy=fsdp"))


def test_missing_training_queries_are_an_error_about_splits(given: config.Config) -> None:
    with pytest.raises(inputs.InputError, match=r"training needs queries of split train: set queries.split_by"):
        train(given.using("queries.split_by=given"))


def test_a_document_of_two_splits_is_an_error(given: config.Config, tmp_path: Path) -> None:
    path = tmp_path / "leaky.jsonl"
    write_queries(path, 4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, split in zip(rows, ("train", "train", "validation", "test"), strict=True):
        row["split"] = split
    rows[3]["document_ids"] = ["d0"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(splits.LeakError, match="'d0'"):
        train(given.using(f"queries.path={path}", "queries.split_by=given"))


def test_questions_on_one_passage_may_share_distractors(given: config.Config, tmp_path: Path) -> None:
    path = tmp_path / "three_on_each.jsonl"
    rows = [
        {
            "query_id": f"q{number}-{other}",
            "text": f"What is the code of vessel{number}, not of vessel{(number + other) % 40}?",
            "answers": [f"secret{number}"],
            "document_ids": [f"d{number}"],
        }
        for number in range(20)
        for other in (1, 2, 3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = given.using(f"queries.path={path}", "training.gold_left_out_share=0")
    kinds: dict[str, dict[str, set[tuple[str, ...]]]] = {}
    for whose in ("query", "passage"):
        url = prepare.prepare(asked.using(f"training.distractors={whose}"))
        for row in pq.read_table(Path(url) / prepare.TRAIN).to_pylist():
            gold = row["passage_ids"][row["gold_place"] - 1]
            kinds.setdefault(whose, {}).setdefault(gold, set()).add(tuple(row["passage_ids"]))
    assert {len(shown) for shown in kinds["passage"].values()} == {1}
    assert {len(passages) for shown in kinds["passage"].values() for passages in shown} == {2}
    assert max(len(shown) for shown in kinds["query"].values()) > 1, "the questions retrieve different passages"


def test_lexical_retrieval_provides_hard_negatives(given: config.Config) -> None:
    asked = given.using("training.objective=query_side", "retrieval.mode=lexical", "training.negative_margin=0.05")
    rows = pq.read_table(Path(prepare.prepare(asked)) / prepare.TRAIN).to_pylist()
    documents = [[name.rpartition("#")[0] for name in row["passage_ids"]] for row in rows]
    assert max(len(names) for names in documents) == 3
    assert all(positive not in negatives for positive, *negatives in documents)


def test_answers_longer_than_the_window_are_rejected_and_counted(given: config.Config, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    write_queries(path, 40)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["answers"] = ["secret " * 200]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        inputs.InputError, match=r"no train query of \d+ yields an example; the first: .*training.max_tokens"
    ):
        train(given.using(f"queries.path={path}", "training.arm=ft"))


def test_a_damaged_checkpoint_list_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / train_module.SNAPSHOT).write_text('{"torn": ')
    train_module._mend_snapshot(str(tmp_path))
    assert not (tmp_path / train_module.SNAPSHOT).exists()
    assert "is damaged" in caplog.text


@pytest.mark.slow
def test_replay_has_no_passages_and_is_checked_for_leaks(given: config.Config, tmp_path: Path) -> None:
    path = tmp_path / "replay.jsonl"
    rows = [{"query_id": f"r{number}", "text": f"Say {number}?", "answers": [f"{number}"]} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replayed = given.using(f"training.replay_path={path}", "training.replay_share=0.25")
    url = prepare.prepare(replayed)
    kinds = artifacts.read_manifest(url)["kinds"]
    others = sum(count for kind, count in kinds.items() if kind != "replay")
    assert kinds["replay"] == round(others / 3)
    shown = [row for row in pq.read_table(Path(url) / "train.parquet").to_pylist() if row["kind"] == "replay"]
    assert all(not row["passage_ids"] and row["query_id"].startswith("r") for row in shown)

    (test_query, *_) = [
        row
        for row in splits.selected_queries(given.queries.model_copy(update={"split": "test"}))
        if isinstance(row, schema.Query)
    ]
    path.write_text(json.dumps({**rows[0], "document_ids": test_query.document_ids}) + "\n")
    with pytest.raises(splits.LeakError):
        prepare.prepare(replayed)


@pytest.mark.slow
def test_fsdp_has_the_losses_of_ddp(given: config.Config, tmp_path: Path) -> None:
    # Uneven questions and few tokens per pass, so that workers have different numbers of pieces.
    uneven = tmp_path / "uneven.jsonl"
    write_queries(uneven, 40)
    rows = [json.loads(line) for line in uneven.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] += " please" * (number % 7) ** 2
    uneven.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = given.using(
        f"queries.path={uneven}",
        "training.arm=ft",
        "training.max_steps=4",
        "training.evaluate_steps=4",
        "training.workers=2",
        "training.micro_batch_tokens=64",
    )
    runs = {
        strategy: steps(train(settings.using(f"training.strategy={strategy}", f"training.name={strategy}")).path)
        for strategy in ("ddp", "fsdp")
    }
    losses = {strategy: [row["loss"] for row in rows] for strategy, rows in runs.items()}
    assert losses["fsdp"] == pytest.approx(losses["ddp"], rel=1e-4)


@pytest.mark.slow
def test_a_compiled_model_has_the_losses_of_a_plain_one(given: config.Config) -> None:
    settings = given.using("training.arm=ft", "training.max_steps=4")
    losses = [
        [row["loss"] for row in steps(train(settings.using(f"training.name={name}", f"training.compile={value}")).path)]
        for name, value in (("plain", "false"), ("compiled", "true"))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_adapters_on_a_quantized_model_are_trained_by_two_workers(given: config.Config, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    save_model(tmp_path, hidden_size=64, intermediate_size=128)  # on CPUs, bitsandbytes needs multiples of 64
    settings = given.using(
        f"generator.model={tmp_path}",
        "training.arm=ft",
        "training.name=quantized",
        "training.learning_rate=0.01",
        "training.workers=2",
        "training.lora_rank=4",
        "training.quantization=nf4",
    )
    model = train(settings)
    losses = [row["loss"] for row in steps(model.path)]
    assert losses[-1] < losses[0]
    files = {path.relative_to(model.path).as_posix() for path in Path(model.path).rglob("*.safetensors")}
    assert files == {"model.safetensors", f"{trainable.ADAPTER}/adapter_model.safetensors"}


def test_a_full_disk_is_refused_before_training(given: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "free_bytes", lambda _: 1000)
    with pytest.raises(filesystem.SpaceError, match="checkpoints of training"):
        train(given.using("training.arm=ft", "training.name=full"))
