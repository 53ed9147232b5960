"""Loads models from their directories, and refuses those that are damaged or lack tensors.

The libraries fill missing tensors with random numbers and go on; two workers would then compute different vectors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragtune_ray.config.extras import install_command
from ragtune_ray.models import layout
from ragtune_ray.models.late_interaction import MODEL_TYPE
from ragtune_ray.models.layout import ModelError

if TYPE_CHECKING:
    import torch

_SHOWN_TENSORS = 3
_UNUSED = re.compile(r"(^|\.)pooler\.")
"""A head of encoders that this project does not use; many directories do not have it."""
_OLD_BUFFERS = re.compile(r"(position_ids|inv_freq|masked_bias|attn\.bias)$")
"""Computed now, but stored by old versions of transformers."""
_ENCODER_MODULES = {"Pooling", "Dense", "LayerNorm", "Normalize", "Dropout", "MultiVectorMask"}
_recording = threading.Lock()


def load_tokenizer(directory: Path, *, needs_weights: bool = True) -> Any:
    """Load the tokenizer of a model; `needs_weights` as for `layout.check_directory`.

    Raises:
        ModelError: it is missing or damaged.
    """
    from transformers import AutoTokenizer

    layout.check_directory(directory, needs_weights=needs_weights)
    with _explained(directory):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


def load_configs(directory: Path, *, needs_weights: bool = True) -> tuple[Any, Any]:
    """The config and the generation config of a causal language model; `needs_weights` as for `layout.check_directory`.

    Raises:
        ModelError: they are damaged.
    """
    from transformers import AutoConfig, GenerationConfig

    layout.check_directory(directory, needs_weights=needs_weights)
    with _explained(directory):
        model = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        if (directory / "generation_config.json").exists():
            return model, GenerationConfig.from_pretrained(directory, local_files_only=True)
        return model, GenerationConfig.from_model_config(model)


def load_causal_model(
    directory: Path, dtype: torch.dtype | str, attention: str, *, quantized_on: str | None = None
) -> Any:
    """Load a causal language model of transformers.

    Args:
        directory: of the model.
        dtype: of its weights; `auto`: as stored.
        attention: implementation, such as `eager`. `sdpa` is torch's where the model has it, and plain products where not.
        quantized_on: device on which linear layers, except the last one, become four-bit NF4 while they are loaded
            (Dettmers et al. 2023, arXiv:2305.14314). None: they keep `dtype`, on the CPU.

    Raises:
        ModelError: the model is not whole, or bitsandbytes is missing.
    """
    from transformers import AutoModelForCausalLM

    layout.check_directory(directory)
    quantized = _quantized(directory, quantized_on) if quantized_on else {}
    with _explained(directory):
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention_argument(attention),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **quantized,
        )
    check_tensors(directory, model, found)
    return model


def attention_argument(attention: str) -> str | None:
    """What transformers gets for an implementation: its default is `sdpa`, except for models that do not have it (Gemma 2)."""
    return None if attention == "sdpa" else attention


def _quantized(directory: Path, device: str) -> dict[str, Any]:
    """What makes transformers load a model in four bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise layout.ModelError(
            f"model {directory}: training.quantization=nf4 needs bitsandbytes; run: {install_command('quantization')}"
        )
    import torch
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": four_bits, "device_map": {"": device}}


def load_sentence_encoder(directory: Path, device: str, dtype: torch.dtype) -> Any:
    """Load a bi-encoder of sentence-transformers, or of transformers, which is then pooled as sentence-transformers does.

    Raises:
        ModelError: it is not whole, or consists of modules that this project cannot run.
    """
    from sentence_transformers import SentenceTransformer

    layout.check_directory(directory)
    _check_modules(directory)
    encoder = _load_whole(SentenceTransformer, directory, device, dtype, _UNUSED.search)
    _check_encoder(directory, encoder)
    return encoder


