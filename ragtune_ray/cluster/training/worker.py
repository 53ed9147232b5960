"""What a Ray Train worker does: load, resume, step, validate, save, and at the end publish the model.

In: the arguments that `training` gives every worker. Out: checkpoints in the run's directory and, from the first worker, the
finished model. The loop knows nothing of losses: `objectives` has them. It goes on from the newest checkpoint that is sound.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragtune_ray import config
from ragtune_ray.cluster.training import feeding
from ragtune_ray.models import arms
from ragtune_ray.models import weights as weights_module
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.training import batching, model_card
from ragtune_ray.training.examples import example_type

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["EVENTS", "METRICS", "RUN_NAME", "work"]

RUN_NAME = "train"
"""Ray Train's directory within the working directory of a training."""
METRICS, EVENTS = "metrics.jsonl", "tensorboard"
MEMORY_STEPS = 20
"""After so many steps memory that was freed goes back to the system: kept for good, it would grow with every step."""


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


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """What every training worker does; the first one writes."""
    from ragtune_ray.training.optimization import TrainingError

    run = _begin(arguments)
    checkpoints = filesystem.join(arguments["work"], RUN_NAME)
    _resume(run, checkpoints)
    if not run.start:
        run.start = _validate(run)
        run.best = {"step": 0, **run.start}
        run.metrics.append({"step": 0, **run.start})
    try:
        run.clock = time.perf_counter()
        for step, rows in feeding.steps_from(run.step, example_type(run.settings.training)):
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

    from ragtune_ray.models.hardware import avoid_cudnn_attention, keep_freed_memory, resolve_precision
    from ragtune_ray.training import optimization, trainable

    context = ray.train.get_context()
    settings = config.Config.model_validate(arguments["settings"])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    torch.manual_seed(settings.seed)
    keep_freed_memory()
    avoid_cudnn_attention()
    validation = feeding.read_validation(settings, arguments["examples"])
    objective = trainable.load_objective(
        settings,
        weights_module.weights_of(arms.base_model(settings)),
        feeding.read_pool(settings, arguments["examples"]),
    )
    module = _spread(objective, settings.training, validation[:1])
    device = next(module.parameters()).device
    return _Run(
        settings=settings,
        worker=context.get_world_rank(),
        workers=context.get_world_size(),
        objective=objective,
        module=module,
        optimizer=optimization.make_optimizer(module, settings.training),
        num_steps=arguments["num_steps"],
        validation=validation,
        board=arguments["board"],
        dtype=resolve_precision(settings.training.precision, str(device)),
    )


def _spread(objective: Any, training: config.Training, rows: list[Any]) -> nn.Module:
    """The objective as all workers train it together, without the weights that its loss of the rows does not reach."""
    import ray.train.torch

    from ragtune_ray.training import optimization

    if training.strategy == "ddp":
        # First, as losses gather what other workers have: those of GPUs exchange nothing that lies on the CPU.
        objective.to(ray.train.torch.get_device())
        optimization.freeze_unreached(objective, objective, rows)
        # Buffers are constants here, and sending them would come between the exchanges of the objectives themselves.
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        wrapped: nn.Module = ray.train.torch.prepare_model(objective, parallel_strategy_kwargs=options)
        return wrapped
    from torch.distributed.fsdp import fully_shard

    # On the CPU: no such loss gathers anything, and beside the whole model a GPU may have no room for its gradient.
    optimization.freeze_unreached(objective, objective, rows)
    module: nn.Module = objective.to(ray.train.torch.get_device())
    layers = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in list(module.modules()):
        if type(part).__name__ in layers:
            fully_shard(part)
    fully_shard(module)  # in place
    return module


def _resume(run: _Run, checkpoints: str) -> None:
    """Go back to the newest sound checkpoint, if there is one; the first worker chooses for all."""
    from ray.train.collective import broadcast_from_rank_zero

    from ragtune_ray.training import optimization

    chosen = broadcast_from_rank_zero(_newest_sound(run, checkpoints) if run.worker == 0 else "")
    if not chosen:
        return
    path = artifacts.open_artifact(chosen, "checkpoint").path
    facts, run.best_weights = optimization.load_state(path, run.module, run.optimizer)
    for name, value in facts.items():
        setattr(run, name, value)
    if not run.best_weights and run.best["step"] == run.step:
        run.best_weights = optimization.trainable_weights(run.module)
    _tell(run, f"train: going on from the checkpoint of step {run.step:,}")


def _newest_sound(run: _Run, checkpoints: str) -> str:
    """The directory of the newest checkpoint that is whole; "" where there is none."""
    for name in sorted(filesystem.list_names(checkpoints), reverse=True):
        if not name.startswith("step-"):
            continue
        url = filesystem.join(checkpoints, name)
        try:
            artifacts.open_artifact(url, "checkpoint")
        except artifacts.ArtifactError as error:
            _tell(run, f"train: warning: {error}; the checkpoint before it is used")
            continue
        return url
    return ""


