"""Speeds up inference on a CPU: packs the weights of linear layers once and fuses their activations.

In bfloat16, oneDNN reorders a layer's weights at every call by default, and each activation is a separate pass over memory. In
float32, for processors without bfloat16, torch calls MKL, which on AVX2 is half as fast for the few rows of a decoding step. The
operators used here are those of torch.compile's CPU backend, without the need for a compiler.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_SILU = {"SiLU", "SiLUActivation"}
_GELU = {"GELU", "GELUActivation"}
# oneDNN sums in another order for a single row (AVX-512 without AMX) and for more than 32 rows (AMX).
_FEWEST_ROWS, _MOST_ROWS = 2, 32


@functools.cache
def supports_packing(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether packing pays in this number format on this processor, and the operators compute the same as a plain layer.

    It pays in the format that the precision `auto` chooses.
    """
    from ragtune_ray.models.hardware import resolve_precision

    if dtype != resolve_precision("auto", "cpu"):
        return False
    with torch.inference_mode():
        layer = nn.Linear(64, 32).to(dtype)
        probe = torch.linspace(-1, 1, 5 * 64).view(1, 5, 64).to(dtype)
        try:
            packed = PackedLinear(layer)(probe)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            logger.warning("linear layers are not packed, torch lacks the operator: %s", str(error).splitlines()[0])
            return False
        return torch.allclose(packed.float(), layer(probe).float(), atol=0.02)


class PackedLinear(nn.Module):
    """`nn.Linear` and an optional activation as one operator on packed weights.

    Args:
        layer: the layer to replace, on a CPU.
        activation: "none", "gelu" (exact) or "swish" (SiLU).
    """

    def __init__(self, layer: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.bias = layer.bias
        self.activation = activation
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)  # noqa: SLF001  # see above

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (..., in features) to (..., out features)."""
        return self._run(inputs, self.activation)

    def linear(self, inputs: torch.Tensor) -> torch.Tensor:
        """`forward` without the activation."""
        return self._run(inputs, "none")

    def _run(self, inputs: torch.Tensor, activation: str) -> torch.Tensor:
        algorithm = "none" if activation == "gelu" else ""

        def multiply(rows: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001  # see the module's docstring
                rows, self.packed, self.bias, activation, [], algorithm
            )
            return result

        return _multiply_independently(multiply, inputs)


class PackedGatedLayers(nn.Module):
    """down(silu(gate(x)) * up(x)) in three operators: the feed-forward block of Llama-like models, a module `layers`."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.gate = PackedLinear(layers.gate_proj, "swish")
        self.up = PackedLinear(layers.up_proj)
        self.down = PackedLinear(layers.down_proj)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (..., hidden) to (..., hidden)."""
        return _multiply_independently(self._run, inputs)

    def _run(self, inputs: torch.Tensor) -> torch.Tensor:
        product = torch.ops.mkldnn._linear_pointwise.binary(  # noqa: SLF001  # see the module's docstring
            inputs, self.gate(inputs), self.up.packed, self.up.bias, "mul"
        )
        result: torch.Tensor = self.down(product)
        return result


def _multiply_independently(multiply: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """Multiply all rows; those of one token in groups of 2 to 32, so that no result depends on the number of rows."""
    if inputs.shape[-2] != 1 or _FEWEST_ROWS <= len(inputs) <= _MOST_ROWS:
        return multiply(inputs)
    if len(inputs) < _FEWEST_ROWS:
        return multiply(torch.cat([inputs] * _FEWEST_ROWS))[: len(inputs)]
    return torch.cat([_multiply_independently(multiply, rows) for rows in torch.split(inputs, _MOST_ROWS)])


def pack(model: nn.Module) -> int:
    """Replace the plain linear layers of a model on a CPU, if that pays on this machine; return their number.

    The model can no longer be trained or saved.
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or not supports_packing(parameter.dtype):
        return 0
    return _pack_children(model)


def _pack_children(parent: nn.Module) -> int:
    replaced = 0
    for name, child in list(parent.named_children()):
        if _is_gated(child):
            setattr(parent, name, PackedGatedLayers(child))
            replaced += 1
        elif type(child) is nn.Linear:
            setattr(parent, name, PackedLinear(child, _fused_activation(parent, name)))
            replaced += 1
        else:
            replaced += _pack_children(child)
    return replaced


def _is_gated(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    plain = all(type(getattr(module, name, None)) is nn.Linear for name in names)
    return plain and type(getattr(module, "act_fn", None)).__name__ in _SILU and len(list(module.children())) == 4


def _fused_activation(parent: nn.Module, name: str) -> str:
    """The activation to fuse; BERT's intermediate block consists of `dense` and `intermediate_act_fn`."""
    activation = getattr(parent, "intermediate_act_fn", None)
    if name != "dense" or type(activation).__name__ not in _GELU:
        return "none"
    parent.intermediate_act_fn = nn.Identity()
    return "gelu"
