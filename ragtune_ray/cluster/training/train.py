"""`ragtune train`: fine-tunes the generator or the retriever with Ray Train.

In: a config with queries that have splits. Out: `models/NAME/ID/`, a model directory with its card, metrics and manifest, and
`models/NAME/CURRENT`, which names the latest.

All workers run the same steps in the same order and share the examples of each step. A checkpoint is a directory with a checksum
per file, uploaded while training continues. A replaced worker or a new driver resumes from the newest undamaged checkpoint, so an
interrupted run ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from ragtune_ray import config, progress
from ragtune_ray.cluster import actors, runs, session
from ragtune_ray.cluster.training import feeding, prepare, worker
from ragtune_ray.cluster.training.worker import WorkerArguments
from ragtune_ray.models import arms, weights
from ragtune_ray.storage import artifacts, checksums, filesystem
from ragtune_ray.storage.results import Result
from ragtune_ray.training import batching
from ragtune_ray.training.manifest import ModelManifest, read_model_manifest

if TYPE_CHECKING:
    import ray.data
    from ray.train.torch import TorchTrainer

logger = logging.getLogger(__name__)

FORMAT = 3
"""Part of a model's identity: raise it when a code change makes the same input lead to other weights."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of its checkpoints."""
KEPT_CHECKPOINTS = 2
POLL_SECONDS = 0.5
BYTES_PER_WEIGHT = 4 * (3 + 1) * (KEPT_CHECKPOINTS + 1)
"""Disk space per weight: it, two moments and its best value in float32, for each kept checkpoint and the next one."""


class TrainResult(Result):
    """A trained model: a directory that loads with transformers or sentence-transformers."""

    @property
    def manifest(self) -> ModelManifest:
        """The facts in the model's manifest.json."""
        return read_model_manifest(self.path)

    def to_arrow(self) -> pa.Table:
        """The metrics: one row per step (loss, gradient_norm, learning_rate, ...) and one per validation."""
        path = artifacts.open_artifact(self.path, "model", [worker.METRICS]).path / worker.METRICS
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.table({name: [row.get(name) for row in rows] for name in names})


def train(settings: config.Config) -> TrainResult:
    """Fine-tune the model that `training.objective` trains.

    Raises:
        TrainingError: the loss was not finite, or training failed permanently.
        LeakError: a document is relevant to queries of two splits.
        InputError: there are no examples to learn from.
        ConfigError: the cluster has too few CPUs or GPUs, a step has fewer examples than there are workers, or
            `training.strategy` does not support the objective.
        ModelError: the model cannot be found or has no weights.
    """
    training = settings.training
    _require_strategy(training)
    base = arms.base_model(settings)
    with contextlib.ExitStack() as session_stack:
        examples = prepare.prepare(settings, session_stack)
        # The retriever's model, trained in addition to `base`.
        encoder = weights.resolve(settings.encoder.model) if training.objective == "joint" else None
        identity = checksums.digest(_identity(settings, examples, base, encoder))
        name = arms.tuned_name(training)
        folder = filesystem.join(settings.workspace, "models", name)
        url = filesystem.join(folder, identity)
        if artifacts.is_finished(url):
            progress.say("train: this model is already trained; nothing to do")
        else:
            work = filesystem.join(settings.workspace, "models", ".work", f"{name}-{identity}")
            num_weights = _num_weights(weights.weights_of(base), training)
            if encoder is not None:
                num_weights += _num_weights(weights.weights_of(encoder), config.Training())
            filesystem.require_space(work, BYTES_PER_WEIGHT * num_weights, "checkpoints of training")
            session_stack.enter_context(session.ray_session(settings.cluster, for_training=True))
            _fit(settings, examples, url, work)
            filesystem.remove(work)
    artifacts.make_current(folder, identity)
    result = TrainResult(url)
    _say_result(result.manifest)
    return result


def _identity(
    settings: config.Config, examples: str, base: weights.Model, encoder: weights.Model | None
) -> dict[str, Any]:
    training = settings.training
    prefixed = weights.with_prompts(settings.encoder, (encoder or base).directory)
    prefixes = [prefixed.query_prefix, prefixed.passage_prefix]
    identity = {
        "format": FORMAT,
        "examples": runs.read_manifest(examples)["manifest_sha256"],
        "base": base.fingerprint,
        "training": training.identity(),
        "prefixes": prefixes if training.objective != "sft" else None,
        "seed": settings.seed,
    }
    # Added only for `joint`: a new key for the others would change the identity of all existing models.
    return identity | ({"encoder": encoder.fingerprint} if encoder is not None else {})


def _num_weights(directory: Path, training: config.Training) -> int:
    """Estimate the number of trained weights: two bytes each in the files, or a twentieth of them with adapters."""
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    return num_bytes // 2 // (20 if training.lora_rank else 1)


def _say_result(manifest: ModelManifest) -> None:
    start, best = cast(Mapping[str, float], manifest["start"]), cast(Mapping[str, float], manifest["best"])
    # The first metric is the one that decides, such as `loss`; `score` is its negative where less is better.
    metric = next(name for name in start if name != "score")
    if best["step"]:
        found = (
            f"best after step {best['step']}: validation {metric} {best[metric]:.4f}, at the start {start[metric]:.4f}"
        )
    else:
        found = (
            f"no step was better than the start (validation {metric} {start[metric]:.4f}): the weights are unchanged"
        )
    progress.say(f"train: {manifest['num_steps']:,} steps, {found}")


