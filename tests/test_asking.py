"""Asking one question in this process, with tiny models and a real index."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from ragtune_ray import config, schema
from ragtune_ray.answering.pipeline import Task, answer_tasks
from ragtune_ray.asking import SourcedAnswer, ask, ask_streaming
from ragtune_ray.generation.generator import load_generator
from ragtune_ray.models.encoder import load_encoder
from ragtune_ray.storage import artifacts


@pytest.fixture(scope="module")
def workspace(
    tmp_path_factory: pytest.TempPathFactory,
    encoder_directory: Path,
    generator_directory: Path,
    passages: list[schema.Passage],
    write_index: Callable[..., str],
) -> config.Config:
    path = tmp_path_factory.mktemp("workspace")
    settings = config.Config(workspace=str(path)).using(
        f"encoder.model={encoder_directory}",
        f"generator.model={generator_directory}",
        "encoder.precision=float32",
        "generator.precision=float32",
        "generator.max_new_tokens=8",
        "retrieval.top_k=2",
    )
    write_index(path, passages, load_encoder(settings.encoder, "cpu"), model=str(encoder_directory))
    return settings


def test_a_question_is_answered_from_the_index_in_this_process(workspace: config.Config) -> None:
    *pieces, asked = ask_streaming(workspace, "What are the moons of Mars, Phobos and Deimos?")
    assert isinstance(asked, SourcedAnswer)
    assert "".join(str(piece) for piece in pieces).strip() == asked.answer.answer
    assert asked.answer.answer, "the tiny model says something"
    assert asked.answer.passage_ids == tuple(passage.passage_id for passage in asked.passages)
    assert "mars#1" in asked.answer.passage_ids
    assert (asked.answer.index_version, asked.answer.status) == ("000001", "ok")
    assert asked.answer.seconds > 0
    facts = asked.facts()
    assert [source["passage_id"] for source in facts["sources"]] == list(asked.answer.passage_ids)
    assert facts["answer"] == asked.answer.answer


@pytest.mark.parametrize("reading", ["together", "apart"])
def test_asking_returns_the_answer_of_bulk_answering(workspace: config.Config, reading: str) -> None:
    workspace = workspace.using(f"answer.reading={reading}")
    asked = ask(workspace, "What is the Sun?")
    generator = load_generator(workspace.generator, Path(workspace.generator.model))
    query = schema.Query("ask", "What is the Sun?", None, (), (), "all")
    task = Task(query, asked.passages, asked.answer.scores, "000001")
    (bulk,) = answer_tasks([task], generator, workspace, asked.answer.model)
    assert bulk.answer == asked.answer.answer
    # A stream counts the tokens of its text, which differ from those generated if these end in half a character; it does
    # not see their probabilities.
    measured = {"seconds": 0.0, "completion_tokens": 0, "confidence": None}
    assert dataclasses.replace(bulk, **measured) == dataclasses.replace(asked.answer, **measured)


def test_the_base_arm_needs_no_index(workspace: config.Config, tmp_path: Path) -> None:
    asked = ask(workspace.using(f"workspace={tmp_path}", "answer.arm=base"), "What is the Sun?")
    assert (asked.passages, asked.answer.passage_ids, asked.answer.index_version) == ((), (), "")


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(workspace: config.Config, question: str) -> None:
    with pytest.raises(ValueError, match="the question is empty"):
        ask(workspace, question)


def test_without_an_index_the_error_names_the_command(workspace: config.Config, tmp_path: Path) -> None:
    with pytest.raises(artifacts.ArtifactError, match="run: ragtune index CONFIG"):
        ask(workspace.using(f"workspace={tmp_path}"), "What is the Sun?")
