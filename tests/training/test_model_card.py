"""The model card: a header for model hubs, the scores of the run, and settings that load again."""

from typing import Any

import pytest
import yaml

from ragtune_ray import config
from ragtune_ray.training.model_card import model_card

SFT = {
    "objective": "sft",
    "arm": "rag+ft",
    "base": "SmolLM2-135M-Instruct",
    "input": {"num_train": 12345, "num_validation": 1256, "kinds": {"without_gold": 345, "with_gold": 12000}},
    "num_steps": 2000,
    "start": {"loss": 2.5, "score": -2.5},
    "best": {"step": 1500, "loss": 1.23456, "score": -1.23456},
}
RETRIEVER = SFT | {
    "objective": "query_side",
    "arm": None,
    "base": "/models/it's: a #1",
    "input": {"num_train": 10, "num_validation": 3},
    "start": {"MRR": 0.25, "recall@1": 0.125, "score": 0.25},
    "best": {"step": 7, "MRR": 0.75, "recall@1": 0.5, "score": 0.75},
}
SETTINGS = config.Config().using("seed=5", "training.epochs=3", "training.learning_rate=0.0002")


def parts(facts: Any, settings: config.Config = SETTINGS) -> tuple[dict[str, Any], str]:
    """The parsed header and the text below it."""
    before, header, body = model_card(facts, settings).split("---\n", 2)
    assert before == ""
    return yaml.safe_load(header), body


def fenced(body: str, heading: str) -> str:
    """The first block of code below a heading."""
    return body.partition(f"## {heading}\n")[2].partition("```")[2].partition("\n")[2].partition("\n```")[0]


@pytest.mark.parametrize(
    ("facts", "library", "task"),
    [
        (SFT, "transformers", "text-generation"),
        (RETRIEVER, "sentence-transformers", "sentence-similarity"),
        (RETRIEVER | {"objective": "contrastive"}, "sentence-transformers", "sentence-similarity"),
        (RETRIEVER | {"objective": "distillation"}, "sentence-transformers", "sentence-similarity"),
        (RETRIEVER | {"objective": "reranker"}, "sentence-transformers", "text-ranking"),
    ],
)
def test_the_header_names_task_library_and_base_model(facts: dict[str, Any], library: str, task: str) -> None:
    header, _ = parts(facts)
    assert header == {
        "base_model": facts["base"],
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["ragtune-ray", facts["objective"]],
    }


def test_the_text_names_base_objective_and_data() -> None:
    _, body = parts(SFT)
    assert "\n# SmolLM2-135M-Instruct, fine-tuned (sft, rag+ft)\n" in body
    assert "on 12,345 examples (12,000 with_gold, 345 without_gold).\n" in body
    _, body = parts(RETRIEVER)
    assert "\n# /models/it's: a #1, fine-tuned (query_side)\n" in body
    assert "on 10 examples.\n" in body


@pytest.mark.parametrize(
    ("facts", "rows"),
    [
        (SFT, [["validation loss", "2.5000", "1.2346"]]),
        (RETRIEVER, [["validation MRR", "0.2500", "0.7500"], ["validation recall@1", "0.1250", "0.5000"]]),
    ],
)
def test_the_table_shows_every_validation_metric_before_and_after(facts: dict[str, Any], rows: list[list[str]]) -> None:
    _, body = parts(facts)
    table = [line for line in body.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells == [["", "at the start", "this model"], ["---"] * 3, *rows]


def test_the_card_names_the_best_step_or_none() -> None:
    assert "Weights of step 1,500 of 2,000, the best on 1,256 validation examples.\n" in parts(SFT)[1]
    start = SFT | {"best": {"step": 0, **SFT["start"]}}  # type: ignore[dict-item]
    _, body = parts(start)
    assert "No step was better than the start on 1,256 validation examples" in body
    assert "Weights of step" not in body
    assert "| 2.5000 | 2.5000 |" in body


@pytest.mark.parametrize("facts", [SFT, RETRIEVER])
def test_the_settings_on_the_card_load_as_the_same_config(facts: dict[str, Any]) -> None:
    settings = SETTINGS.using("training.abstention='不知道: \"#1\"'")
    shown = yaml.safe_load(fenced(parts(facts, settings)[1], "Settings"))
    assert shown == {"seed": 5, "training": settings.training.model_dump(mode="json")}
    assert config.Config.model_validate(shown).training == settings.training


@pytest.mark.parametrize("arm", ["ft", "rag+ft"])
def test_a_generators_card_shows_its_training_instruction(arm: str) -> None:
    settings = SETTINGS.using("prompt.system=With passages.", "prompt.system_without_passages=Without.")
    _, body = parts(SFT | {"arm": arm}, settings)
    assert fenced(body, "Instruction") == {"ft": "Without.", "rag+ft": "With passages."}[arm]
    assert "Instruction" not in parts(RETRIEVER, settings)[1], "a retriever has no instruction"