def _take(run: _Run, step: int, rows: list[Any]) -> None:
    """One optimiser step of all workers."""
    import numpy as np

    from ragtune_ray.training import optimization

    training = run.settings.training
    lengths = np.array([row.num_tokens for row in rows])
    own = [rows[place] for place in batching.worker_rows(lengths, run.worker, run.workers)]
    factor = optimization.learning_rate_factor(step, run.num_steps, training.warmup_share)
    for group in run.optimizer.param_groups:
        group["lr"] = optimization.peak_learning_rate(training) * factor
    weight = run.objective.weight(rows)
    result = optimization.take_step(
        run.module, run.objective, own, weight, run.optimizer, training.clip_norm, functools.partial(_computing, run)
    )
    if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
        shown = ", ".join(row.query_id for row in rows[:3])
        raise optimization.TrainingError(
            f"step {step + 1}: the loss is {result.loss} and the length of its gradient {result.gradient_norm}; the weights were "
            f"not moved. Lower training.learning_rate, set training.precision=float32, or look at its examples ({shown}, ...)"
        )
    run.step = step + 1
    seconds = time.perf_counter() - run.clock
    run.seconds += seconds
    run.num_tokens += int(lengths.sum())
    run.metrics.append(
        {
            "step": run.step,
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "learning_rate": optimization.peak_learning_rate(training) * factor,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(float(lengths.sum()) / seconds, 1),
        },
    )


def _computing(run: _Run) -> contextlib.AbstractContextManager[Any]:
    from ragtune_ray.training import optimization

    return optimization.autocast(str(next(run.module.parameters()).device), run.dtype)


def _after_step(run: _Run) -> None:
    """Give memory back, evaluate and save where it is due."""
    from ragtune_ray.models import hardware
    from ragtune_ray.training import optimization

    training = run.settings.training
    last = run.step == run.num_steps
    if run.step % MEMORY_STEPS == 0:
        hardware.return_freed_memory()
    if run.step % training.evaluate_steps == 0 or last:
        scores = _validate(run)
        run.metrics.append({"step": run.step, **scores})
        if scores["score"] > run.best["score"]:
            run.best = {"step": run.step, **scores}
            run.best_weights = optimization.trainable_weights(run.module)
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

    from ragtune_ray.training import optimization

    staging = Path(tempfile.mkdtemp(prefix="ragtune-checkpoint-"))
    finished = staging.with_name(f"{staging.name}-finished")
    best = run.best_weights if run.best["step"] not in (0, run.step) else {}
    with filesystem.discarding(staging):
        optimization.save_state(staging, run.module, run.optimizer, best, run.facts())
    checkpoint = None
    if run.worker == 0:
        artifacts.publish(staging, str(finished), "checkpoint", step=run.step)
        checkpoint = ray.train.Checkpoint.from_directory(str(finished))
    else:
        shutil.rmtree(staging)
    ray.train.report(
        {"step": run.step},
        checkpoint=checkpoint,
        checkpoint_dir_name=f"step-{run.step:08d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _tell(run: _Run, line: str) -> None:
    if run.worker == 0:
        run.board.write.remote(run.step, line)


def _finish(run: _Run, arguments: dict[str, Any]) -> None:
    """Write the best weights as a plain model directory and publish it; of `joint` the retriever first, beside it."""
    from ragtune_ray.training import trainable

    if run.worker != 0:
        return
    settings, url, weights = run.settings, arguments["url"], run.best_weights
    if settings.training.objective == "joint":
        query_model = f"{url}-retriever"
        if not artifacts.is_finished(query_model):
            retriever = settings.with_values({"training.objective": "query_side", "training.lora_rank": 0})
            _publish(run, arguments, retriever, trainable.part_weights(weights, "retriever"), query_model, {})
        generator = settings.with_values({"training.objective": "sft", "training.arm": "rag+ft"})
        _publish(
            run, arguments, generator, trainable.part_weights(weights, "generator"), url, {"query_model": query_model}
        )
    else:
        _publish(run, arguments, settings, weights, url, {})
    run.board.write.remote(run.num_steps)


def _publish(
    run: _Run,
    arguments: dict[str, Any],
    settings: config.Config,
    weights: dict[str, Tensor],
    url: str,
    more: dict[str, Any],
) -> None:
    """One model with its card, its metrics and what is known of how it came about; `settings` are as if it had been alone."""
    import torch

    from ragtune_ray.training import trainable

    base = arms.base_model(settings)
    staging = artifacts.stage(url)
    trainable.save_model(settings, weights_module.weights_of(base), weights, staging)
    (staging / METRICS).write_text("".join(json.dumps(row) + "\n" for row in run.metrics), encoding="utf-8")
    _write_events(staging / EVENTS, run.metrics)
    facts = {
        "objective": run.settings.training.objective,
        "arm": settings.training.arm if settings.training.objective == "sft" else None,
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        **more,
        "examples": arguments["examples"],
        "input": {
            name: value
            for name, value in artifacts.read_manifest(arguments["examples"]).items()
            if name in ("num_train", "num_validation", "kinds", "num_rejects", "input", "index_version")
        },
        "num_steps": run.num_steps,
        "num_workers": run.workers,
        "start": run.start,
        "best": run.best,
        "seconds": {"steps": round(run.seconds, 3)},
        "cores_per_worker": torch.get_num_threads(),
        "tokens_per_second": round(run.num_tokens / max(run.seconds, 1e-9), 1),
    }
    if settings.training.objective == "query_side":
        facts["passage_encoder"] = weights_module.encoder_fingerprint(base.fingerprint, settings.encoder)
    (staging / "README.md").write_text(model_card.model_card(facts, settings), encoding="utf-8")
    artifacts.publish(staging, url, "model", config=settings.model_dump(mode="json"), **facts)


def _write_events(directory: Path, metrics: list[dict[str, Any]]) -> None:
    """The metrics as TensorBoard events."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(logdir=str(directory)) as writer:
        for row in metrics:
            kind = "train" if "learning_rate" in row else "validation"
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(f"{kind}/{name}", value, row["step"])
