"""Refuses a model directory whose files could run code, or that would load files from elsewhere; no weights are read.

What is read of a model is JSON, text and safetensors inside its directory, so that `weights.fingerprint` covers all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ragtune_ray import RagtuneError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
DESCRIPTION = "config_sentence_transformers.json"
ADAPTER = "adapter_config.json"
PICKLED_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_WEIGHTED_MODULES = {"Dense", "LayerNorm"}
_TRANSFORMER_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"]
)
"""Where sentence-transformers looks for the settings of its module Transformer; the first file that is not empty counts."""
_SETTINGS = {"config.json", "tokenizer_config.json", *_TRANSFORMER_SETTINGS}
_ELSEWHERE = {"tokenizer_name_or_path", "gguf_file", "adapter_kwargs"}
"""Settings that make sentence-transformers read files that are not the model's own."""


class ModelError(RagtuneError, RuntimeError):
    """A model cannot be found, fetched or used."""


def check_directory(directory: Path, *, needs_weights: bool = True) -> None:
    """Refuse a directory with pickled weights, code, links or files elsewhere that loading the model would use.

    The root is checked even if modules.json names other folders, since transformers loads the root in any case.
    Pickled copies of weights beside safetensors are never read, and so are no reason to refuse. Without `needs_weights`, a
    directory may also lack them.

    Raises:
        ModelError: names the directory, the file and the next step.
    """
    if not directory.is_dir():
        raise ModelError(f"model {directory}: no such directory; name one with config.json and {WEIGHTS}")
    _check_links(directory)
    modules = list(_modules(directory))
    for module, kind in modules:
        if needs_weights and kind in _WEIGHTED_MODULES and not (module / WEIGHTS).is_file():
            raise _no_weights(directory, module)
    for path in sorted(path for path in directory.rglob("*.json") if path.name in _SETTINGS):
        _check_settings(directory, path)
    transformers = {module for module, kind in modules if kind == "Transformer"}
    if not modules or any((directory / name).is_file() for name in ("config.json", ADAPTER)):
        transformers.add(directory)
    for folder in sorted(transformers) if needs_weights else ():
        _check_transformer(directory, folder)


