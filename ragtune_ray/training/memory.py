"""Plans the memory of training the generator, from the shapes of its model: a step is run on tensors without numbers.

Such a step (`FakeTensorMode`) allocates nothing, but goes through the same operators as a real one, forward, backward and
update. So everything that is kept for the backward pass is counted, in any architecture.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ragtune_ray import config, schema
from ragtune_ray.generation.chat import ChatTokenizer
from ragtune_ray.ingest import queries
from ragtune_ray.models import hardware, loading, weights
from ragtune_ray.training import optimization, trainable

UNKNOWN_ANSWER_TOKENS = 64
"""Length of the longest answer, where there are no questions yet."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that a worker needs: on its device at the peak of a step, and in the memory of its machine."""

    device: str
    precision: str
    """Of matrix products."""
    pass_tokens: int
    """Tokens of a forward pass."""
    answer_tokens: int
    """Of them, tokens of answers, per example."""
    weights: int
    """Of the model, trained or frozen."""
    gradients: int
    optimizer: int
    """Two moments of every trained weight."""
    activations: int
    """Everything else at the peak: what the backward pass needs, logits, temporary values."""
    num_trained: int
    """Number of trained weights."""
    best_weights: int
    """The trained weights of the best validation so far; in the memory of the machine."""
    loading: int
    """While the model is put on the device; with `training.strategy=fsdp`, one layer more than `weights`."""

    @property
    def device_bytes(self) -> int:
        """The peak on the device."""
        return max(self.loading, self.weights + self.gradients + self.optimizer + self.activations)

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {**dataclasses.asdict(self), "device_bytes": self.device_bytes}


def plan_for(settings: config.Config) -> MemoryPlan:
    """Plan the memory of the training that a config describes, on a GPU if `cluster.gpus_per_worker` reserves some.

    Raises:
        ConfigError: it trains no generator.
        InputError: the questions cannot be read.
        ModelError: the model cannot be found, or is no causal language model.
    """
    if settings.training.objective != "sft":
        raise config.ConfigError(
            f"training.objective={settings.training.objective}: memory is planned for sft, the training of the generator"
        )
    directory = weights.described(settings.generator.model)
    longest = UNKNOWN_ANSWER_TOKENS
    if settings.queries.path:
        rows = queries.read_queries(settings.queries.path)
        answers = [answer for row in rows if isinstance(row, schema.Query) for answer in row.answers or ()]
        tokens = ChatTokenizer(loading.load_tokenizer(directory, needs_weights=False)).encode(answers)
        longest = max(map(len, tokens), default=longest) + 1  # and the end token
    return plan(settings, directory, longest, "cuda" if settings.cluster.gpus_per_worker else "cpu")


def plan(settings: config.Config, directory: Path, answer_tokens: int, device: str = "cpu") -> MemoryPlan:
    """Plan the memory of a worker that trains the generator, with as many tokens in a pass as the config allows.

    Args:
        settings: the whole config; the section `training` decides.
        directory: of the model that training starts from.
        answer_tokens: length of the longest answer, which alone has logits.
        device: on which it would be trained, `cpu` or `cuda`; decides what `training.precision=auto` means.

    Raises:
        ModelError: the directory does not contain a causal language model.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    training = settings.training
    dtype = torch.bfloat16 if device != "cpu" and training.precision == "auto" else None
    dtype = dtype or hardware.resolve_precision(training.precision, device)
    peak = _Peak()
    with torch.device("meta"):
        model = trainable.generator_without_weights(training, directory, device)
    with FakeTensorMode(), peak:
        _move(model, "cpu")
        every = list(model.parameters())
        trained = [weight for weight in every if weight.requires_grad]
        optimizer = optimization.make_optimizer(model, training)
        rows, length = max(1, training.micro_batch_tokens // training.max_tokens), training.max_tokens
        kept = min(answer_tokens, length)
        for _ in range(2):  # the second has all moments
            _step(model, optimizer, trained, rows, length, kept, dtype, training.clip_norm)
    held, gradients = _bytes(every), _bytes(trained)
    activations = peak.num_bytes - held - 3 * gradients
    if training.quantization == "nf4":
        quantized = list(_quantized(model))
        held += sum(map(_nf4_bytes, quantized)) - _bytes(quantized)
        activations += max(each.numel() * dtype.itemsize for each in quantized)  # one at a time is computed with
    shards = training.workers if training.strategy == "fsdp" else 1
    return MemoryPlan(
        device=device,
        precision=str(dtype).removeprefix("torch."),
        pass_tokens=rows * length,
        answer_tokens=kept,
        weights=held // shards,
        gradients=gradients // shards,
        optimizer=2 * gradients // shards,
        activations=activations,
        num_trained=sum(weight.numel() for weight in trained),
        best_weights=gradients,
        loading=held if shards == 1 else held // shards + _largest_part(model),
    )


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    rows: int,
    length: int,
    kept: int,
    dtype: torch.dtype,
    clip_norm: float,
) -> None:
    """The operators of `optimization.take_step` with `Sft`."""
    optimizer.zero_grad(set_to_none=True)
    ids = torch.zeros((rows, length), dtype=torch.long)
    positions = torch.arange(length).expand(rows, length)
    with optimization.autocast("cpu", dtype):
        logits = model(input_ids=ids, position_ids=positions, logits_to_keep=kept, use_cache=False).logits[:, -kept:]
        losses = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, -kept:].flatten(), reduction="none")
        torch.autograd.backward(losses.sum())
    del logits, losses
    nn.utils.clip_grad_norm_(trained, clip_norm)
    optimizer.step()


def _move(model: nn.Module, device: str) -> None:
    """Put new tensors of the same shapes on a device in the place of a model's; shared ones stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in moved:
                empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                moved[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
            setattr(module, name, moved[id(weight)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def _largest_part(model: Any) -> int:
    """The bytes of the largest part that is whole on a device before its weights are divided: a layer, or all that is in none."""
    names = getattr(model, "_no_split_modules", None) or ()
    layers = [_bytes(part.parameters()) for part in model.modules() if type(part).__name__ in names]
    return max([*layers, _bytes(model.parameters()) - sum(layers)])


def _quantized(model: Any) -> Iterator[torch.Tensor]:
    """The weights that `loading.load_causal_model` stores in four bits: of linear layers, except the last one."""
    last = model.get_output_embeddings()
    for module in model.modules():
        layer = getattr(module, "base_layer", None)  # of an adapter
        if isinstance(layer, nn.Linear) and layer.weight is not last.weight:
            yield layer.weight


def _nf4_bytes(weight: torch.Tensor) -> int:
    """Half a byte per number, a byte per block of 64 for its scale, and a float32 per 256 of those (double quantization)."""
    blocks = -(-weight.numel() // 64)
    return -(-weight.numel() // 2) + blocks + 4 * -(-blocks // 256)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    """Counts the bytes of all storages that are alive, and keeps the largest count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is untyped here
        self.num_bytes = self._alive = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_leaves

        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._alive += size
        self.num_bytes = max(self.num_bytes, self._alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._alive -= size
