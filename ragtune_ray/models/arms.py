"""A retriever and a generator that answer together, and which of them an arm answers with.

In: a config. Out: the same config with the models of an arm in it. What `ragtune tune` makes is one `Pair`: it names both models
and the workspace whose index the retriever's encoder built, so that all of them are taken over, or given back, in one step, and
no index is ever searched with another round's encoder. This module knows nothing of how either was trained.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from ragtune_ray import config
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts

__all__ = ["Pair", "with_tuned_models"]


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
        # YAML does not join the two escapes that JSON writes for a character such as an emoji.
        return settings.using(*(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items()))

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
    url = weights.tuned_model(settings.workspace, arm)
    if config.is_mode(arm):
        pair: dict[str, Any] = artifacts.read_manifest(url)["pair"]
        return Pair(**pair).used_in(settings)
    return (
        dataclasses.replace(Pair.of(settings), generator_model=url)
        .used_in(settings)
        .using("generator.engine=transformers")
    )
