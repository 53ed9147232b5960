"""The code of each Ray Train worker: load, resume, step, validate, save, and at the end publish the model."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ragtune_ray import config
from ragtune_ray.cluster import devices, runs
from ragtune_ray.cluster.training import feeding
from ragtune_ray.models import arms, reranker
from ragtune_ray.models import weights as weights_module
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.training import batching, model_card
from ragtune_ray.training.examples import example_type
from ragtune_ray.training.manifest import BestScores, ExamplesSummary, ModelManifest, Scores

if TYPE_CHECKING:
    from torch import Tensor, nn

RUN_NAME = "train"
"""Ray Train's directory in the working directory of a training."""
METRICS, EVENTS = "metrics.jsonl", "tensorboard"
MEMORY_STEPS = 20
"""Interval at which freed memory is returned to the system; otherwise memory use would grow with every step."""


class WorkerArguments(TypedDict):
    """The arguments that `train` passes to every worker."""

    settings: dict[str, Any]
    """The config as JSON values."""
    examples: str
    """Directory of the examples."""
    url: str
    """Where to publish the model."""
    work: str
    """Working directory, with the checkpoints."""
    num_steps: int
    board: Any
    """Actor that collects progress for the driver."""
    models: dict[str, str]
    """Where to find the models, from `session.models`."""


@dataclass
class _TrainingState:
    settings: config.Config
    worker: int
    num_workers: int
    objective: Any
    module: nn.Module
    """The objective, wrapped for several workers."""
    optimizer: Any
    num_steps: int
    validation: list[Any]
    board: Any
    dtype: Any
    step: int = 0
    start: Scores = field(default_factory=lambda: Scores(score=math.nan))
    best: BestScores = field(default_factory=lambda: BestScores(step=0, score=math.nan))
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    """Duration of all steps, including waiting for examples but not validations and checkpoints."""
    num_tokens: int = 0
    step_began: float = 0.0
    """When the current step began to wait for its examples."""

    def facts(self) -> dict[str, Any]:
        """What a checkpoint stores in addition to the tensors."""
        names = ("step", "start", "best", "metrics", "seconds", "num_tokens")
        return {name: getattr(self, name) for name in names}


def run_worker(arguments: WorkerArguments) -> dict[str, str]:
    """Train on one worker; the first worker also publishes the model. Returns `error`: why training stopped, or ""."""
    from ragtune_ray.training.optimization import TrainingError

    devices.use_reserved_devices()
    weights_module.use_staged(arguments["models"])
    state = _load(arguments)
    if not _resume(state, filesystem.join(arguments["work"], RUN_NAME)):
        state.start = _validate(state)
        state.best = BestScores(step=0, **state.start)
        state.metrics.append({"step": 0, **state.start})
    try:
        state.step_began = time.perf_counter()
        for step, rows in feeding.steps_from(state.step, example_type(state.settings.training)):
            _take_step(state, step, rows)
            _after_step(state)
            state.step_began = time.perf_counter()
    except TrainingError as error:
        return {"error": str(error)}
    if state.worker == 0:
        _publish(state, arguments)
        state.board.write.remote(state.num_steps)
    return {"error": ""}


def _load(arguments: WorkerArguments) -> _TrainingState:
    """Load the model and the examples, and join the other workers."""
    import ray.train
    import torch

    from ragtune_ray.models.hardware import avoid_cudnn_attention, keep_freed_memory, resolve_precision
    from ragtune_ray.training import optimization, trainable

    context = ray.train.get_context()
    settings = config.Config.model_validate(arguments["settings"])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    torch.manual_seed(settings.seed)
    keep_freed_memory()
    avoid_cudnn_attention()
    validation = feeding.read_validation(settings, arguments["examples"])
    pool = feeding.read_pool(settings, arguments["examples"])
    objective = trainable.load_objective(settings, weights_module.weights_of(arms.base_model(settings)), pool)
    if settings.training.compile:
        _compile(objective)
    module = _distribute(objective, settings.training, validation[:1])
    device = next(module.parameters()).device
    return _TrainingState(
        settings=settings,
        worker=context.get_world_rank(),
        num_workers=context.get_world_size(),
        objective=objective,
        module=module,
        optimizer=optimization.make_optimizer(module, settings.training),
        num_steps=arguments["num_steps"],
        validation=validation,
        board=arguments["board"],
        dtype=resolve_precision(settings.training.precision, str(device)),
    )


def _compile(objective: Any) -> None:
    """Compile the objective's model in place, so that its weights keep their names."""
    from ragtune_ray.training.optimization import TrainingError

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise TrainingError(
            f"training.compile: this worker has no C++ compiler {compiler}; install one on every machine, or set it to false"
        )
    objective.model.compile(dynamic=True)