def is_late_interaction(directory: Path) -> bool:
    """Whether a directory contains a late-interaction model of sentence-transformers."""
    return layout.read_object(directory, directory / layout.DESCRIPTION).get("model_type") == MODEL_TYPE


def is_cross_encoder(directory: Path) -> bool:
    """Whether a directory contains a model that reads query and passage together, and scores them."""
    kinds = layout.read_object(directory, directory / "config.json").get("architectures") or [""]
    return str(kinds[0]).endswith(("ForSequenceClassification", "ForCausalLM"))


def load_late_interaction(directory: Path, device: str, dtype: torch.dtype) -> Any:
    """Load a late-interaction model of sentence-transformers; raises a ModelError if it is not whole."""
    from sentence_transformers.multi_vector_encoder import MultiVectorEncoder

    layout.check_directory(directory)
    _check_modules(directory)
    return _load_whole(MultiVectorEncoder, directory, device, dtype, _UNUSED.search)


def load_cross_encoder(directory: Path, device: str, dtype: torch.dtype, **options: Any) -> Any:
    """Load a cross-encoder of sentence-transformers.

    Args:
        directory: of the model.
        device: a torch device.
        dtype: of the weights.
        **options: further arguments of `CrossEncoder`.

    Raises:
        ModelError: it is not whole.
    """
    from sentence_transformers import CrossEncoder

    layout.check_directory(directory)
    return _load_whole(CrossEncoder, directory, device, dtype, **options)


def _load_whole(
    kind: Callable[..., Any],
    directory: Path,
    device: str,
    dtype: torch.dtype,
    may_lack: Callable[[str], object] | None = None,
    **options: Any,
) -> Any:
    """Load a model of sentence-transformers and check its tensors; `kind` is its class, for `may_lack` see `check_tensors`."""
    with _explained(directory), _recorded_loading() as loaded:
        model = kind(
            str(directory),
            device=device,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": dtype, "use_safetensors": True},
            **options,
        )
    for part, found in loaded:
        check_tensors(directory, part, found, may_lack)
    return model


def check_tensors(
    directory: Path, model: Any, found: dict[str, Any], may_lack: Callable[[str], object] | None = None
) -> None:
    """Refuse a model for which its directory had missing, unexpected or mismatched tensors.

    Args:
        directory: of the model.
        model: as transformers returned it.
        found: the loading information of transformers, which leaves out tied tensors.
        may_lack: whether a tensor may be missing; without it, none may.

    Raises:
        ModelError: names the directory and the tensors.
    """
    problems = []
    if missing := sorted(name for name in found["missing_keys"] if may_lack is None or not may_lack(name)):
        problems.append(f"missing tensors: {_shown(missing)}")
    mismatched = [
        f"{name} has shape {list(stored)} and not {list(expected)}"
        for name, stored, expected in sorted(found["mismatched_keys"])
    ]
    if mismatched:
        problems.append(f"tensors of other shapes: {_shown(mismatched)}")
    if unexpected := sorted(name for name in found["unexpected_keys"] if _belongs_to(model, name)):
        problems.append(f"tensors that its config.json has no place for: {_shown(unexpected)}")
    if problems:
        raise ModelError(
            f"model {directory}: {'; '.join(problems)}. Its weights are incomplete, or config.json is of another model; copy or "
            "download the model again"
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress progress bars and messages of transformers while a model loads; errors are still raised."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # The GGUF reader writes its own progress bar to stderr; no setting turns it off.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_TENSORS
    return ", ".join(names[:_SHOWN_TENSORS]) + (f" and {more} more" if more > 0 else "")


def _belongs_to(model: Any, name: str) -> bool:
    """Whether a tensor without a place lies inside a part of the model, such as a further layer.

    Heads for other tasks lie beside the model's parts. Their weights are not needed.
    """
    if _OLD_BUFFERS.search(name):
        return False
    parts = name.removeprefix(f"{model.base_model_prefix}.").split(".")
    heads = dict(model.named_children())
    place = model if parts[0] in heads else model.base_model
    for depth, part in enumerate(parts):
        child = dict(place.named_children()).get(part)
        if child is None:
            return depth > 0 or part.isdigit()
        place = child
    return True


@contextlib.contextmanager
def _recorded_loading() -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Collect each model that this thread loads with its loading information, which sentence-transformers does not pass on."""
    from transformers import PreTrainedModel

    plain = vars(PreTrainedModel)["from_pretrained"]
    thread = threading.get_ident()
    loaded: list[tuple[Any, dict[str, Any]]] = []

    def record(cls: type, *arguments: Any, **options: Any) -> Any:
        load = plain.__get__(None, cls)
        if threading.get_ident() != thread:
            return load(*arguments, **options)
        model, found = load(*arguments, **{**options, "output_loading_info": True, "ignore_mismatched_sizes": True})
        loaded.append((model, found))
        return model

    with _recording:
        PreTrainedModel.from_pretrained = classmethod(record)
        try:
            yield loaded
        finally:
            PreTrainedModel.from_pretrained = plain


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Turn what the libraries raise while loading into a ModelError that names the directory and the damaged file."""
    import torch

    try:
        with quiet_transformers():
            yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # tokenizers raises Exception itself
        damaged = _damaged_file(directory)
        if damaged:
            raise ModelError(f"model {directory}: {damaged}; copy or download the model again") from error
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {directory}: cannot be loaded ({type(error).__name__}: {reason}); it needs config.json, a tokenizer and "
            "*.safetensors as save_pretrained writes them"
        ) from error


