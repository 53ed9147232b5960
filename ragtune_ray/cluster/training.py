"""Ray Train: one loop that fine-tunes the generator or the retriever; the objective is the argument.

In: a config with queries that have splits. Out: `models/NAME/ID/`, a model directory with its card, its metrics and a manifest,
and `models/NAME/CURRENT`, which names the last one. The loop knows nothing of losses: `objectives` has them.

Workers go through the same steps in the same order whatever their number; each takes its part of every step. A checkpoint is a
directory with a checksum per file, uploaded while training goes on. Whoever starts (a replaced worker, a new driver) goes on
from the newest one that is sound, so a run that was killed anywhere ends with the weights of one that was not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import batching, config, model_card, models, progress, schema, storage
from ragtune_ray.cluster import preparation, session

if TYPE_CHECKING:
    import numpy as np
    import ray.data
    from torch import Tensor, nn

__all__ = ["train"]

logger = logging.getLogger(__name__)

FORMAT = 1
"""Part of a model's identity: raise it when the same input would give other weights."""
RUN_NAME = "train"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train keeps which checkpoints it knows."""
METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
STEPS_PER_BLOCK = 16
KEPT_CHECKPOINTS = 2
POLL_SECONDS = 0.5
BYTES_PER_WEIGHT = 4 * (3 + 1) * (KEPT_CHECKPOINTS + 1)
"""On disk: weights, two moments and the best weights, in float32, of every checkpoint that is kept or being written."""
UNRELATED = {
    "name",
    "max_failures",
    "workers",
    "max_workers",
    "checkpoint_steps",
    "micro_batch_tokens",
    "gradient_checkpointing",
}
"""Fields of `training` that do not change what is learnt."""


def train(settings: config.Config) -> str:
    """Fine-tune the model that `training.objective` is about.

    Args:
        settings: workspace, seed, queries, index, encoder, retrieval, prompt, generator, training and cluster are used.

    Returns:
        The model's directory.

    Raises:
        fitting.TrainingError: the loss was not finite, or training failed for good.
        splitting.LeakError: splits share a relevant document.
        inputs.InputError: there is nothing to learn from.
        config.ConfigError: the cluster has too little room for the workers.
    """
    training = settings.training
    base = models.resolve(settings.generator.model if training.objective == "sft" else settings.encoder.model)
    if base.directory is None:
        raise config.ConfigError(f"encoder.model {base.name!r} has no weights to train; name a model")
    examples = preparation.prepare(settings)
    identity = {
        "format": FORMAT,
        "examples": storage.read_manifest(examples)["manifest_sha256"],
        "base": base.fingerprint,
        "training": training.model_dump(mode="json", exclude=UNRELATED),
        "prefixes": [settings.encoder.query_prefix, settings.encoder.passage_prefix]
        if training.objective != "sft"
        else None,
        "seed": settings.seed,
    }
    name = models.tuned_name(training)
    folder = storage.join(settings.workspace, "models", name)
    url = storage.join(folder, storage.digest(identity))
    if storage.is_finished(url):
        progress.say("train: this model is already trained; nothing to do")
    else:
        work = storage.join(settings.workspace, "models", ".work", f"{name}-{storage.digest(identity)}")
        storage.require_space(
            work, BYTES_PER_WEIGHT * _num_weights(base.directory, training), "checkpoints of training"
        )
        with session.ray_session(settings.cluster):
            _fit(settings, examples, url, work)
        storage.remove(work)
    storage.replace_text(storage.join(folder, models.CURRENT), url.rpartition("/")[2] + "\n")
    _say_result(storage.read_manifest(url))
    return url


def _num_weights(directory: Path, training: config.Training) -> int:
    """About how many weights are trained: two bytes or more stand for each in the files; adapters are a few in a hundred."""
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    return num_bytes // 2 // (20 if training.lora_rank else 1)


def _say_result(manifest: dict[str, Any]) -> None:
    start, best = manifest["start"]["score"], manifest["best"]["score"]
    if manifest["best"]["step"]:
        found = f"best after step {manifest['best']['step']}: validation score {best:.4f}, at the start {start:.4f}"
    else:
        found = (
            f"no step was better than the start (validation score {start:.4f}): the model is the one it started from"
        )
    progress.say(f"train: {manifest['num_steps']:,} steps, {found}")


def _fit(settings: config.Config, examples: str, url: str, work: str) -> None:
    """Run the workers until the model stands at `url`."""
    import ray
    import ray.exceptions
    import ray.train
    from ray.train.torch import TorchTrainer

    from ragtune_ray.fitting import TrainingError

    training = settings.training
    _require_room(settings)
    _mend_snapshot(storage.join(work, RUN_NAME))
    num_examples = storage.read_manifest(examples)["num_train"]
    num_steps = batching.num_steps(num_examples, training)
    board = ray.remote(num_cpus=0)(_Board).remote()
    arguments = {
        "settings": settings.model_dump(mode="json"),
        "examples": examples,
        "url": url,
        "work": work,
        "num_steps": num_steps,
        "board": board,
    }
    gpus = settings.cluster.gpus_per_worker
    trainer = TorchTrainer(
        _work,
        train_loop_config=arguments,
        scaling_config=ray.train.ScalingConfig(
            num_workers=(training.workers, training.max_workers) if training.max_workers else training.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=RUN_NAME,
            storage_path=work if "://" in work else str(Path(work).resolve()),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
        datasets={"train": _steps_dataset(settings, examples, num_examples)},
        # Every worker sees every step and takes its rows of it: so the steps do not depend on how many workers there are.
        dataset_config=ray.train.DataConfig(datasets_to_split=[], execution_options=_ordered()),
    )
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = trainer.fit().return_value
        except ray.exceptions.RayError as error:
            outcome["error"] = error
        except ray.train.TrainingFailedError as error:
            outcome["error"] = error

    fitting_thread = threading.Thread(target=run, name="ragtune-train", daemon=True)
    fitting_thread.start()
    with progress.stage("train", num_steps, "steps") as shown:
        while True:
            fitting_thread.join(POLL_SECONDS)
            seen = ray.get(board.read.remote())
            shown.advance(max(0, seen["step"] - shown.done))
            for line in seen["lines"]:
                progress.say(line)
            if not fitting_thread.is_alive():
                break
    if "error" in outcome:
        raise TrainingError(
            f"training stopped: {_cause(outcome['error'])}; run the command again: it goes on from the last checkpoint"
        ) from outcome["error"]
    if outcome["result"].get("error"):
        raise TrainingError(outcome["result"]["error"])


def _cause(error: BaseException) -> str:
    """The workers' own words where there are any, without Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = next(iter(failures.values()), error)
    inner = getattr(inner, "cause", None) or inner
    return (str(inner).strip().splitlines() or [type(inner).__name__])[-1]


