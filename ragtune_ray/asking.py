"""One question, answered in this process: retrieve, prompt, stream.

In: a config and a question. Out: the pieces of the answer, then the whole of it with its passages. This module knows
nothing of Ray: it is the product in one process, where a reader can follow it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ragtune_ray import config, schema
from ragtune_ray.answering.pipeline import Task, stream_answer
from ragtune_ray.answering.prompts import PromptError
from ragtune_ray.models import arms

__all__ = ["Asked", "ask"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A finished answer and what it was shown."""

    answer: schema.Answer
    passages: tuple[schema.Passage, ...]

    def facts(self) -> dict[str, Any]:
        """The answer's row and its sources, as JSON values."""
        sources = [dataclasses.asdict(passage) for passage in self.passages]
        return {**dataclasses.asdict(self.answer), "sources": sources}


def ask(settings: config.Config, question: str) -> Iterator[str | Asked]:
    """Answer one question in the arm of `answer.arm`: the pieces of the text, then `Asked`.

    Raises:
        PromptError: the question is empty or too long for the prompt's budget.
        storage.ArtifactError: an arm that retrieves, and there is no sound index.
        models.ModelError: a model cannot be had.
    """
    from ragtune_ray.generation.generator import open_generator
    from ragtune_ray.index.retriever import open_retriever

    if not question.strip():
        raise PromptError("the question is empty; ask something")
    query = schema.Query("ask", question, None, (), (), "all")
    task = Task(query, (), (), "", "")
    settings = arms.with_tuned_models(settings)
    if settings.answer.shows_passages:
        retriever = open_retriever(settings)
        ((passages, scores),) = retriever.retrieve_passages([question], settings.retrieval.top_k)
        task = Task(query, tuple(passages), tuple(scores), retriever.index.version, "")
    generator, fingerprint = open_generator(settings)
    started = time.monotonic()
    for piece in stream_answer(task, generator, settings, fingerprint):
        if isinstance(piece, schema.Answer):
            by_id = {passage.passage_id: passage for passage in task.passages}
            shown = tuple(by_id[passage_id] for passage_id in piece.passage_ids)
            yield Asked(dataclasses.replace(piece, seconds=time.monotonic() - started), shown)
        else:
            yield piece
