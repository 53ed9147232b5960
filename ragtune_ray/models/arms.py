"""Chooses the models of an arm.

`ragtune tune` produces a `Pair`: both models, and the workspace whose index the encoder built. They are accepted or
rejected together, so an index is never searched with the encoder of another round.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from ragtune_ray import config
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, filesystem


@dataclass(frozen=True, slots=True)
class Pair:
    """A retriever and a generator that answer together; values as in the config."""

    workspace: str
    """The workspace whose index is searched."""
    encoder_model: str
    """The encoder of passages, which built that index."""
    query_model: str
    """The encoder of queries, if it is another model; else empty."""
    generator_model: str

    @classmethod
    def of(cls, settings: config.Config) -> Pair:
        """The pair that a config names.

        >>> Pair.of(config.Config()).generator_model
        'SmolLM2-135M-Instruct'
        """
        return cls(settings.workspace, settings.encoder.model, settings.encoder.query_model, settings.generator.model)

    def used_in(self, settings: config.Config) -> config.Config:
        """The config with its models and workspace replaced by this pair."""
        values = {
            "workspace": self.workspace,
            "encoder.model": self.encoder_model,
            "encoder.query_model": self.query_model,
            "generator.model": self.generator_model,
        }
        return settings.with_values(values)

    def facts(self) -> dict[str, str]:
        """JSON values for a ledger or a manifest; `Pair(**facts)` restores the pair."""
        return dataclasses.asdict(self)


def with_tuned_models(settings: config.Config) -> config.Config:
    """The config of `answer.arm`; if the arm is tuned or names a model, with its own models.

    `ft` and `rag+ft` use the generator last trained for them, a mode uses the pair of `ragtune tune` with its index, and
    `base@NAME` and `rag@NAME` use the generator of `compare.hosted.NAME` and its prices.

    Raises:
        ModelError: no model was trained for the arm yet.
    """
    arm = settings.answer.arm
    if name := config.hosted_name(arm):
        return settings.with_values(_hosted_values(settings, name))
    if not config.is_tuned(arm):
        return settings
    url = tuned_model(settings.workspace, arm)
    if config.is_mode(arm):
        pair: dict[str, Any] = artifacts.read_manifest(url)["pair"]
        return Pair(**pair).used_in(settings)
    engine = "transformers" if settings.generator.engine == "openai" else settings.generator.engine
    return settings.with_values({"generator.model": url, "generator.engine": engine})


def _hosted_values(settings: config.Config, name: str) -> dict[str, Any]:
    hosted = settings.compare.hosted[name]
    generator = hosted.model_dump(include={"model", "engine", "base_url", "api_key_env"})
    prices = hosted.model_dump(include={"million_prompt_tokens", "million_completion_tokens"})
    if hosted.max_new_tokens:
        generator["max_new_tokens"] = hosted.max_new_tokens
    return {f"generator.{field}": value for field, value in generator.items()} | {
        f"prices.{field}": value for field, value in prices.items()
    }


def base_model(settings: config.Config) -> weights.Model:
    """The model that training starts from; for `training.objective=joint`, the generator.

    A reranker starts from `retrieval.reranker`, or without one from the encoder. If that setting names the very folder that
    the training publishes to, it also starts from the encoder, so that a config may use the reranker that it trains.

    Raises:
        ModelError: the model cannot be found or fetched, or has no weights.
    """
    training = settings.training
    name = settings.generator.model if training.trains_generator else settings.encoder.model
    if training.objective == "reranker":
        own = filesystem.join(settings.workspace, "models", tuned_name(training))
        reranker = settings.retrieval.reranker.rstrip("/")
        name = reranker if reranker and reranker != own and not reranker.startswith(f"{own}/") else name
    model = weights.resolve(name)
    weights.weights_of(model)
    return model


def tuned_name(settings: config.Training) -> str:
    """The name of a training run's model: `training.name`, else its arm, `retriever`, `reranker` or `both`."""
    if settings.name:
        return settings.name
    return {"sft": settings.arm, "joint": "both", "reranker": "reranker"}.get(settings.objective, "retriever")


def tuned_model(workspace: str, name: str) -> str:
    """The directory of the model that training last produced under a name.

    Raises:
        ModelError: there is none.
    """
    folder = filesystem.join(workspace, "models", name)
    url = artifacts.current(folder)
    if url is None:
        arm = f" training.arm={name}" if name in ("ft", "rag+ft") else ""
        verb = f"tune CONFIG tune.mode={name}" if name in get_args(config.Mode) else f"train CONFIG{arm}"
        raise weights.ModelError(f"{folder}: no tuned model there; run: ragtune {verb}")
    return url


def current_generator(settings: config.Config) -> str:
    """The generator that a config names now, as a name or the directory of the newest model; nothing is loaded.

    Raises:
        ModelError: the arm is tuned, and no model was trained for it yet.
    """
    if config.is_tuned(settings.answer.arm):
        return tuned_model(settings.workspace, settings.answer.arm)
    model = settings.generator.model
    return model if settings.generator.engine == "openai" else artifacts.current(model) or model