def _require_room(settings: config.Config) -> None:
    import ray

    kind, each = ("GPU", settings.cluster.gpus_per_worker) if settings.cluster.gpus_per_worker else ("CPU", 1)
    room = int(ray.cluster_resources().get(kind, 0) / each)
    if room < settings.training.workers:
        raise config.ConfigError(
            f"training.workers={settings.training.workers}: the cluster has {kind}s for {room}; lower it or add nodes"
        )


def _mend_snapshot(run: str) -> None:
    """Ray Train refuses to start beside a torn list of its checkpoints: without one it starts, and finds ours by their names."""
    url = storage.join(run, SNAPSHOT)
    if not storage.exists(url):
        return
    try:
        json.loads(storage.read_text(url))
    except ValueError:
        logger.warning("%s is damaged; it is removed, and the newest sound checkpoint beside it is used", url)
        storage.remove(url)


class _Board:
    """Where workers write how far they are and the driver reads it."""

    def __init__(self) -> None:
        self._step, self._lines = 0, list[str]()

    def write(self, step: int, line: str = "") -> None:
        """Note the steps that are done and, if given, a line for people."""
        self._step = max(self._step, step)
        if line:
            self._lines.append(line)

    def read(self) -> dict[str, Any]:
        """The steps that are done, and the lines since the last reading."""
        lines, self._lines = self._lines, []
        return {"step": self._step, "lines": lines}


def _ordered() -> Any:
    import ray.data

    options = ray.data.ExecutionOptions()
    options.preserve_order = True
    return options


