"""Loads a model for training and writes the trained model as plain files.

In: a model directory. Out: an `Objective` around the model; after training, a directory in safetensors that
transformers, sentence-transformers and PEFT load without this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ragtune_ray import config
from ragtune_ray.generation.chat import answer_end, end_tokens
from ragtune_ray.models import hardware, loading
from ragtune_ray.models import weights as weights_module
from ragtune_ray.models.reranker import load_reranker
from ragtune_ray.models.token_batches import max_tokens_of
from ragtune_ray.training import optimization
from ragtune_ray.training.objectives.contrastive import Contrastive, Distillation
from ragtune_ray.training.objectives.joint import Joint
from ragtune_ray.training.objectives.query_side import QuerySide
from ragtune_ray.training.objectives.reranking import Reranking
from ragtune_ray.training.objectives.sft import Sft

ADAPTER = "adapter"
"""Folder of a LoRA model that contains only the adapter, in PEFT's format; the rest is the merged model."""


def load_objective(
    settings: config.Config, directory: Path, pool: dict[str, np.ndarray]
) -> Sft | Contrastive | Distillation | QuerySide | Joint | Reranking:
    """Load a model into the objective that `training.objective` names, ready for training.

    The model is a causal language model for `sft` and `joint`, a cross-encoder, a late-interaction model or an encoder (whose
    token vectors then score by late interaction) for `reranker`, otherwise a model of sentence-transformers. `pool` has the
    stored vectors by passage id, for `query_side` and `joint`; otherwise it is empty.

    Raises:
        ModelError: the directory does not contain such a model.
    """
    training = settings.training
    retriever = directory
    if training.objective == "joint":
        retriever = weights_module.weights_of(weights_module.resolve(settings.encoder.model))
    encoder = weights_module.with_prompts(settings.encoder, retriever)
    shared: dict[str, Any] = {
        "temperature": training.temperature,
        "query_prefix": encoder.query_prefix,
        "passage_prefix": encoder.passage_prefix,
        "chunk_tokens": training.micro_batch_tokens,
    }
    teacher = {"teacher_temperature": training.teacher_temperature, "contrastive_weight": training.contrastive_weight}
    match training.objective:
        case "sft":
            return _sft(training, directory)
        case "contrastive":
            return Contrastive(_encoder(directory), **shared)
        case "distillation":
            return Distillation(_encoder(directory), **teacher, **shared)
        case "query_side":
            return QuerySide(_encoder(directory), pool=pool, **teacher, **shared)
        case "reranker":
            return Reranking(_reranker(settings, directory), training.micro_batch_tokens)
        case "joint":
            return Joint(_sft(training, directory), QuerySide(_encoder(retriever), pool=pool, **shared))


def _sft(settings: config.Training, directory: Path) -> Sft:
    attention = hardware.attention_for_training(hardware.choose_device(), settings.max_tokens)
    tokenizer = loading.load_tokenizer(directory)
    # bfloat16 weights would lose small updates; the frozen weights under adapters keep their type.
    model = loading.load_causal_model(
        directory,
        "auto" if settings.lora_rank else torch.float32,
        attention,
        quantized_on=hardware.choose_device() if settings.quantization == "nf4" else None,
    )
    ends = end_tokens(model.generation_config, tokenizer) if model.generation_config else frozenset[int]()
    end_token = answer_end(tokenizer, ends)
    end_token = next(iter(sorted(ends)), None) if end_token is None else end_token
    if end_token is None:
        raise weights_module.ModelError(f"model {directory}: has no eos_token; set one in its generation_config.json")
    return Sft(_prepared(settings, model), tokenizer, end_token, settings.micro_batch_tokens)


def generator_without_weights(settings: config.Training, directory: Path, device: str) -> Any:
    """The model that `sft` trains, as on this kind of device, with weights that torch's default device makes.

    Of the directory, only the config is needed; quantization is left out.

    Raises:
        ModelError: the directory does not contain a causal language model.
    """
    from transformers import AutoModelForCausalLM

    described, _ = loading.load_configs(directory, needs_weights=False)
    dtype = _stored_dtype(directory, described.dtype or torch.float32) if settings.lora_rank else torch.float32
    attention = hardware.attention_for_training(device, settings.max_tokens)
    model = AutoModelForCausalLM.from_config(
        described, dtype=dtype, attn_implementation=loading.attention_argument(attention)
    )
    return _prepared(settings, model)


