"""Serves several LoRA adapters on one model; every row of a batch has its own adapter or none.

A layer computes W x + s B A x with the A and B of the row's adapter (Hu et al. 2021, arXiv:2106.09685). PEFT is not used
here because it wraps `nn.Linear`, which a CPU's packed layers (`packing`) are not, and because rows without an adapter must
get the same bits as without any adapters loaded: their computation is unchanged.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from ragtune_ray.generation.interface import GeneratorError
from ragtune_ray.models.packing import PackedAttention, PackedGatedLayers, PackedLinear

_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_GATED = ("gate_proj", "up_proj", "down_proj")
# Settings of a LoRA config under which the formula above stays correct. All others, also future ones of PEFT, must be unset.
_HARMLESS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "qalora_group_size"),
    *("megatron_core", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "init_lora_weights",
}
# Other initializations also change the base model's weights.
_UNCHANGED_BASE = (True, False, "gaussian", "orthogonal")

_Weights = tuple[torch.Tensor, torch.Tensor]
"""A of shape (rank, in_features) and s B of shape (out_features, rank)."""


class _Selection(threading.local):
    """Which rows of the current batch have which adapter, per thread."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.rows: dict[str, list[int]] = {}


class Adapters:
    """The adapters of one model, from name -> directory as PEFT writes it; replaces the model's layers in place.

    Raises:
        GeneratorError: a directory contains no adapter, one that is not plain LoRA, or one for another model.
    """

    def __init__(self, model: nn.Module, directories: Mapping[str, Path]) -> None:
        self.names = tuple(directories)
        self._selection = _Selection()
        parameter = next(model.parameters())
        deltas: dict[str, dict[str, _Weights]] = {}
        for name, directory in directories.items():
            where = f"adapter {name!r} in {directory}"
            settings, weights = _load(where, directory)
            if missing := sorted(_targets(settings, model) - weights.keys()):
                raise GeneratorError(
                    f"{where} has no weights for {len(missing)} of its layers, such as {missing[0]}; copy or download it again"
                )
            for layer, (down, up) in weights.items():
                _check(name, model, layer, down, up)
                deltas.setdefault(layer, {})[name] = (down.to(parameter), up.to(parameter))
        for layer, by_adapter in deltas.items():
            _attach(model, layer, _Deltas(by_adapter, self._selection), self._selection)

    @contextlib.contextmanager
    def applied(self, names: Sequence[str]) -> Iterator[None]:
        """A context in which this thread's batches use the adapters `names`: one per row, "" for none."""
        selection = self._selection
        before = selection.num_rows, selection.rows
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name:
                rows.setdefault(name, []).append(row)
        selection.num_rows, selection.rows = len(names), rows
        try:
            yield
        finally:
            selection.num_rows, selection.rows = before


class _Deltas:
    """The adapters' additions to one linear layer."""

    def __init__(self, by_adapter: dict[str, _Weights], selection: _Selection) -> None:
        self._by_adapter, self._selection = by_adapter, selection

    def rows(self, inputs: torch.Tensor) -> dict[str, list[int]]:
        """The rows of `inputs` (rows, tokens, features) of each adapter that changes this layer."""
        selection = self._selection
        rows = {name: rows for name, rows in selection.rows.items() if name in self._by_adapter}
        if rows and (inputs.dim() != 3 or len(inputs) != selection.num_rows):
            raise GeneratorError(
                f"a layer with adapters got inputs of shape {tuple(inputs.shape)} for {selection.num_rows} rows; this "
                "engine adapts layers with inputs (rows, tokens, features). Merge the adapter into its model and serve that"
            )
        return rows

    def of(self, name: str, inputs: torch.Tensor) -> torch.Tensor | float:
        """The addition of one adapter, s B A x; 0 if it does not change this layer."""
        if name not in self._by_adapter:
            return 0.0
        down, up = self._by_adapter[name]
        return functional.linear(functional.linear(inputs, down), up)