def _damaged_file(directory: Path) -> str:
    """Which file of a model cannot be read, and why; "" if all can."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(directory.rglob("*.json")):
        try:
            layout.read_object(directory, path)
        except ModelError as error:
            if path.name != "modules.json":  # a list
                return str(error).partition(": ")[2].partition(";")[0]
    for path in sorted(directory.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.relative_to(directory).as_posix()} is damaged ({error})"
    return ""


def _check_modules(directory: Path) -> None:
    """Refuse modules that this project does not run, before they are loaded."""
    first, *rest = layout.modules_of(directory) or ["Transformer"]
    if "Router" in (first, *rest) or "Asym" in (first, *rest):
        raise ModelError(
            f"model {directory}: has one model for queries and another for passages in one directory (a router), which is not "
            "supported; save them apart and name them as encoder.query_model and encoder.model"
        )
    if first != "Transformer":
        raise ModelError(
            f"model {directory}: begins with a module {first}, such as static embeddings, which is not supported; name a "
            "transformer of sentence-transformers"
        )
    if others := sorted(set(rest) - _ENCODER_MODULES):
        raise ModelError(
            f"model {directory}: has the modules {', '.join(others)}, which are not supported; name a model of Transformer and "
            f"{', '.join(sorted(_ENCODER_MODULES))}"
        )


def _check_encoder(directory: Path, encoder: Any) -> None:
    output = encoder[0].module_output_name
    if output != "token_embeddings":
        raise ModelError(
            f"model {directory}: its transformer returns {output} and not a vector per token, which is not supported; name an "
            "encoder of texts"
        )
    described = layout.read_object(directory, directory / layout.DESCRIPTION)
    similarity, last = described.get("similarity_fn_name") or "cosine", (layout.modules_of(directory) or [""])[-1]
    if similarity != "cosine" and (similarity == "manhattan" or last != "Normalize"):
        raise ModelError(
            f"model {directory}: was trained for {similarity} of vectors of any length (similarity_fn_name in "
            f"{layout.DESCRIPTION}), but an index compares vectors of length 1; name a model for cosine, or write cosine there "
            "if that is good enough"
        )
    if described.get("truncate_dim"):
        raise ModelError(
            f"model {directory}: {layout.DESCRIPTION} sets truncate_dim, which is not supported; remove it there to use the "
            "whole vectors"
        )
