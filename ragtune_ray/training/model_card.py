"""Writes the model card of a tuned model: base, data, settings and scores (Mitchell et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import yaml

from ragtune_ray import config
from ragtune_ray.training.manifest import ModelManifest


def model_card(facts: ModelManifest, settings: config.Config) -> str:
    """The README.md of a model, in the format of model hubs."""
    objective, arm = facts["objective"], facts["arm"]  # only a generator is trained for an arm
    header = {
        "base_model": facts["base"],
        "library_name": "transformers" if arm else "sentence-transformers",
        "pipeline_tag": "text-ranking"
        if objective == "reranker"
        else "text-generation"
        if arm
        else "sentence-similarity",
        "tags": ["ragtune-ray", objective],
    }
    data = facts["input"]
    start, best = cast(Mapping[str, float], facts["start"]), cast(Mapping[str, float], facts["best"])
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(data.get("kinds", {}).items()))
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {facts['base']}, fine-tuned ({objective}{', ' + arm if arm else ''})",
        "",
        f"Trained by ragtune-ray on {data['num_train']:,} examples{' (' + kinds + ')' if kinds else ''}.",
        "No document of these examples is relevant to a validation or test query.",
        "",
        "| | at the start | this model |",
        "|---|---|---|",
        *(f"| validation {name} | {start[name]:.4f} | {best[name]:.4f} |" for name in start if name != "score"),
        "",
        _summary(facts),
        "",
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(
            {"seed": settings.seed, "training": settings.training.model_dump(mode="json")}, sort_keys=False
        ).strip(),
        "```",
    ]
    if arm:
        system = settings.prompt.system if arm == "rag+ft" else settings.prompt.system_without_passages
        lines += ["", "## Instruction", "", "Use the instruction it was trained with:", "", "```", system, "```"]
    return "\n".join(lines) + "\n"


def _summary(facts: ModelManifest) -> str:
    validated = f"{facts['input']['num_validation']:,} validation examples"
    if not facts["best"]["step"]:
        return f"No step was better than the start on {validated}: these are the weights it started from."
    return f"Weights of step {facts['best']['step']:,} of {facts['num_steps']:,}, the best on {validated}."