class _AdaptedLinear(nn.Module):
    """A linear layer, plain or packed, with adapters."""

    def __init__(self, layer: nn.Module, deltas: _Deltas) -> None:
        super().__init__()
        self.layer, self.deltas = layer, deltas

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, in_features) to (rows, tokens, out_features)."""
        outputs: torch.Tensor = self.layer(inputs)
        for name, rows in self.deltas.rows(inputs).items():
            outputs[rows] += self.deltas.of(name, inputs[rows])
        return outputs


class _AdaptedJoined(nn.Module):
    """The product of queries, keys and values of a packed attention, with adapters."""

    def __init__(self, layer: nn.Module, parts: Mapping[str, slice], selection: _Selection) -> None:
        super().__init__()
        self.layer, self.parts = layer, parts
        self.deltas = {part: _Deltas({}, selection) for part in parts}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, hidden) to (rows, tokens, features of all parts)."""
        outputs: torch.Tensor = self.layer(inputs)
        for part, features in self.parts.items():
            for name, rows in self.deltas[part].rows(inputs).items():
                outputs[rows, :, features] += self.deltas[part].of(name, inputs[rows])
        return outputs


class _AdaptedGatedLayers(nn.Module):
    """A packed feed-forward with adapters: fused for rows without adapters, separate operators for the others."""

    def __init__(self, layers: PackedGatedLayers, selection: _Selection) -> None:
        super().__init__()
        self.layers = layers
        self.deltas = {part: _Deltas({}, selection) for part in _GATED}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, hidden) to the same shape."""
        adapted = {name: rows for deltas in self.deltas.values() for name, rows in deltas.rows(inputs).items()}
        if not adapted:
            fused: torch.Tensor = self.layers(inputs)
            return fused
        outputs = torch.empty_like(inputs)
        with_adapter = {row for rows in adapted.values() for row in rows}
        if without := [row for row in range(len(inputs)) if row not in with_adapter]:
            outputs[without] = self.layers(inputs[without])
        for name, rows in adapted.items():
            outputs[rows] = self._with_adapter(name, inputs[rows])
        return outputs

    def _with_adapter(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        layers, deltas = self.layers, self.deltas
        gate = functional.silu(layers.gate.linear(inputs) + deltas["gate_proj"].of(name, inputs))
        product = gate * (layers.up(inputs) + deltas["up_proj"].of(name, inputs))
        outputs: torch.Tensor = layers.down(product) + deltas["down_proj"].of(name, product)
        return outputs


def _attach(model: nn.Module, layer: str, deltas: _Deltas, selection: _Selection) -> None:
    """Replace a layer, named as in PEFT, by one that adds the deltas."""
    parent, _, name = layer.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(module, PackedGatedLayers):
        grandparent, _, own = parent.rpartition(".")
        module = _AdaptedGatedLayers(module, selection)
        setattr(model.get_submodule(grandparent), own, module)
    if isinstance(module, PackedAttention) and name in module.parts:
        joined = module.joined
        if not isinstance(joined, _AdaptedJoined):
            joined = module.joined = _AdaptedJoined(joined, module.parts, selection)
        joined.deltas[name] = deltas
    elif isinstance(module, _AdaptedGatedLayers):
        module.deltas[name] = deltas
    else:
        setattr(module, name, _AdaptedLinear(model.get_submodule(layer), deltas))


def _check(name: str, model: nn.Module, layer: str, down: torch.Tensor, up: torch.Tensor) -> None:
    """Refuse weights that do not fit their layer."""
    shape = _shape(model, layer)
    if shape is None:
        raise GeneratorError(f"adapter {name!r} is for {layer}, which is not a linear layer of this model")
    if shape != (up.shape[0], down.shape[1]):
        raise GeneratorError(
            f"adapter {name!r} has shape {(up.shape[0], down.shape[1])} for {layer}, the model has {shape}; it was "
            "made for another model"
        )


def _shape(model: nn.Module, layer: str) -> tuple[int, int] | None:
    """Outputs and inputs of a linear layer, named as in PEFT; None if there is no such layer."""
    parent, _, name = layer.rpartition(".")
    try:
        module = model.get_submodule(parent)
        if isinstance(module, PackedAttention) and name in module.parts:
            features = module.parts[name]
            return features.stop - features.start, module.hidden_size
        is_packed = isinstance(module, PackedGatedLayers) and name in _GATED
        found = module.get_submodule(name.removesuffix("_proj") if is_packed else name)
    except AttributeError:
        return None
    if isinstance(found, PackedLinear):
        return found.packed.shape[0], found.packed.shape[1]
    return (found.out_features, found.in_features) if type(found) is nn.Linear else None


def _targets(settings: dict[str, Any], model: nn.Module) -> set[str]:
    """The layers that an adapter changes, as its config names them: their last names, and the numbers of the blocks."""
    names, excluded = settings.get("target_modules"), settings.get("exclude_modules") or []
    if not isinstance(names, list) or isinstance(excluded, str):
        return set()  # a regular expression; only its layers of another model are noticed
    layers = {layer for layer in _linear_layers(model) if _is_named(layer, names) and not _is_named(layer, excluded)}
    blocks = settings.get("layers_to_transform")
    if blocks is None:
        return layers
    numbers = {str(block) for block in (blocks if isinstance(blocks, list) else [blocks])}
    return {layer for layer in layers if next(filter(str.isdigit, layer.split(".")), "") in numbers}


def _is_named(layer: str, names: Sequence[str]) -> bool:
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def _linear_layers(model: nn.Module) -> Iterator[str]:
    """The names of a model's linear layers, as in PEFT."""
    for name, module in model.named_modules():
        if isinstance(module, PackedGatedLayers):
            yield from (f"{name}.{part}" for part in _GATED)
        elif isinstance(module, PackedAttention):
            yield from (f"{name}.{part}" for part in module.parts)
        elif isinstance(module, nn.Linear | PackedLinear):
            yield name