def read_object(directory: Path, path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory; {} if there is no such file.

    Raises:
        ModelError: the file is damaged.
    """
    found = _read(directory, path)
    if not isinstance(found, dict):
        raise ModelError(f"model {directory}: {_name(directory, path)} is not a JSON object; copy or download it again")
    return found


def transformer_settings(directory: Path) -> dict[str, Any]:
    """The settings of the module Transformer of sentence-transformers in the root of a directory; {} if it has none."""
    found = (read_object(directory, directory / name) for name in _TRANSFORMER_SETTINGS)
    return next(filter(None, found), {})


def modules_of(directory: Path) -> list[str]:
    """The kinds of the modules of a sentence-transformers directory, in order; [] if it is none.

    Raises:
        ModelError: a module is not one of sentence-transformers, or is outside the directory.
    """
    return [kind for _, kind in _modules(directory)]


def prompts_of(directory: Path) -> tuple[str, str]:
    """The prompts for queries and for passages that a sentence-transformers model brings; "" where it has none.

    Its default prompt is used for a prompt that it does not name.
    """
    described = read_object(directory, directory / DESCRIPTION)
    prompts = described.get("prompts") or {}
    default = prompts.get(described.get("default_prompt_name")) or ""

    def prompt(*names: str) -> str:
        named = [prompts[name] for name in names if prompts.get(name) is not None]
        return str(next(filter(None, named), "") if named else default)

    return prompt("query"), prompt("document", "passage", "corpus")


def excludes_prompt(directory: Path) -> bool:
    """Whether a model of sentence-transformers leaves its prompt out of the pooling."""
    pooling = [folder / "config.json" for folder, kind in _modules(directory) if kind == "Pooling"]
    return any(read_object(directory, path).get("include_prompt") is False for path in pooling)


def _read(directory: Path, path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"model {directory}: {_name(directory, path)} is damaged ({error}); copy or download the model again"
        ) from error


def _name(directory: Path, path: Path) -> str:
    return path.relative_to(directory).as_posix()


def _check_links(directory: Path) -> None:
    root = directory.resolve()
    # The hub's cache has the files of a snapshot in a folder `blobs` beside the snapshots.
    inside = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in directory.rglob("*"):
        if path.is_symlink():
            target = path.resolve()
            if target.is_dir() or not any(target.is_relative_to(folder) for folder in inside):
                raise ModelError(
                    f"model {directory}: {_name(directory, path)} is a link to {target}; replace it by a copy, since a model is "
                    "loaded from its own directory alone"
                )


def _modules(directory: Path) -> Iterator[tuple[Path, str]]:
    """Folder and kind of each module that modules.json names."""
    path = directory / "modules.json"
    found = _read(directory, path) or []
    if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
        raise ModelError(f"model {directory}: modules.json is not a list of modules; copy or download the model again")
    for module in found:
        kind, folder = str(module.get("type", "")), str(module.get("path", ""))
        if not kind.startswith("sentence_transformers."):
            raise ModelError(
                f"model {directory}: modules.json names {kind!r}, which is code of the model's own and is not run; choose a "
                "model that sentence-transformers loads by itself"
            )
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ModelError(f"model {directory}: modules.json names {folder!r}, which is outside of the directory")
        yield directory / folder, kind.rpartition(".")[2]


def _check_transformer(directory: Path, folder: Path) -> None:
    if (folder / ADAPTER).is_file():
        base = read_object(directory, folder / ADAPTER).get("base_model_name_or_path")
        raise ModelError(
            f"model {directory}: is an adapter of {base!r} and not a whole model; merge it (merge_and_unload of PEFT), save that "
            "and name its directory"
        )
    explicit = read_object(directory, folder / "config.json").get("transformers_weights")
    names = [str(explicit)] if explicit else [WEIGHTS, INDEX]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if explicit and (not _is_plain(names[0]) or not names[0].endswith((".safetensors", ".safetensors.index.json"))):
        raise ModelError(
            f"model {directory}: config.json names the weights {explicit!r}; name a file in *.safetensors beside it"
        )
    if found is None:
        if not any(_DISTRIBUTED.fullmatch(path.name) for path in folder.glob("*.safetensors")):
            raise _no_weights(directory, folder)
    elif found.name.endswith(".json"):
        _check_shards(directory, found)


def _no_weights(directory: Path, folder: Path) -> ModelError:
    where = "" if folder == directory else f"{_name(directory, folder)}/"
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED_SUFFIXES)
    if pickled:
        return ModelError(
            f"model {directory}: its weights are pickled ({', '.join(where + name for name in pickled[:3])}), which can run code "
            "when loaded; convert them to safetensors"
        )
    return ModelError(
        f"model {directory}: contains no .safetensors weights ({where}{WEIGHTS}); copy it again, or name another model"
    )


def _check_shards(directory: Path, index: Path) -> None:
    shards = read_object(directory, index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(
            f"model {directory}: {_name(directory, index)} has no weight_map; copy or download the model again"
        )
    for shard in sorted({str(name) for name in shards.values()}):
        if Path(shard).suffix in PICKLED_SUFFIXES:
            raise ModelError(
                f"model {directory}: its weights are pickled ({shard}, named by {index.name}), which can run code when loaded; "
                "convert them to safetensors"
            )
        if not _is_plain(shard) or not shard.endswith(".safetensors"):
            raise ModelError(
                f"model {directory}: {index.name} names the shard {shard!r}; a shard is a *.safetensors file beside its index"
            )
        if not (index.parent / shard).is_file():
            raise ModelError(
                f"model {directory}: {shard}, named by {index.name}, is missing; copy or download the model again"
            )


def _is_plain(name: str) -> bool:
    return name == Path(name).name and "\\" not in name


def _check_settings(directory: Path, path: Path) -> None:
    """Refuse settings that ask for code, or for files elsewhere."""
    for key, value in _all_settings(read_object(directory, path)):
        setting = f"model {directory}: {_name(directory, path)} sets {key} to {value!r}"
        runs_code = key == "trust_remote_code" and value is True
        # "organisation/kernel" names compiled code on the hub.
        runs_code |= key.endswith(("attn_implementation", "implementation_internal")) and "/" in str(value)
        if runs_code:
            raise ModelError(
                f"{setting}, which asks for code that is not run; remove the setting if the model works without it, or choose "
                "another model"
            )
        if path.name in _TRANSFORMER_SETTINGS and key in _ELSEWHERE and value:
            raise ModelError(
                f"{setting}, which names other files than its own; copy them into the directory and remove the setting"
            )


def _all_settings(settings: Any) -> Iterator[tuple[str, Any]]:
    """Each key and value of nested objects and lists."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield str(key), value
            yield from _all_settings(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _all_settings(value)
