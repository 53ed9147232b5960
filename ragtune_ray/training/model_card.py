"""What a tuned model says of itself: base, data, settings, scores.

In: the facts of a training run and its config. Out: a README.md as model hubs read it (Mitchell et al. 2019). This module knows
nothing of weights or files.
"""

from __future__ import annotations

from typing import Any

import yaml

from ragtune_ray import config

__all__ = ["model_card"]

_GENERATOR = ("transformers", "text-generation")
_RETRIEVER = ("sentence-transformers", "sentence-similarity")


def model_card(facts: dict[str, Any], settings: config.Config) -> str:
    """The card of a model.

    Args:
        facts: as its manifest holds them.
        settings: of the run.
    """
    objective = facts["objective"]
    library, task = _GENERATOR if facts["arm"] else _RETRIEVER  # only a generator is trained for an arm
    header = {
        "base_model": facts["base"],
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["ragtune-ray", objective],
    }
    data, best, start = facts["input"], facts["best"], facts["start"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(data.get("kinds", {}).items()))
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {facts['base']}, fine-tuned ({objective}{', ' + facts['arm'] if facts['arm'] else ''})",
        "",
        f"Trained by ragtune-ray on {data['num_train']:,} examples{' (' + kinds + ')' if kinds else ''}.",
        "No document that they are about is one that validation or test queries are about.",
        "",
        "| | at the start | this model |",
        "|---|---|---|",
        *(f"| validation {name} | {start[name]:.4f} | {best[name]:.4f} |" for name in start if name != "score"),
        "",
        _verdict(facts),
        "",
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(
            {"seed": settings.seed, "training": settings.training.model_dump(mode="json")}, sort_keys=False
        ).strip(),
        "```",
    ]
    if facts["arm"]:
        lines += ["", "## Instruction", "", "Ask it as it was trained:", "", "```", _system(facts, settings), "```"]
    return "\n".join(lines) + "\n"


def _verdict(facts: dict[str, Any]) -> str:
    validated = f"{facts['input']['num_validation']:,} validation examples"
    if not facts["best"]["step"]:
        return f"No step was better than the start on {validated}: these are the weights it started from."
    return f"Weights of step {facts['best']['step']:,} of {facts['num_steps']:,}, the best on {validated}."


def _system(facts: dict[str, Any], settings: config.Config) -> str:
    return settings.prompt.system if facts["arm"] == "rag+ft" else settings.prompt.system_without_passages