def _distribute(objective: Any, training: config.Training, rows: list[Any]) -> nn.Module:
    """Freeze the weights that the loss of `rows` does not reach, and wrap the objective for all workers."""
    import ray.train.torch

    from ragtune_ray.training import optimization

    if training.strategy == "ddp":
        # Move it first: the losses gather tensors from other workers, which GPU workers can do only on the GPU.
        objective.to(ray.train.torch.get_device())
        optimization.freeze_unreached(objective, objective, rows)
        # Buffers are constant, and broadcasting them would interleave with the gathers of the losses.
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        wrapped: nn.Module = ray.train.torch.prepare_model(objective, parallel_strategy_kwargs=options)
        return wrapped
    from torch.distributed.fsdp import fully_shard

    # On the CPU: these losses gather nothing, and the full model and its gradient may not fit on a GPU. `fully_shard` moves the
    # weights that it divides, layer by layer.
    optimization.freeze_unreached(objective, objective, rows)
    module: nn.Module = objective
    layers = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in list(module.modules()):
        if type(part).__name__ in layers:
            fully_shard(part)
    fully_shard(module)  # in place
    return module


def _resume(state: _TrainingState, checkpoints: str) -> bool:
    """Restore the newest sound checkpoint, which the first worker chooses for all; False if there is none."""
    from ray.train.collective import broadcast_from_rank_zero

    from ragtune_ray.training import optimization

    checkpoint = broadcast_from_rank_zero(_newest_sound(state, checkpoints) if state.worker == 0 else "")
    if not checkpoint:
        return False
    path = artifacts.open_artifact(checkpoint, "checkpoint").path
    facts, state.best_weights = optimization.load_state(path, state.module, state.optimizer)
    for name, value in facts.items():
        setattr(state, name, value)
    if not state.best_weights and state.best["step"] == state.step:
        state.best_weights = optimization.trainable_weights(state.module)
    _tell(state, f"train: resuming from the checkpoint of step {state.step:,}")
    return True


def _newest_sound(state: _TrainingState, checkpoints: str) -> str:
    """The directory of the newest undamaged checkpoint; "" if there is none."""
    for name in sorted(filesystem.list_names(checkpoints), reverse=True):
        if not name.startswith("step-"):
            continue
        url = filesystem.join(checkpoints, name)
        try:
            artifacts.open_artifact(url, "checkpoint")
        except artifacts.ArtifactError as error:
            _tell(state, f"train: warning: {error}; the checkpoint before it is used")
            continue
        return url
    return ""


def _take_step(state: _TrainingState, step: int, rows: list[Any]) -> None:
    """Take one optimizer step together with the other workers."""
    import numpy as np

    from ragtune_ray.training import optimization

    training = state.settings.training
    lengths = np.array([row.num_tokens for row in rows])
    own = [rows[place] for place in batching.worker_rows(lengths, state.worker, state.num_workers)]
    factor = optimization.learning_rate_factor(step, state.num_steps, training.warmup_share)
    learning_rate = optimization.peak_learning_rate(training) * factor
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    weight = state.objective.weight(rows)
    autocast = functools.partial(_autocast, state)
    result = optimization.take_step(
        state.module, state.objective, own, weight, state.optimizer, training.clip_norm, autocast
    )
    if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
        shown = ", ".join(row.query_id for row in rows[:3])
        raise optimization.TrainingError(
            f"step {step + 1}: loss {result.loss}, gradient norm {result.gradient_norm}; the weights were not updated. "
            "Lower training.learning_rate, set training.precision=float32, or inspect the step's examples "
            f"({shown}, ...)"
        )
    state.step = step + 1
    seconds = time.perf_counter() - state.step_began
    state.seconds += seconds
    state.num_tokens += int(lengths.sum())
    state.metrics.append(
        {
            "step": state.step,
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "learning_rate": learning_rate,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(float(lengths.sum()) / seconds, 1),
        }
    )


def _autocast(state: _TrainingState) -> contextlib.AbstractContextManager[Any]:
    from ragtune_ray.training import optimization

    # FSDP gathers the weights of one layer at a time; converted copies of all layers would be a whole model.
    keep = not optimization.is_sharded(state.module)
    return optimization.autocast(str(next(state.module.parameters()).device), state.dtype, keep_converted=keep)


def _after_step(state: _TrainingState) -> None:
    from ragtune_ray.models import hardware
    from ragtune_ray.training import optimization

    training = state.settings.training
    is_last = state.step == state.num_steps
    if state.step % MEMORY_STEPS == 0:
        hardware.return_freed_memory()
    if state.step % training.evaluate_steps == 0 or is_last:
        scores = _validate(state)
        state.metrics.append({"step": state.step, **scores})
        if scores["score"] > state.best["score"]:
            state.best = BestScores(step=state.step, **scores)
            state.best_weights = optimization.trainable_weights(state.module)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "score")
        start = abs(state.start["score"])
        _tell(state, f"train: step {state.step:,}: validation {shown} (at the start {start:.4f})")
    elif state.worker == 0:
        state.board.write.remote(state.step)
    if state.step % training.checkpoint_steps == 0 and not is_last:
        _save(state)


