"""Answers one question in this process: the whole product on one page. Start reading here.

    question -> retriever -> passages -> prompt -> generator -> text -> answer with citations

`cluster/answering` takes the same path for millions of questions, `cluster/serving` for an HTTP endpoint.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator as Stream
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ragtune_ray import config, schema
from ragtune_ray.answering import rewriting
from ragtune_ray.answering.pipeline import Task, answer_tasks, decoding_options, finished_answer, parts_of, task_prompt
from ragtune_ray.answering.prompts import PromptError
from ragtune_ray.answering.searching import search_passages
from ragtune_ray.generation.generator import open_generator
from ragtune_ray.generation.interface import Completion, Finish, Generator
from ragtune_ray.index.retriever import open_retriever
from ragtune_ray.models import arms


@dataclass(frozen=True, slots=True)
class SourcedAnswer:
    """An answer and the passages that its prompt showed."""

    answer: schema.Answer
    passages: tuple[schema.Passage, ...]

    @property
    def text(self) -> str:
        """The answer's text, without citation marks."""
        return self.answer.answer

    def facts(self) -> dict[str, Any]:
        """The fields of the answer, and its passages under `sources`, as JSON values."""
        sources = [dataclasses.asdict(passage) for passage in self.passages]
        return {**dataclasses.asdict(self.answer), "sources": sources}


def ask(settings: config.Config, question: str, messages: Sequence[schema.Message] = ()) -> SourcedAnswer:
    """Answer one question in the arm that `answer.arm` names; `messages` are the conversation before it, oldest first.

    Raises:
        PromptError: the question is empty or too long for `prompt.max_tokens`.
        ArtifactError: the arm retrieves, and the workspace has no sound index.
        ModelError: a model cannot be found or fetched.
    """
    *_, answer = ask_streaming(settings, question, messages)
    assert isinstance(answer, SourcedAnswer)
    return answer


def ask_streaming(
    settings: config.Config, question: str, messages: Sequence[schema.Message] = ()
) -> Iterator[str | SourcedAnswer]:
    """Like `ask`, but yields the text piece by piece while it is generated, and the `SourcedAnswer` last."""
    if not question.strip():
        raise PromptError("the question is empty; ask something")
    settings = arms.with_tuned_models(settings)
    query = schema.Query("ask", question, None, (), (), "all", tuple(messages))
    writer = None
    if settings.answer.shows_passages and rewriting.steps(query, settings.retrieval):
        writer = open_generator(settings)
    task = retrieve(settings, query, writer.generator if writer else None)
    generator, fingerprint = writer or open_generator(settings)
    started = time.monotonic()
    for piece in stream_answer(task, generator, settings, fingerprint):
        if isinstance(piece, str):
            yield piece
            continue
        by_id = {passage.passage_id: passage for passage in task.passages}
        shown = tuple(by_id[passage_id] for passage_id in piece.passage_ids)
        yield SourcedAnswer(dataclasses.replace(piece, seconds=time.monotonic() - started), shown)


def retrieve(settings: config.Config, query: schema.Query, writer: Generator | None = None) -> Task:
    """The question with its best passages from the current index version, or without passages if the arm does not retrieve.

    `writer` is the generator that writes what to search for, if `retrieval.rewrite` or `retrieval.decompose` asks for it.
    """
    if not settings.answer.shows_passages:
        return Task(query)
    retriever = open_retriever(settings)
    retrieval = settings.retrieval
    (searches,) = rewriting.write_searches([query], writer, settings) if writer else [rewriting.begun(query, retrieval)]
    ((passages, scores),) = search_passages(retriever, [searches.texts], retrieval, retrieval.top_k)
    return Task(query, tuple(passages), tuple(scores), retriever.index.version)


def stream_answer(
    task: Task, generator: Generator, settings: config.Config, model: str
) -> Iterator[str | schema.Answer]:
    """Build the prompt, generate and cite; yields the text piece by piece, then the `Answer`.

    Raises:
        PromptError: the question does not fit `prompt.max_tokens`.
    """
    if len(parts_of(task, settings)) > 1:  # the likeliest of several answers is known only after the last one
        (answer,) = answer_tasks([task], generator, settings, model)
        yield from (answer.answer, answer)
        return
    prompt = task_prompt(task, generator, settings)
    pieces: list[str] = []
    finish = yield from _recorded(generator.stream(prompt, **decoding_options(settings)), pieces)
    text = "".join(pieces)
    completion = Completion(text, prompt.num_tokens, generator.count_tokens([text])[0], 0.0, finish, "")
    yield finished_answer(task, prompt, completion, model, settings.training.abstention)


def _recorded(stream: Stream[str, None, Finish], pieces: list[str]) -> Stream[str, None, Finish]:
    """The same stream, with its pieces added to a list."""
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            finish: Finish = end.value
            return finish
        pieces.append(piece)
        yield piece
