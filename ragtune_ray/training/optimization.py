"""One optimiser step, wherever it runs; and the state between two steps as files.

In: an objective, the rows of a step, an optimiser. Out: moved weights and what the step measured. The bare loop, the workers of a
cluster and the tests all take their steps here. This module knows nothing of where examples come from or of Ray.

A step's gradient is that of the loss summed over all rows of all workers, divided by the weight of all of them:
DistributedDataParallel averages over workers, so each worker's part is multiplied by their number first.
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
from ragtune_ray.training.objectives.sft import Objective, Piece, on_device

__all__ = [
    "StepResult",
    "TrainingError",
    "autocast",
    "freeze_unreached",
    "learning_rate_factor",
    "load_state",
    "make_optimizer",
    "peak_learning_rate",
    "restore_weights",
    "save_state",
    "take_step",
    "trainable_weights",
]

WEIGHTS, OPTIMIZER, BEST, FACTS = "weights.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"
"""The files of a state."""
BETAS = (0.9, 0.999)

Item = TypeVar("Item")


class TrainingError(RagtuneError, RuntimeError):
    """Training cannot go on or give a usable result; the message says what to change."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step measured."""

    loss: float
    """Of the whole step, over all workers: a mean per answer token or per query."""
    gradient_norm: float
    """Before clipping."""


def peak_learning_rate(settings: config.Training) -> float:
    """The learning rate that the config gives, or the objective's own."""
    if settings.learning_rate:
        return settings.learning_rate
    if settings.objective != "sft":
        return 3e-5
    return 2e-4 if settings.lora_rank else 5e-5


def learning_rate_factor(step: int, num_steps: int, warmup_share: float) -> float:
    """The share of the peak learning rate at a step: a linear rise, then half a cosine down to a tenth.

    >>> [round(learning_rate_factor(step, 10, 0.2), 2) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.13]

    Args:
        step: from 0.
        num_steps: of the run.
        warmup_share: share of the steps in which it rises.
    """
    warmup = math.ceil(num_steps * warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def make_optimizer(module: nn.Module, settings: config.Training) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); weight decay is for matrices alone."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak_learning_rate(settings), betas=BETAS, fused=True)


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in `dtype`, weights as they are; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


def take_step(
    module: nn.Module,
    objective: Objective,
    rows: Sequence[Any],
    weight: float,
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    computing: Callable[[], contextlib.AbstractContextManager[Any]],
) -> StepResult:
    """Accumulate the gradient of this worker's rows, share it once, and move the weights.

    Args:
        module: the objective, as it was wrapped for several workers.
        objective: the same, bare.
        rows: this worker's.
        weight: of the rows of all workers together.
        optimizer: over the module's weights.
        clip_norm: longest gradient.
        computing: makes the context of the forward passes, `autocast`.

    Returns:
        Loss and gradient norm; where either is not finite the weights have not been moved.
    """
    workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=next(module.parameters()).device)
    with computing():
        for (piece, share), is_last in _marked_last(_shares(module, objective.pieces(rows))):
            with _sharing(module, is_last=is_last):
                loss = module(on_device(module, piece)) * share
                (loss * (workers / weight)).backward()
            total += loss.detach()
    if workers > 1:
        torch.distributed.all_reduce(total)
    weights = [item for item in module.parameters() if item.requires_grad]
    norm = float(_whole(nn.utils.clip_grad_norm_(weights, clip_norm)))
    result = StepResult(float(total) / weight, norm)
    if math.isfinite(result.loss) and math.isfinite(norm):
        optimizer.step()
    return result


def _shares(module: nn.Module, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, float]]:
    """Each piece and how much of its loss counts: all of it.

    With FSDP every pass through the module is one of all workers together. So a worker with fewer pieces than another goes on
    with its last one, of which nothing counts any more.
    """
    if not _is_spread(module) or not torch.distributed.is_initialized():
        yield from ((piece, 1.0) for piece in pieces)
        return
    own = list(pieces)  # tokens alone: `sft`, which is what can be spread, keeps nothing else for its pieces
    most = torch.tensor(len(own), device=next(module.parameters()).device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    yield from ((piece, 1.0) for piece in own)
    yield from [(own[-1], 0.0)] * (int(most) - len(own))


def _marked_last(items: Iterator[Item]) -> Iterator[tuple[Item, bool]]:
    before = next(items)
    for item in items:
        yield before, False
        before = item
    yield before, True


@contextlib.contextmanager
def _sharing(module: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Let workers exchange gradients only with a step's last piece: until then they add up where they are."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if is_last else module.no_sync():
            yield
        return
    if _is_spread(module):
        cast(Any, module).set_requires_gradient_sync(is_last)
    yield


def _is_spread(module: nn.Module) -> bool:
    """Whether FSDP has spread its weights over the workers."""
    return hasattr(module, "set_requires_gradient_sync")


def freeze_unreached(module: nn.Module, objective: Objective, rows: Sequence[Any]) -> list[str]:
    """Take the weights that the loss does not depend on (a pooler that nothing reads, say) out of training.

    DistributedDataParallel waits for the gradient of every weight, so one that never comes would stop it.

    Returns:
        The names of what was frozen.
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
    """Copies of what is trained, by name, on the CPU. With FSDP all workers must ask together."""
    return {
        _plain_name(name): _whole(weight.detach()).cpu().clone()
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }


@torch.no_grad()
def restore_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set weights by name to the values of `trainable_weights`; the others stay.

    Raises:
        TrainingError: the module has no weight of such a name or shape.
    """
    own = {_plain_name(name): weight for name, weight in module.named_parameters()}
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise TrainingError(
                f"the saved weights are of another model: {name} {tuple(value.shape)}; train from the start"
            )
        own[name].copy_(_like(value, own[name]))


def save_state(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    """Write everything that the next step depends on. With FSDP all workers must call it together.

    Args:
        directory: an empty one; only the first worker's is kept.
        module: its trained weights are written.
        optimizer: its moments and step counts are written.
        best: the best weights so far; empty: the present ones, or those of the start.
        facts: JSON values: the step, scores, metrics.
    """
    save_file(trainable_weights(module), directory / WEIGHTS)
    moments = {}
    names = {id(weight): _plain_name(name) for name, weight in module.named_parameters()}
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            moments[f"{names[id(weight)]}:{key}"] = _whole(value.detach()).cpu().clone()
    save_file(moments, directory / OPTIMIZER)
    if best:
        save_file(best, directory / BEST)
    (directory / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def load_state(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Go back to a saved state.

    Returns:
        Its facts, and the best weights if it holds other ones than the present.

    Raises:
        TrainingError: it is of another model.
    """
    restore_weights(module, load_file(directory / WEIGHTS))
    weights = {_plain_name(name): weight for name, weight in module.named_parameters()}
    for name, value in load_file(directory / OPTIMIZER).items():
        of, _, key = name.rpartition(":")
        # The count of steps too stands where its weight does: the fused AdamW of a GPU refuses one on the CPU.
        optimizer.state[weights[of]][key] = (
            value.to(weights[of].device) if value.ndim == 0 else _like(value, weights[of])
        )
    best = load_file(directory / BEST) if (directory / BEST).is_file() else {}
    facts: dict[str, Any] = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    return facts, best


def _plain_name(name: str) -> str:
    """The name of a weight without what a wrapper puts before it."""
    return name.removeprefix("module.")


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP may have spread over the workers."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor, spread as a weight is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(weight, DTensor):
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    return value.to(weight.device)