def _validate(state: _TrainingState) -> Scores:
    state.module.eval()
    with _autocast(state):
        scores: Scores = state.objective.validate(state.validation)
    state.module.train()
    return scores


def _save(state: _TrainingState) -> None:
    """Pass a checkpoint to Ray Train, which uploads it while training continues."""
    import ray.train
    from ray.train import CheckpointUploadMode

    from ragtune_ray.training import optimization

    staging = Path(tempfile.mkdtemp(prefix="ragtune-checkpoint-"))
    finished = staging.with_name(f"{staging.name}-finished")
    best = state.best_weights if state.best["step"] not in (0, state.step) else {}
    with filesystem.discarding(staging):
        optimization.save_state(staging, state.module, state.optimizer, best, state.facts())
    checkpoint = None
    if state.worker == 0:
        artifacts.publish(staging, str(finished), "checkpoint", step=state.step)
        checkpoint = ray.train.Checkpoint.from_directory(str(finished))
    else:
        shutil.rmtree(staging)
    ray.train.report(
        {"step": state.step},
        checkpoint=checkpoint,
        checkpoint_dir_name=f"step-{state.step:08d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _tell(state: _TrainingState, line: str) -> None:
    if state.worker == 0:
        state.board.write.remote(state.step, line)


def _publish(state: _TrainingState, arguments: WorkerArguments) -> None:
    """Publish the best weights as a model directory; for `joint`, publish the retriever first, at `URL-retriever`."""
    from ragtune_ray.training import trainable

    settings, url, weights = state.settings, arguments["url"], state.best_weights
    if settings.training.objective != "joint":
        _publish_model(state, arguments["examples"], settings, weights, url)
        return
    query_model = f"{url}-retriever"
    if not artifacts.is_finished(query_model):
        retriever = settings.with_values({"training.objective": "query_side", "training.lora_rank": 0})
        retriever_weights = trainable.part_weights(weights, "retriever")
        _publish_model(state, arguments["examples"], retriever, retriever_weights, query_model)
    generator = settings.with_values({"training.objective": "sft", "training.arm": "rag+ft"})
    generator_weights = trainable.part_weights(weights, "generator")
    _publish_model(state, arguments["examples"], generator, generator_weights, url, query_model)


def _publish_model(
    state: _TrainingState,
    examples: str,
    settings: config.Config,
    weights: dict[str, Tensor],
    url: str,
    query_model: str = "",
) -> None:
    """Publish one model with its card, metrics and manifest; `settings` are those that would train it alone."""
    import torch

    from ragtune_ray.training import trainable

    base = arms.base_model(settings)
    staging = artifacts.stage(url)
    trainable.save_model(settings, weights_module.weights_of(base), weights, staging)
    if settings.training.objective == "reranker":
        blend = {"first_stage_weight": cast(Mapping[str, float], state.best)["first_stage_weight"]}
        (staging / reranker.BLEND).write_text(json.dumps(blend) + "\n", encoding="utf-8")
    (staging / METRICS).write_text("".join(json.dumps(row) + "\n" for row in state.metrics), encoding="utf-8")
    _write_events(staging / EVENTS, state.metrics)
    manifest = runs.read_manifest(examples)
    facts: ModelManifest = {
        "config": settings.model_dump(mode="json"),
        "objective": state.settings.training.objective,
        "arm": settings.training.arm if settings.training.objective == "sft" else None,
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "examples": examples,
        "input": ExamplesSummary(
            num_train=manifest["num_train"],
            num_validation=manifest["num_validation"],
            kinds=manifest["kinds"],
            num_rejects=manifest["num_rejects"],
            input=manifest["input"],
            index_version=manifest["index_version"],
        ),
        "num_steps": state.num_steps,
        "num_workers": state.num_workers,
        "start": state.start,
        "best": state.best,
        "seconds": {"steps": round(state.seconds, 3)},
        "cores_per_worker": torch.get_num_threads(),
        "tokens_per_second": round(state.num_tokens / max(state.seconds, 1e-9), 1),
    }
    if drawn := manifest.get("split_record_id"):
        facts["split_record_id"] = drawn
    if query_model:
        facts["query_model"] = query_model
    if settings.training.objective == "query_side":
        facts["passage_encoder"] = weights_module.encoder_fingerprint(base, settings.encoder)
    (staging / "README.md").write_text(model_card.model_card(facts, settings), encoding="utf-8")
    artifacts.publish(staging, url, "model", **facts)


def _write_events(directory: Path, metrics: list[dict[str, Any]]) -> None:
    from tensorboardX import SummaryWriter

    with SummaryWriter(logdir=str(directory)) as writer:
        for row in metrics:
            kind = "train" if "learning_rate" in row else "validation"
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(f"{kind}/{name}", value, row["step"])
