"""Speeds up inference on a CPU: packs the weights of linear layers once, and runs layers of known models in fewer operators.

In bfloat16, oneDNN reorders a layer's weights at every call by default, and each activation is a separate pass over memory. In
float32, for processors without bfloat16, torch calls MKL, which on AVX2 is half as fast for the few rows of a decoding step. The
operators used here are those of torch.compile's CPU backend, without the need for a compiler.

What transformers computes between the products are many small operators, each with a pass over memory. The attention and the
norms of Llama and the models that are built like it are replaced by modules with fewer.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

logger = logging.getLogger(__name__)

_ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
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


class PackedNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich 2019, arXiv:1910.07467) of a module `layer`, rounded where it rounds."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = layer.weight, layer.variance_epsilon

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (..., features) to the same shape."""
        exact = inputs.to(torch.float32, copy=True)
        square = torch.linalg.vecdot(exact, exact).div_(exact.shape[-1]).unsqueeze(-1)
        normal: torch.Tensor = exact.mul_(square.add_(self.epsilon).rsqrt_()).to(inputs.dtype) * self.weight
        return normal


class ContinuedCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of a pass without padding on the left, which may continue tokens of an earlier pass.

    `PackedAttention` then needs no mask. `between_layers` is called whenever a layer writes, that is, between two layers.
    """

    def __init__(self, between_layers: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._between_layers = between_layers

    def begin(self, states: Sequence[tuple[torch.Tensor, torch.Tensor]], num_rows: int) -> None:
        """Put the keys and values of an earlier pass of one row, (1, heads, tokens, head size) per layer, before every row."""
        for number, (keys, values) in enumerate(states):
            super().update(keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1), number)

    def update(self, *states: Any, **rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Call `between_layers`, then update as the base class does."""
        if self._between_layers is not None:
            self._between_layers()
        updated: tuple[torch.Tensor, torch.Tensor] = super().update(*states, **rest)
        return updated


class PackedAttention(nn.Module):
    """The attention of Llama-like models, a module `layer`, in fewer operators.

    Queries, keys and values come from one product, and queries and keys are rotated together. In a decoding step, the query heads
    that share keys and values are the rows of one product, so that no keys are read or copied twice (Ainslie et al. 2023,
    arXiv:2305.13245).

    Attributes:
        joined: the product of queries, keys and values, which maps (..., hidden) to (..., features of all three).
        parts: the features of `q_proj`, `k_proj` and `v_proj` among those.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.joined: nn.Module
        self.joined, self.parts = _join(layer, ("q_proj", "k_proj", "v_proj"))
        self.hidden_size = int(layer.q_proj.in_features)
        self.o_proj = PackedLinear(layer.o_proj)
        norms = [layer.q_norm, layer.k_norm] if hasattr(layer, "q_norm") else []  # Qwen3
        self.head_norms = nn.ModuleList(PackedNorm(norm) for norm in norms)
        self.head_size, self.scaling, self.layer_number = layer.head_dim, layer.scaling, layer.layer_idx
        self.is_causal = layer.is_causal
        self.num_key_heads = layer.k_proj.out_features // layer.head_dim
        self.num_query_heads = layer.q_proj.out_features // layer.head_dim

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        is_causal: bool | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Map (rows, tokens, hidden) to the same shape; the arguments are those of transformers' attention layers."""
        states: torch.Tensor = self.joined(hidden_states).unflatten(-1, (-1, self.head_size))
        heads = [self.num_query_heads, self.num_key_heads]
        queries_and_keys, values = torch.split(states, [sum(heads), self.num_key_heads], dim=2)
        if self.head_norms:
            both = torch.split(queries_and_keys, heads, dim=2)
            queries_and_keys = torch.cat([norm(part) for norm, part in zip(self.head_norms, both, strict=True)], dim=2)
        rotated = _rotate(queries_and_keys, *position_embeddings).transpose(1, 2)
        queries, keys = torch.split(rotated, heads, dim=1)
        values = values.transpose(1, 2)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_number)
        num_earlier = keys.shape[2] - queries.shape[2]
        if num_earlier and isinstance(past_key_values, ContinuedCache):
            # Queries of zeros in the place of earlier tokens: the kernel for causal attention skips what a mask would hide.
            queries = nn.functional.pad(queries, (0, 0, num_earlier, 0))
            return self.o_proj(self._attend(queries, keys, values, None, is_causal=True)[:, num_earlier:]), None
        is_causal = attention_mask is None and (self.is_causal if is_causal is None else is_causal)
        return self.o_proj(self._attend(queries, keys, values, attention_mask, is_causal=is_causal)), None

    def _attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        is_causal: bool,
    ) -> torch.Tensor:
        """(rows, heads, tokens, head size) to (rows, tokens, features)."""
        attend = nn.functional.scaled_dot_product_attention
        if queries.shape[2] == 1:
            groups = queries.reshape(len(queries), self.num_key_heads, -1, self.head_size)
            return attend(groups, keys, values, mask, scale=self.scaling).flatten(1).unsqueeze(1)
        attended = attend(queries, keys, values, mask, is_causal=is_causal, scale=self.scaling, enable_gqa=True)
        return attended.transpose(1, 2).flatten(2)


def _join(parent: Any, names: Sequence[str]) -> tuple[PackedLinear, dict[str, slice]]:
    """Linear layers with the same input as one, and the features of each among its outputs."""
    layers = [getattr(parent, name) for name in names]
    joined = nn.Linear(1, 1, bias=layers[0].bias is not None)
    joined.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    if joined.bias is not None:
        joined.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    ends = list(itertools.accumulate(layer.out_features for layer in layers))
    parts = {name: slice(end - layer.out_features, end) for name, layer, end in zip(names, layers, ends, strict=True)}
    return PackedLinear(joined), parts


def _rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate states (rows, tokens, heads, size) by their positions (Su et al. 2021, arXiv:2104.09864), in halves as Llama does.

    Cosines and sines are those of transformers, (rows, tokens, size), in which the second half repeats the first one.
    """
    half = states.shape[-1] // 2
    sines = sines[..., :half].unsqueeze(2)
    rotated = states * cosines.unsqueeze(2)
    rotated[..., :half].addcmul_(states[..., half:], sines, value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sines)
    return rotated


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
        if type(child).__name__ in _ATTENTIONS and _uses_sdpa(child):
            setattr(parent, name, PackedAttention(child))
            replaced += 1
        elif type(child).__name__ in _NORMS:
            setattr(parent, name, PackedNorm(child))
        elif _is_gated(child):
            setattr(parent, name, PackedGatedLayers(child))
            replaced += 1
        elif type(child) is nn.Linear:
            setattr(parent, name, PackedLinear(child, _fused_activation(parent, name)))
            replaced += 1
        else:
            replaced += _pack_children(child)
    return replaced


def _uses_sdpa(attention: Any) -> bool:
    return bool(attention.config._attn_implementation == "sdpa")  # noqa: SLF001  # transformers has no public name for it


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