def _fit(settings: config.Config, examples: str, url: str, work: str) -> None:
    """Run the workers until they have published the model at `url`."""
    import ray
    import ray.exceptions
    import ray.train
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ragtune_ray.training.optimization import TrainingError

    num_examples = runs.read_manifest(examples)["num_train"]
    actors.release()
    _require_room(settings)
    _require_rows(settings.training, num_examples)
    _mend_snapshot(filesystem.join(work, worker.RUN_NAME))
    num_steps = batching.num_steps(num_examples, settings.training)
    # On the driver's node: progress must not end with a node of the workers.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
    arguments: WorkerArguments = {
        "settings": settings.model_dump(mode="json"),
        "examples": examples,
        "url": url,
        "work": work,
        "num_steps": num_steps,
        "board": board,
        "models": session.models(settings),
    }
    smallest = batching.smallest_step(num_examples, settings.training.batch_examples)
    max_workers = min(settings.training.max_workers, smallest)
    trainer = _trainer(settings, arguments, feeding.steps_dataset(settings, examples), max_workers)
    try:
        with _shown(board, num_steps):
            result = trainer.fit().return_value
    except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
        raise TrainingError(
            f"training stopped: {_cause(error)}; run the command again to resume from the last checkpoint"
        ) from error
    if result["error"]:
        raise TrainingError(result["error"])


def _trainer(
    settings: config.Config, arguments: WorkerArguments, steps: ray.data.Dataset, max_workers: int
) -> TorchTrainer:
    # Otherwise Ray Train changes its workers' directory, which breaks relative paths of workspaces and models.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    import ray.train
    from ray.train.torch import TorchTrainer

    training, gpus, work = settings.training, settings.cluster.gpus_per_worker, arguments["work"]
    return TorchTrainer(
        worker.run_worker,
        train_loop_config=dict(arguments),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(training.workers, max_workers) if max_workers else training.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=worker.RUN_NAME,
            storage_path=work if "://" in work else str(Path(work).resolve()),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
        datasets={"train": steps},
        # Every worker reads all rows of a step and selects its own, so steps do not depend on the number of workers.
        dataset_config=ray.train.DataConfig(datasets_to_split=[], execution_options=feeding.in_order()),
    )


@contextlib.contextmanager
def _shown(board: Any, num_steps: int) -> Iterator[None]:
    import ray

    ended = threading.Event()

    def watch(shown: progress.Stage) -> None:
        is_last = False
        while not is_last:
            is_last = ended.wait(POLL_SECONDS)
            seen = ray.get(board.read.remote())
            if seen["step"] == 0:
                shown.begin()  # the model is loaded and validated
            shown.advance(max(0, seen["step"] - shown.done))
            for line in seen["lines"]:
                progress.say(line)

    with progress.stage("train", num_steps, "steps") as shown:
        watching = threading.Thread(target=watch, args=(shown,), name="ragtune-train-progress", daemon=True)
        watching.start()
        try:
            yield
        finally:
            ended.set()
            watching.join()


def _cause(error: BaseException) -> str:
    """The worker's own error message, without Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = next(iter(failures.values()), error)
    inner = getattr(inner, "cause", None) or inner
    return (str(inner).strip().splitlines() or [type(inner).__name__])[-1]


def _require_room(settings: config.Config) -> None:
    import ray

    kind, each = ("GPU", settings.cluster.gpus_per_worker) if settings.cluster.gpus_per_worker else ("CPU", 1)
    room = int(ray.cluster_resources().get(kind, 0) / each)
    if room >= settings.training.workers:
        return
    found = f"training.workers={settings.training.workers}: the cluster has {kind}s for {room}"
    if not session.cluster_address(settings.cluster):
        raise config.ConfigError(f"{found}; lower it")
    # An autoscaling cluster adds larger nodes only when they are requested.
    progress.say(f"train: {found} now; training starts when more nodes have joined")


def _require_rows(training: config.Training, num_examples: int) -> None:
    """Refuse more workers than the smallest step has examples; they would wait forever for a worker without examples."""
    smallest = batching.smallest_step(num_examples, training.batch_examples)
    if smallest < training.workers:
        raise config.ConfigError(
            f"training.workers={training.workers}: every worker needs an example in every step, but with "
            f"training.batch_examples={training.batch_examples} the smallest step of {num_examples} examples has {smallest}; "
            f"set training.workers to {smallest} at most, raise training.batch_examples, or provide more questions"
        )


def _require_strategy(training: config.Training) -> None:
    """Refuse FSDP for all objectives but `sft`, because they call their encoder outside `forward`."""
    if training.strategy == "fsdp" and training.objective != "sft":
        raise config.ConfigError(
            f"training.strategy=fsdp with training.objective={training.objective}: only sft can be sharded over the workers; "
            "set training.strategy=ddp"
        )


def _mend_snapshot(run: str) -> None:
    """Remove a damaged checkpoint list, with which Ray Train refuses to start; training resumes without it."""
    url = filesystem.join(run, SNAPSHOT)
    if not filesystem.exists(url):
        return
    try:
        json.loads(filesystem.read_text(url))
    except ValueError:
        logger.warning("%s is damaged; it is removed, and training resumes from the newest undamaged checkpoint", url)
        filesystem.remove(url)


class _Board:
    """An actor that passes the workers' progress to the driver."""

    def __init__(self) -> None:
        self._step, self._lines = 0, list[str]()

    def write(self, step: int, line: str = "") -> None:
        """Report the number of finished steps and, optionally, a line to print."""
        self._step = max(self._step, step)
        if line:
            self._lines.append(line)

    def read(self) -> dict[str, Any]:
        """The number of finished steps, and the lines since the last call."""
        lines, self._lines = self._lines, []
        return {"step": self._step, "lines": lines}
