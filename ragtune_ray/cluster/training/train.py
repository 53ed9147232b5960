"""Ray Train: one loop that fine-tunes the generator or the retriever; the objective is the argument.

In: a config with queries that have splits. Out: `models/NAME/ID/`, a model directory with its card, its metrics and a manifest,
and `models/NAME/CURRENT`, which names the last one. The loop knows nothing of losses: `objectives` has them.

Workers go through the same steps in the same order whatever their number; each takes its part of every step. A checkpoint is a
directory with a checksum per file, uploaded while training goes on. Whoever starts (a replaced worker, a new driver) goes on
from the newest one that is sound, so a run that was killed anywhere ends with the weights of one that was not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragtune_ray import config, progress
from ragtune_ray.cluster import session
from ragtune_ray.cluster.training import feeding, prepare, worker
from ragtune_ray.models import arms, weights
from ragtune_ray.storage import artifacts, checksums, filesystem
from ragtune_ray.training import batching

if TYPE_CHECKING:
    import ray.data
    from ray.train.torch import TorchTrainer

__all__ = ["train"]

logger = logging.getLogger(__name__)

FORMAT = 3
"""Part of a model's identity: raise it when the same input would give other weights."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train keeps which checkpoints it knows."""
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
        config.ConfigError: the cluster has too little room for the workers, a step has fewer examples than there are workers, or
            the objective cannot be spread as `training.strategy` says.
        models.ModelError: the model cannot be had, or has no weights.
    """
    training = settings.training
    _require_strategy(training)
    base = arms.base_model(settings)
    examples = prepare.prepare(settings)
    identity = {
        "format": FORMAT,
        "examples": artifacts.read_manifest(examples)["manifest_sha256"],
        "base": base.fingerprint,
        "training": training.model_dump(mode="json", exclude=UNRELATED),
        "prefixes": [settings.encoder.query_prefix, settings.encoder.passage_prefix]
        if training.objective != "sft"
        else None,
        "seed": settings.seed,
    }
    encoder = weights.resolve(settings.encoder.model) if training.objective == "joint" else None
    if encoder is not None:  # no key of the others: it would make all that is trained already another model
        identity["encoder"] = encoder.fingerprint
    name = arms.tuned_name(training)
    folder = filesystem.join(settings.workspace, "models", name)
    url = filesystem.join(folder, checksums.digest(identity))
    if artifacts.is_finished(url):
        progress.say("train: this model is already trained; nothing to do")
    else:
        work = filesystem.join(settings.workspace, "models", ".work", f"{name}-{checksums.digest(identity)}")
        num_weights = _num_weights(weights.weights_of(base), training)
        if encoder is not None:
            num_weights += _num_weights(weights.weights_of(encoder), config.Training())
        filesystem.require_space(work, BYTES_PER_WEIGHT * num_weights, "checkpoints of training")
        with session.ray_session(settings.cluster, for_training=True):
            _fit(settings, examples, url, work)
        filesystem.remove(work)
    artifacts.make_current(folder, url.rpartition("/")[2])
    _say_result(artifacts.read_manifest(url))
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

    from ragtune_ray.training.optimization import TrainingError

    num_examples = artifacts.read_manifest(examples)["num_train"]
    _require_room(settings)
    _require_rows(settings.training, num_examples)
    _mend_snapshot(filesystem.join(work, worker.RUN_NAME))
    num_steps = batching.num_steps(num_examples, settings.training)
    board = ray.remote(num_cpus=0)(_Board).remote()
    arguments = {
        "settings": settings.model_dump(mode="json"),
        "examples": examples,
        "url": url,
        "work": work,
        "num_steps": num_steps,
        "board": board,
    }
    most = min(settings.training.max_workers, batching.smallest_step(num_examples, settings.training.batch_examples))
    trainer = _trainer(settings, arguments, feeding.steps_dataset(settings, examples), most)
    try:
        with _shown(board, num_steps):
            result = trainer.fit().return_value
    except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
        raise TrainingError(
            f"training stopped: {_cause(error)}; run the command again: it goes on from the last checkpoint"
        ) from error
    if result["error"]:
        raise TrainingError(result["error"])


def _trainer(
    settings: config.Config, arguments: dict[str, Any], steps: ray.data.Dataset, max_workers: int
) -> TorchTrainer:
    # Ray Train would move its workers to a directory of its own, where a workspace or model that is named relatively is not.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    import ray.train
    from ray.train.torch import TorchTrainer

    training, gpus, work = settings.training, settings.cluster.gpus_per_worker, arguments["work"]
    return TorchTrainer(
        worker.work,
        train_loop_config=arguments,
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
        # Every worker sees every step and takes its rows of it: so the steps do not depend on how many workers there are.
        dataset_config=ray.train.DataConfig(datasets_to_split=[], execution_options=feeding.in_order()),
    )


@contextlib.contextmanager
def _shown(board: Any, num_steps: int) -> Iterator[None]:
    """Show what workers write on the board for as long as the block runs."""
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
    """The workers' own words where there are any, without Ray's wrapping."""
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
    if not (settings.cluster.address or os.environ.get("RAY_ADDRESS")):
        raise config.ConfigError(f"{found}; lower it")
    # A cluster that grows has none of its larger nodes before they are asked for.
    progress.say(f"train: {found} now; training begins when nodes with more have joined")


def _require_rows(training: config.Training, num_examples: int) -> None:
    """Refuse more workers than the smallest step has examples: one without any would leave the others waiting for it."""
    smallest = batching.smallest_step(num_examples, training.batch_examples)
    if smallest < training.workers:
        raise config.ConfigError(
            f"training.workers={training.workers}: every worker needs an example of every step, and with "
            f"training.batch_examples={training.batch_examples} the smallest step of {num_examples} examples has {smallest}; set "
            f"training.workers to {smallest} at most, or make steps larger: raise training.batch_examples, or give more questions"
        )


def _require_strategy(training: config.Training) -> None:
    """Refuse to spread what is not run as one whole: other objectives than `sft` call their encoder by itself too."""
    if training.strategy == "fsdp" and training.objective != "sft":
        raise config.ConfigError(
            f"training.strategy=fsdp with training.objective={training.objective}: only sft can be spread over the workers; set "
            "training.strategy=ddp"
        )


def _mend_snapshot(run: str) -> None:
    """Ray Train refuses to start beside a torn list of its checkpoints: without one it starts, and finds ours by their names."""
    url = filesystem.join(run, SNAPSHOT)
    if not filesystem.exists(url):
        return
    try:
        json.loads(filesystem.read_text(url))
    except ValueError:
        logger.warning("%s is damaged; it is removed, and the newest sound checkpoint beside it is used", url)
        filesystem.remove(url)


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