def _steps_dataset(settings: config.Config, examples: str, num_examples: int) -> ray.data.Dataset:
    """One row per step, in order: its number and its examples."""
    import ray.data

    plan = [
        {"step": step, "rows": rows.tolist()}
        for step, rows in enumerate(batching.steps(num_examples, settings.training, settings.seed))
    ]
    dataset = ray.data.from_items(plan, override_num_blocks=-(-len(plan) // STEPS_PER_BLOCK))
    # No CPU of its own: training workers may hold all of them, and reading is a thousandth of the work.
    return dataset.map_batches(
        functools.partial(_load_step, examples),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=1),
    )


def _load_step(examples: str, batch: pa.Table) -> pa.Table:
    """The row numbers of a step -> its examples, as a list of structs."""
    rows = _table(examples, preparation.TRAIN).take(batch["rows"].combine_chunks().flatten()).combine_chunks()
    packed = pa.ListArray.from_arrays(pa.array([0, rows.num_rows], pa.int32()), rows.to_struct_array().combine_chunks())
    return pa.table({"step": batch["step"], "examples": packed})


@functools.lru_cache(maxsize=4)
def _table(examples: str, name: str) -> pa.Table:
    path = storage.open_artifact(examples, "examples").path / name
    return pq.read_table(path, memory_map=True, page_checksum_verification=True)


def _steps_from(first: int, record: type) -> Iterator[tuple[int, list[Any]]]:
    """This worker's stream of steps: number and examples of each, from the `first` on."""
    import ray.train

    stream = ray.train.get_dataset_shard("train")
    expected = first
    for batch in stream.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
        step = batch["step"][0].as_py()
        if step < first:
            continue
        assert step == expected, f"step {step} came where {expected} should"
        expected += 1
        rows = batch["examples"].combine_chunks().flatten()
        yield step, list(schema.from_table(pa.Table.from_struct_array(rows), record))


@dataclass
class _Run:
    """What a worker holds while it trains."""

    settings: config.Config
    worker: int
    workers: int
    objective: Any
    module: nn.Module
    optimizer: Any
    num_steps: int
    validation: list[Any]
    board: Any
    dtype: Any
    step: int = 0
    start: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    """Of all steps, waiting for their examples included; evaluations and checkpoints not."""
    num_tokens: int = 0
    clock: float = 0.0
    """When the present step began to wait for its examples."""

    def facts(self) -> dict[str, Any]:
        """What of this a checkpoint holds beside the tensors."""
        names = ("step", "start", "best", "metrics", "seconds", "num_tokens")
        return {name: getattr(self, name) for name in names}


def _work(arguments: dict[str, Any]) -> dict[str, Any]:
    """What every training worker does; the first one writes."""
    from ragtune_ray.fitting import TrainingError

    run = _begin(arguments)
    checkpoints = storage.join(arguments["work"], RUN_NAME)
    _resume(run, checkpoints)
    if not run.start:
        run.start = _validate(run)
        run.best = {"step": 0, **run.start}
        _note(run, {"step": 0, **run.start})
    try:
        run.clock = time.perf_counter()
        for step, rows in _steps_from(run.step, preparation.example_type(run.settings.training)):
            _take(run, step, rows)
            _after_step(run)
            run.clock = time.perf_counter()
    except TrainingError as error:
        return {"error": str(error)}
    _finish(run, arguments)
    return {"error": ""}


def _begin(arguments: dict[str, Any]) -> _Run:
    """Load the model and the examples, and join the other workers."""
    import ray.train
    import torch

    from ragtune_ray import fitting, trainable
    from ragtune_ray.hardware import keep_freed_memory, resolve_precision

    context = ray.train.get_context()
    settings = config.Config.model_validate(arguments["settings"])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    torch.manual_seed(settings.seed)
    keep_freed_memory()
    record = preparation.example_type(settings.training)
    validation: list[Any] = list(schema.from_table(_table(arguments["examples"], preparation.VALIDATION), record))
    objective = trainable.load_objective(settings, _source(settings), _pool(settings, arguments["examples"]))
    fitting.freeze_unreached(objective, objective, validation[:1])
    module = _spread(objective, settings.training)
    device = next(module.parameters()).device
    return _Run(
        settings=settings,
        worker=context.get_world_rank(),
        workers=context.get_world_size(),
        objective=objective,
        module=module,
        optimizer=fitting.make_optimizer(module, settings.training),
        num_steps=arguments["num_steps"],
        validation=validation,
        board=arguments["board"],
        dtype=resolve_precision(settings.training.precision, str(device)),
    )


def _source(settings: config.Config) -> Path:
    """The directory of the model that is trained, on this node."""
    name = settings.generator.model if settings.training.objective == "sft" else settings.encoder.model
    directory = models.resolve(name).directory
    assert directory is not None
    return directory


def _pool(settings: config.Config, examples: str) -> dict[str, np.ndarray]:
    """Stored vectors by passage_id, for `query_side`; else nothing."""
    if settings.training.objective != "query_side":
        return {}
    table = _table(examples, preparation.POOL)
    vectors = table["vector"].combine_chunks()
    return dict(
        zip(table["passage_id"].to_pylist(), vectors.flatten().to_numpy().reshape(len(vectors), -1), strict=True)
    )


def _spread(objective: nn.Module, training: config.Training) -> nn.Module:
    """The objective as all workers train it together."""
    import ray.train.torch

    if training.strategy == "ddp":
        # Buffers are constants here, and sending them would come between the exchanges of the objectives themselves.
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        module: nn.Module = ray.train.torch.prepare_model(objective, parallel_strategy_kwargs=options)
        return module
    from torch.distributed.fsdp import fully_shard

    objective.to(ray.train.torch.get_device())
    layers = {name for part in objective.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in list(objective.modules()):
        if type(part).__name__ in layers:
            fully_shard(part)
    fully_shard(objective)  # in place
    return objective


def _resume(run: _Run, checkpoints: str) -> None:
    """Go back to the newest sound checkpoint, if there is one; the first worker chooses for all."""
    from ray.train.collective import broadcast_from_rank_zero

    from ragtune_ray import fitting

    chosen = broadcast_from_rank_zero(_newest_sound(run, checkpoints) if run.worker == 0 else "")
    if not chosen:
        return
    path = storage.open_artifact(chosen, "checkpoint").path
    facts, run.best_weights = fitting.load_state(path, run.module, run.optimizer)
    for name, value in facts.items():
        setattr(run, name, value)
    if not run.best_weights and run.best["step"] == run.step:
        run.best_weights = fitting.trainable_weights(run.module)
    _tell(run, f"train: going on from the checkpoint of step {run.step:,}")


def _newest_sound(run: _Run, checkpoints: str) -> str:
    """The directory of the newest checkpoint that is whole; "" where there is none."""
    for name in sorted(storage.list_names(checkpoints), reverse=True):
        if not name.startswith("step-"):
            continue
        url = storage.join(checkpoints, name)
        try:
            storage.open_artifact(url, "checkpoint")
        except storage.ArtifactError as error:
            _tell(run, f"train: warning: {error}; the checkpoint before it is used")
            continue
        return url
    return ""


def _take(run: _Run, step: int, rows: list[Any]) -> None:
    """One optimiser step of all workers."""
    import numpy as np

    from ragtune_ray import fitting

    training = run.settings.training
    lengths = np.array([_num_tokens(row) for row in rows])
    own = [rows[place] for place in batching.own_rows(lengths, run.worker, run.workers)]
    factor = fitting.learning_rate_factor(step, run.num_steps, training.warmup_share)
    for group in run.optimizer.param_groups:
        group["lr"] = fitting.peak_learning_rate(training) * factor
    weight = run.objective.weight(rows)
    result = fitting.take_step(
        run.module, run.objective, own, weight, run.optimizer, training.clip_norm, functools.partial(_computing, run)
    )
    if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
        shown = ", ".join(row.query_id for row in rows[:3])
        raise fitting.TrainingError(
            f"step {step + 1}: the loss is {result.loss} and the length of its gradient {result.gradient_norm}; the weights were "
            f"not moved. Lower training.learning_rate, set training.precision=float32, or look at its examples ({shown}, ...)"
        )
    run.step = step + 1
    seconds = time.perf_counter() - run.clock
    run.seconds += seconds
    run.num_tokens += int(lengths.sum())
    _note(
        run,
        {
            "step": run.step,
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "learning_rate": fitting.peak_learning_rate(training) * factor,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(float(lengths.sum()) / seconds, 1),
        },
    )


def _num_tokens(row: Any) -> int:
    if isinstance(row, schema.GeneratorExample):
        return row.num_prompt_tokens + row.num_answer_tokens
    return int(row.num_tokens)


def _computing(run: _Run) -> contextlib.AbstractContextManager[Any]:
    from ragtune_ray import fitting

    return fitting.autocast(str(next(run.module.parameters()).device), run.dtype)


def _after_step(run: _Run) -> None:
    """Evaluate and save where it is due."""
    from ragtune_ray import fitting

    training = run.settings.training
    last = run.step == run.num_steps
    if run.step % training.evaluate_steps == 0 or last:
        scores = _validate(run)
        _note(run, {"step": run.step, **scores})
        if scores["score"] > run.best["score"]:
            run.best = {"step": run.step, **scores}
            run.best_weights = fitting.trainable_weights(run.module)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "score")
        _tell(run, f"train: step {run.step:,}: validation {shown} (at the start {abs(run.start['score']):.4f})")
    elif run.worker == 0:
        run.board.write.remote(run.step)
    if run.step % training.checkpoint_steps == 0 and not last:
        _save(run)


def _validate(run: _Run) -> dict[str, float]:
    run.module.eval()
    with _computing(run):
        scores: dict[str, float] = run.objective.validate(run.validation)
    run.module.train()
    return scores


def _save(run: _Run) -> None:
    """Hand a checkpoint to Ray Train, which uploads it while the next steps are taken."""
    import ray.train
    from ray.train import CheckpointUploadMode

    from ragtune_ray import fitting

    folder = Path(tempfile.mkdtemp(prefix="ragtune-checkpoint-"))
    staging, finished = folder / "staging", folder / "checkpoint"
    staging.mkdir()
    best = run.best_weights if run.best["step"] not in (0, run.step) else {}
    fitting.save_state(staging, run.module, run.optimizer, best, run.facts())
    checkpoint = None
    if run.worker == 0:
        storage.publish(staging, str(finished), "checkpoint", step=run.step)
        checkpoint = ray.train.Checkpoint.from_directory(str(finished))
    else:
        shutil.rmtree(folder)
    ray.train.report(
        {"step": run.step},
        checkpoint=checkpoint,
        checkpoint_dir_name=f"step-{run.step:08d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _note(run: _Run, row: dict[str, Any]) -> None:
    run.metrics.append(row)


def _tell(run: _Run, line: str) -> None:
    if run.worker == 0:
        run.board.write.remote(run.step, line)


def _finish(run: _Run, arguments: dict[str, Any]) -> None:
    """Write the best weights as a plain model directory and publish it."""
    from ragtune_ray import trainable

    if run.worker != 0:
        return
    settings, source = run.settings, _source(run.settings)
    staging = storage.stage(arguments["url"])
    trainable.save_model(settings, source, run.best_weights, staging)
    (staging / METRICS).write_text("".join(json.dumps(row) + "\n" for row in run.metrics), encoding="utf-8")
    _write_events(staging / EVENTS, run.metrics)
    facts = {
        "objective": settings.training.objective,
        "arm": settings.training.arm if settings.training.objective == "sft" else None,
        "base": models.resolve(
            settings.generator.model if settings.training.objective == "sft" else settings.encoder.model
        ).name,
        "base_fingerprint": models.fingerprint(source),
        "examples": arguments["examples"],
        "input": {
            name: value
            for name, value in storage.read_manifest(arguments["examples"]).items()
            if name in ("num_train", "num_validation", "kinds", "num_rejects", "input", "index_version")
        },
        "num_steps": run.num_steps,
        "num_workers": run.workers,
        "start": run.start,
        "best": run.best,
        "seconds": {"steps": round(run.seconds, 3)},
        "tokens_per_second": round(run.num_tokens / max(run.seconds, 1e-9), 1),
    }
    if settings.training.objective == "query_side":
        facts["passage_encoder"] = models.encoder_fingerprint(models.fingerprint(source), settings.encoder)
    (staging / "README.md").write_text(model_card.model_card(facts, settings), encoding="utf-8")
    storage.publish(staging, arguments["url"], "model", config=settings.model_dump(mode="json"), **facts)
    run.board.write.remote(run.num_steps)


def _write_events(directory: Path, metrics: list[dict[str, Any]]) -> None:
    """The metrics as TensorBoard events."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(logdir=str(directory)) as writer:
        for row in metrics:
            kind = "train" if "learning_rate" in row else "validation"
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(f"{kind}/{name}", value, row["step"])