def _load(where: str, directory: Path) -> tuple[dict[str, Any], dict[str, _Weights]]:
    """The settings of an adapter, and its weights by layer."""
    try:
        settings = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise GeneratorError(
            f"{where} cannot be loaded ({error}); it needs adapter_config.json and adapter_model.safetensors, as PEFT's "
            "save_pretrained writes them"
        ) from error
    _check_settings(where, settings)
    weights: dict[str, _Weights] = {}
    for key, down in tensors.items():
        layer = key.removeprefix(_PREFIX).removesuffix(_DOWN)
        up = tensors.get(f"{_PREFIX}{layer}{_UP}")
        if key == f"{_PREFIX}{layer}{_DOWN}" and up is not None and up.shape[1] == len(down):
            rank = math.sqrt(len(down)) if settings.get("use_rslora") else len(down)
            weights[layer] = (down, up * (settings["lora_alpha"] / rank))
    if 2 * len(weights) != len(tensors) or not weights:
        raise GeneratorError(
            f"{where} contains other tensors than pairs of *{_DOWN} and *{_UP}, so it is not a plain LoRA adapter"
        )
    if not all(part.isfinite().all() for pair in weights.values() for part in pair):
        raise GeneratorError(f"{where} has weights that are not numbers")
    return settings, weights


def _check_settings(where: str, settings: dict[str, Any]) -> None:
    given = {key: value for key, value in settings.items() if value and value != "none" and key not in _HARMLESS}
    if settings.get("peft_type") != "LORA":
        given["peft_type"] = settings.get("peft_type")
    if settings.get("init_lora_weights", True) not in _UNCHANGED_BASE:
        given["init_lora_weights"] = settings["init_lora_weights"]
    if given or not isinstance(settings.get("lora_alpha"), (int, float)):
        raise GeneratorError(
            f"{where} is not a plain LoRA adapter ({given or 'no lora_alpha'}); merge it into its model and serve that"
        )
