"""A retriever and a generator that answer together, and which of them an arm answers with.

In: a config. Out: the same config with the models of an arm in it. What `ragtune tune` makes is one `Pair`: it names both models
and the workspace whose index the retriever's encoder built, so that all of them are taken over, or given back, in one step, and
no index is ever searched with another round's encoder. This module knows nothing of how either was trained.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from ragtune_ray import config
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, filesystem

__all__ = ["Pair", "base_model", "current_generator", "tuned_model", "tuned_name", "with_tuned_models"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Who retrieves and who answers; each field as the config's field of that meaning."""

    workspace: str
    """Whose index is searched."""
    encoder_model: str
    """Of passages: what built that index."""
    query_model: str
    """Of queries, where it is another than that of passages; else empty."""
    generator_model: str

    @classmethod
    def of(cls, settings: config.Config) -> Pair:
        """The pair that a config names.

        >>> Pair.of(config.Config()).generator_model
        'SmolLM2-135M-Instruct'
        """
        return cls(settings.workspace, settings.encoder.model, settings.encoder.query_model, settings.generator.model)

    def used_in(self, settings: config.Config) -> config.Config:
        """The config with this pair in place of its own."""
        values = {
            "workspace": self.workspace,
            "encoder.model": self.encoder_model,
            "encoder.query_model": self.query_model,
            "generator.model": self.generator_model,
        }
        return settings.with_values(values)

    def facts(self) -> dict[str, str]:
        """As JSON values, for a ledger or a manifest; `Pair(**facts)` is the way back."""
        return dataclasses.asdict(self)


def with_tuned_models(settings: config.Config) -> config.Config:
    """The config of an arm: in a tuned one with the models that were last made for it.

    In `ft` and `rag+ft` that is the generator of `ragtune train`, in a mode the pair of `ragtune tune`, its index included.

    Raises:
        models.ModelError: nothing was trained for it yet.
    """
    arm = settings.answer.arm
    if not config.is_tuned(arm):
        return settings
    url = tuned_model(settings.workspace, arm)
    if config.is_mode(arm):
        pair: dict[str, Any] = artifacts.read_manifest(url)["pair"]
        return Pair(**pair).used_in(settings)
    return settings.with_values({"generator.model": url, "generator.engine": "transformers"})


def base_model(settings: config.Config) -> weights.Model:
    """The model that `training.objective` is about: what its training starts from; of `joint` the generator.

    Raises:
        weights.ModelError: it cannot be had, or has no weights.
    """
    model = weights.resolve(settings.generator.model if settings.training.trains_generator else settings.encoder.model)
    weights.weights_of(model)
    return model


def tuned_name(settings: config.Training) -> str:
    """The name of what a training run makes: the config's, or its arm, or `retriever`, or `both`.

    >>> tuned_name(config.Training(arm="ft"))
    'ft'
    """
    if settings.name:
        return settings.name
    match settings.objective:
        case "sft":
            return settings.arm
        case "joint":
            return "both"
    return "retriever"


def tuned_model(workspace: str, name: str) -> str:
    """The directory of the model that training last made under a name.

    Raises:
        weights.ModelError: there is none.
    """
    folder = filesystem.join(workspace, "models", name)
    url = artifacts.current(folder)
    if url is None:
        arm = f" training.arm={name}" if name in ("ft", "rag+ft") else ""
        verb = f"tune CONFIG tune.mode={name}" if name in get_args(config.Mode) else f"train CONFIG{arm}"
        raise weights.ModelError(f"{folder}: no tuned model stands there; run: ragtune {verb}")
    return url


def current_generator(settings: config.Config) -> str:
    """What the generator of a config is at this moment: a name, or the directory that a CURRENT points to. Cheap.

    Raises:
        weights.ModelError: the arm wants a tuned model and nothing was trained for it yet.
    """
    if config.is_tuned(settings.answer.arm):
        return tuned_model(settings.workspace, settings.answer.arm)
    model = settings.generator.model
    return model if settings.generator.engine == "openai" else artifacts.current(model) or model