def _prepared(settings: config.Training, model: Any) -> Any:
    """The model with what the section `training` adds to it, in training mode."""
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if settings.lora_rank:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=int(settings.lora_alpha),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            lora_dropout=0.0,
        )
        model = get_peft_model(model, adapter, autocast_adapter_dtype=True)
    model.train()
    _without_dropout(model)
    return model


def _encoder(directory: Path) -> Any:
    encoder = loading.load_sentence_encoder(directory, "cpu", torch.float32)
    # transformers chooses the other implementation by itself if the model has it.
    if hardware.attention_for_training(hardware.choose_device(), max_tokens_of(encoder)) == "eager":
        cast(Any, encoder[0]).auto_model.set_attn_implementation("eager")
    encoder.train()
    _without_dropout(encoder)
    return encoder


def _reranker(settings: config.Config, directory: Path) -> Any:
    """A cross-encoder with one score, or a late-interaction model, which an encoder becomes."""
    try:
        prefixed = weights_module.with_prompts(settings.encoder, directory)
        prefixes = prefixed.query_prefix or "", prefixed.passage_prefix or ""
        # A sigmoid would round high scores to equal ones.
        of_cross_encoder: dict[str, Any] = {"num_labels": 1, "activation_fn": nn.Identity()}
        model = load_reranker(directory, "cpu", torch.float32, prefixes, **of_cross_encoder)
    except weights_module.ModelError as error:
        raise weights_module.ModelError(
            f"{error}. A reranker is trained from an encoder, a late-interaction model, or a cross-encoder with one label"
        ) from error
    if hardware.attention_for_training(hardware.choose_device(), max_tokens_of(model)) == "eager":
        cast(Any, model[0]).auto_model.set_attn_implementation("eager")
    model.train()
    _without_dropout(model)
    return model


def _without_dropout(module: nn.Module) -> None:
    """Disable dropout: few epochs overfit little, and a text that is encoded twice must have one vector."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if hasattr(part, "attention_dropout"):
            vars(part)["attention_dropout"] = 0.0


def save_model(settings: config.Config, source: Path, weights: dict[str, Tensor], directory: Path) -> None:
    """Write a model with trained weights, in the number format and layout of `source`, the directory that training started from.

    If `weights` is empty, the weights stay those of the source. With LoRA, `directory` receives the merged model, and the adapter
    in `ADAPTER`. An encoder brings the prefixes of its training as prompts. Write the two models of `joint` separately, with the
    objective `sft` or `query_side` and `part_weights`.
    """
    dtype = _stored_dtype(source)
    if settings.training.objective == "reranker":
        reranking = Reranking(_reranker(settings, source))
        optimization.restore_weights(reranking, weights)
        model: Any = reranking.model
        model.to(dtype).save_pretrained(str(directory), create_model_card=False)
        return
    if settings.training.objective != "sft":
        encoder = _encoder(source)
        optimization.restore_weights(
            encoder, {name.removeprefix("encoder."): weight for name, weight in weights.items()}
        )
        prefixed = weights_module.with_prompts(settings.encoder, source)
        others = {name: text for name, text in encoder.prompts.items() if name not in ("passage", "corpus")}
        encoder.prompts = {**others, "query": prefixed.query_prefix, "document": prefixed.passage_prefix}
        encoder.to(dtype).save_pretrained(str(directory), create_model_card=False)
        return
    # Adapters are merged into the weights as they are stored, to which the adapter is added when it is served by itself, too.
    objective = _sft(settings.training.model_copy(update={"quantization": "none"}), source)
    optimization.restore_weights(objective, weights)
    model = objective.model
    if settings.training.lora_rank:
        model.save_pretrained(directory / ADAPTER)
        (directory / ADAPTER / "README.md").unlink(missing_ok=True)  # an empty template
        model = model.merge_and_unload()
    with loading.quiet_transformers():
        model.to(dtype).save_pretrained(directory)
        loading.load_tokenizer(source).save_pretrained(directory)


def part_weights(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The weights of one part of `Joint` (`generator` or `retriever`), named as in the separate model."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _stored_dtype(directory: Path, otherwise: torch.dtype = torch.float32) -> torch.dtype:
    """The number format of most weights in a model directory, or `otherwise` if there are none."""
    from safetensors import safe_open

    counts: dict[torch.dtype, int] = {}
    for path in directory.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not iterable
                part = file.get_slice(name)
                if part.get_dtype() in _DTYPES:  # positions, for example, are integers
                    dtype = _DTYPES[part.get_dtype()]
                    counts[dtype] = counts.get(dtype, 0) + int(np.prod(part.get_shape()))
    return max(counts, key=lambda dtype: counts[dtype], default=otherwise)


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
