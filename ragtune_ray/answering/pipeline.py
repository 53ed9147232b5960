"""Answers queries from their passages with a generator; bulk jobs, `ask` and the endpoint share this path."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ragtune_ray import config, schema
from ragtune_ray.answering import prompts
from ragtune_ray.answering.abstention import is_abstention
from ragtune_ray.answering.citations import (
    citations_by_sentence,
    finished_sentences,
    parse_citations,
    supporting_citations,
    without_unfinished_mark,
)
from ragtune_ray.generation.interface import Completion, DecodingOptions, Generator, GeneratorError, Prompt, Tokenizer


@dataclass(frozen=True, slots=True)
class Task:
    """One query with the passages that were retrieved for it."""

    query: schema.Query
    passages: tuple[schema.Passage, ...] = ()
    """Best first; empty in arms that do not retrieve."""
    scores: tuple[float, ...] = ()
    """Retrieval score of each passage."""
    index_version: str = ""
    """Empty in arms that do not retrieve."""
    error: str = ""
    """Why retrieval failed; empty if it succeeded."""


def answer_tasks(
    tasks: Sequence[Task], generator: Generator, settings: config.Config, model: str
) -> list[schema.Answer]:
    """One answer per task, in the same order; a task that fails gets a row with status `failed`.

    `model` is the fingerprint of the generator, which must be opened from `settings.generator`.
    """
    parts = [parts_of(task, settings) for task in tasks]
    answers = iter(_answer_parts([part for of_task in parts for part in of_task], generator, settings, model))
    return [likeliest([next(answers) for _ in of_task], settings.answer.rank_weight)[1] for of_task in parts]


def _answer_parts(
    tasks: Sequence[Task], generator: Generator, settings: config.Config, model: str
) -> list[tuple[schema.Answer, float]]:
    """One answer per task, and ln of its probability."""
    built = _prompts(tasks, generator, settings)
    ready = [prompt for prompt in built if isinstance(prompt, Prompt)]
    completions = iter(generator.generate(ready, **decoding_options(settings)))
    answers = []
    for task, prompt in zip(tasks, built, strict=True):
        if isinstance(prompt, str):
            answers.append((failed_answer(task, prompt, model), -math.inf))
        else:
            completion = next(completions)
            answer = finished_answer(task, prompt, completion, model, settings.training.abstention)
            answers.append((answer, completion.log_probability or 0.0))
    return answers


def decoding_options(settings: config.Config) -> DecodingOptions:
    """The options of the generator that a config names."""
    generator = settings.generator
    return {
        "max_new_tokens": generator.max_new_tokens,
        "temperature": generator.temperature,
        "stop": generator.stop,
        "seed": settings.seed,
    }


def parts_of(task: Task, settings: config.Config) -> list[Task]:
    """With `answer.reading=apart`, one task for each passage, best first; otherwise the task itself."""
    if settings.answer.reading == "together" or not settings.answer.shows_passages or len(task.passages) < 2:
        return [task]
    return [
        dataclasses.replace(task, passages=(passage,), scores=(score,))
        for passage, score in zip(task.passages, task.scores, strict=True)
    ]


def likeliest(answers: Sequence[tuple[schema.Answer, float]], rank_weight: float) -> tuple[int, schema.Answer]:
    """The likeliest of several answers to one query, each from one passage.

    p(answer | query) is the sum of p(passage | query) p(answer | query, passage) over the passages with that answer, and
    p(passage | query) is taken to be proportional to 1 / rank ** rank_weight (RAG-Sequence, Lewis et al. 2020, section 2.1,
    with the answers themselves as hypotheses). Abstentions count only if all answers are abstentions.

    Each answer comes with ln p(answer | query, passage), in the order of the passages, best first.

    Returns:
        The index of the likeliest answer, and its row with the passages and the cost of all answers.
    """
    ok = [place for place, (answer, _) in enumerate(answers) if answer.status == "ok"]
    answered = [place for place in ok if not answers[place][0].abstained]
    terms = {place: answers[place][1] - rank_weight * math.log(place + 1) for place in answered or ok}
    if not terms:
        return 0, answers[0][0]
    shares: dict[str, float] = {}
    for place, term in terms.items():
        text = _normalized(answers[place][0])
        shares[text] = shares.get(text, 0.0) + math.exp(term)
    best = max(terms, key=lambda place: (shares[_normalized(answers[place][0])], terms[place]))
    rows = [answers[place][0] for place in ok]
    return best, dataclasses.replace(
        answers[best][0],
        passage_ids=tuple(name for row in rows for name in row.passage_ids),
        scores=tuple(score for row in rows for score in row.scores),
        seconds=sum(row.seconds for row in rows),
        prompt_tokens=sum(row.prompt_tokens for row in rows),
        completion_tokens=sum(row.completion_tokens for row in rows),
    )


def _normalized(answer: schema.Answer) -> str:
    return answer.answer.casefold().strip(" .")


def failed_answer(task: Task, reason: str, model: str) -> schema.Answer:
    """The row of a task that failed for the given reason."""
    return schema.Answer(
        query_id=task.query.query_id,
        query=task.query.text,
        answer="",
        citations=(),
        passage_ids=(),
        scores=(),
        abstained=False,
        seconds=0.0,
        prompt_tokens=0,
        completion_tokens=0,
        status="failed",
        error=reason,
        index_version=task.index_version,
        model=model,
    )


def _prompts(tasks: Sequence[Task], generator: Generator, settings: config.Config) -> list[Prompt | str]:
    """The prompt of each task, or the reason why it has none."""
    retrieved = [task for task in tasks if not task.error]
    try:
        together = iter(
            prompts.build_prompts(
                [task.query.text for task in retrieved],
                [task.passages for task in retrieved],
                system=[_system(task, settings) for task in retrieved],
                max_tokens=settings.prompt.max_tokens,
                count_tokens=generator.count_tokens,
                render=generator.render,
                histories=[task.query.history for task in retrieved],
            )
        )
    except (prompts.PromptError, GeneratorError):
        # One question is too long for the budget, or the template refuses it: build prompts one by one to find it.
        return [task.error or _prompt_or_reason(task, generator, settings) for task in tasks]
    return [task.error or next(together) for task in tasks]


def task_prompt(task: Task, generator: Tokenizer, settings: config.Config) -> Prompt:
    """The prompt of one task, with the conversation before its query.

    Raises:
        prompts.PromptError: the question does not fit `prompt.max_tokens`.
    """
    return prompts.build_prompt(
        task.query.text,
        task.passages,
        system=_system(task, settings),
        max_tokens=settings.prompt.max_tokens,
        count_tokens=generator.count_tokens,
        render=generator.render,
        history=task.query.history,
    )


def _prompt_or_reason(task: Task, generator: Generator, settings: config.Config) -> Prompt | str:
    try:
        return task_prompt(task, generator, settings)
    except (prompts.PromptError, GeneratorError) as error:
        return str(error)


def _system(task: Task, settings: config.Config) -> str:
    shown = settings.prompt.system if settings.answer.shows_passages else settings.prompt.system_without_passages
    return with_instruction(shown, task.query)


def with_instruction(system: str, query: schema.Query) -> str:
    """A system message, followed by those of the conversation before the query."""
    return "\n".join(filter(None, [system, query.instruction]))


def finished_answer(task: Task, prompt: Prompt, completion: Completion, model: str, taught: str = "") -> schema.Answer:
    """The row of a task, with citations instead of marks; a completion with an error becomes a failed row.

    `model` is the generator's fingerprint; `taught` is `training.abstention`.
    """
    if completion.error:
        return failed_answer(task, completion.error, model)
    cut, text = completion.finish == "length", completion.text.strip()
    written = without_unfinished_mark(text) if cut else text
    text, citations = parse_citations(written, prompt.passages)
    abstained = is_abstention(text, taught)
    marked = bool(citations)
    if not citations and not abstained:
        # The words of an unfinished sentence would support what the answer does not say.
        citations = supporting_citations(finished_sentences(text) if cut else text, prompt.passages, task.query.text)
    return schema.Answer(
        query_id=task.query.query_id,
        query=task.query.text,
        answer=text,
        citations=citations,
        passage_ids=tuple(passage.passage_id for passage in prompt.passages),
        scores=task.scores[: len(prompt.passages)],
        abstained=abstained,
        seconds=completion.seconds,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        status="ok",
        error="",
        index_version=task.index_version,
        model=model,
        confidence=completion.confidence,
        cut=cut,
        sentence_citations=citations_by_sentence(written, prompt.passages) if marked else None,
    )
