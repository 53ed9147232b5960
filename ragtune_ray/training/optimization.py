"""Takes optimizer steps, on one worker or many, and saves and loads the state between two steps.

The gradient of a step is that of the loss summed over all rows of all workers, divided by their total weight.
DistributedDataParallel averages over workers, so each worker first multiplies its loss by the number of workers.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ragtune_ray import RagtuneError, config
from ragtune_ray.training.objectives.sft import Objective, Piece, most_of_workers, on_device

WEIGHTS, OPTIMIZER, BEST, FACTS = "weights.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"
"""The files of a saved state."""
BETAS = (0.9, 0.999)

Item = TypeVar("Item")


class TrainingError(RagtuneError, RuntimeError):
    """Training cannot continue or yields no usable result; the message says what to change."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Measurements of one step."""

    loss: float
    """Mean over the whole step and all workers, per answer token or per query."""
    gradient_norm: float
    """Before clipping."""


def peak_learning_rate(settings: config.Training) -> float:
    """The configured learning rate, or the default of the objective."""
    if settings.learning_rate:
        return settings.learning_rate
    if settings.objective != "sft":
        return 3e-5
    return 2e-4 if settings.lora_rank else 5e-5


def learning_rate_factor(step: int, num_steps: int, warmup_share: float) -> float:
    """Share of the peak learning rate at a step: linear warmup, then cosine decay to a tenth.

    >>> [round(learning_rate_factor(step, 10, 0.2), 2) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.13]

    """
    warmup = math.ceil(num_steps * warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def make_optimizer(module: nn.Module, settings: config.Training) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), with weight decay on matrices only."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak_learning_rate(settings), betas=BETAS, fused=True)


def autocast(device: str, dtype: torch.dtype, *, keep_converted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """A context that computes matrix products in `dtype` and leaves the weights unchanged; does nothing for float32.

    `keep_converted`: whether weights are converted once and kept until the context ends, instead of in each pass.
    """
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype, cache_enabled=keep_converted)


def take_step(
    module: nn.Module,
    objective: Objective,
    rows: Sequence[Any],
    weight: float,
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    make_context: Callable[[], contextlib.AbstractContextManager[Any]],
) -> StepResult:
    """Accumulate the gradient of this worker's rows, exchange it once, clip it, and update the weights if it is finite.

    `module` is the objective, wrapped if there are several workers; `weight` is the total weight of all workers' rows. Forward
    passes run in a context of `make_context`, such as `autocast`.
    """
    workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=next(module.parameters()).device)
    with make_context():
        for (piece, factor), is_last in _mark_last(_with_factors(module, objective.pieces(rows))):
            with _gradient_sync(module, is_last=is_last):
                loss = module(on_device(module, piece)) * factor
                (loss * (workers / weight)).backward()
            total += loss.detach()
    if workers > 1:
        torch.distributed.all_reduce(total)
    weights = [item for item in module.parameters() if item.requires_grad]
    norm = float(_unsharded(nn.utils.clip_grad_norm_(weights, clip_norm)))
    result = StepResult(float(total) / weight, norm)
    if math.isfinite(result.loss) and math.isfinite(norm):
        optimizer.step()
    return result


def _with_factors(module: nn.Module, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, float]]:
    """Yield each piece with the factor of its loss: 1, or 0 for a repeated piece.

    With FSDP all workers must run the module equally often, so a worker with fewer pieces repeats its last one.
    """
    if not is_sharded(module):
        yield from ((piece, 1.0) for piece in pieces)
        return
    own = list(pieces)  # small: only `sft` can use FSDP, and its pieces contain only tokens
    most = most_of_workers(len(own), next(module.parameters()).device)
    yield from ((piece, 1.0) for piece in own)
    yield from [(own[-1], 0.0)] * (most - len(own))


def _mark_last(items: Iterator[Item]) -> Iterator[tuple[Item, bool]]:
    """Yield each item and whether it is the last."""
    before = next(items)
    for item in items:
        yield before, False
        before = item
    yield before, True


@contextlib.contextmanager
def _gradient_sync(module: nn.Module, *, is_last: bool) -> Iterator[None]:
    """A context in which workers exchange gradients only for the last piece of a step; until then they accumulate locally."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if is_last else module.no_sync():
            yield
        return
    if is_sharded(module):
        cast(Any, module).set_requires_gradient_sync(is_last)
    yield


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP shards the module's weights over the workers."""
    return hasattr(module, "set_requires_gradient_sync")


def freeze_unreached(module: nn.Module, objective: Objective, rows: Sequence[Any]) -> list[str]:
    """Freeze the weights that the loss does not depend on, such as an unused pooler, and return their names.

    DistributedDataParallel waits for the gradient of every trained weight and would wait forever for these.
    """
    module.zero_grad(set_to_none=True)
    for piece in objective.pieces(rows):
        module(on_device(module, piece)).backward()
    unreached = []
    for name, weight in module.named_parameters():
        if weight.requires_grad and weight.grad is None:
            weight.requires_grad_(False)
            unreached.append(name)
    module.zero_grad(set_to_none=True)
    return unreached


def trainable_weights(module: nn.Module) -> dict[str, Tensor]:
    """CPU copies of the trained weights, by name. With FSDP all workers must call this together."""
    return {
        name: _unsharded(weight.detach()).cpu().clone()
        for name, weight in _named_weights(module)
        if weight.requires_grad
    }


@torch.no_grad()
def restore_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set the weights that `trainable_weights` returned; the others stay unchanged.

    Raises:
        TrainingError: the module has no weight of this name and shape.
    """
    own = dict(_named_weights(module))
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise TrainingError(
                f"the saved weights belong to another model: {name} {tuple(value.shape)}; train from the start"
            )
        own[name].copy_(_placed_like(value, own[name]))


def save_state(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    """Write everything that the next step depends on into an empty directory; only the first worker's is kept.

    `best` has the best weights so far; empty: the current or the initial ones. With FSDP all workers must call this together.
    """
    save_file(trainable_weights(module), directory / WEIGHTS)
    moments = {}
    names = {id(weight): name for name, weight in _named_weights(module)}
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            moments[f"{names[id(weight)]}:{key}"] = _unsharded(value.detach()).cpu().clone()
    save_file(moments, directory / OPTIMIZER)
    if best:
        save_file(best, directory / BEST)
    (directory / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def load_state(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore a saved state; return its facts and the best weights, empty if they were not saved separately.

    Raises:
        TrainingError: it belongs to another model.
    """
    restore_weights(module, load_file(directory / WEIGHTS))
    weights = dict(_named_weights(module))
    for name, value in load_file(directory / OPTIMIZER).items():
        weight_name, _, key = name.rpartition(":")
        weight = weights[weight_name]
        # The step count also moves to the weight's device: the fused AdamW of a GPU refuses one on the CPU.
        optimizer.state[weight][key] = value.to(weight.device) if value.ndim == 0 else _placed_like(value, weight)
    best = load_file(directory / BEST) if (directory / BEST).is_file() else {}
    facts: dict[str, Any] = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    return facts, best


def _named_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights that the optimizer knows, with their names without the prefix of a DDP wrapper."""
    if is_sharded(module):
        # After a forward pass without gradients, FSDP's root keeps gathered copies in the place of its own weights.
        cast(Any, module).reshard()
    for name, weight in module.named_parameters():
        yield name.removeprefix("module."), weight


def _unsharded(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all workers if FSDP shards it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _placed_like(value: Tensor, weight: Tensor) -> Tensor:
    """A full tensor on the device of a weight, sharded like it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(weight, DTensor):
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    return value.to(weight.device)
