"""Queries with what was retrieved for them -> training examples of the generator and of the retriever.

In: queries, their relevant documents' passages, retrieved passages, and how the generator counts and renders. Out: examples,
and a `Reject` for each query that gives none. Every draw depends on the seed and the id of the query, or of its passage: so
examples do not depend on how queries are divided among workers. This module knows nothing of indexes, weights, files or Ray.

The generator's mixture is RAFT's (Zhang et al. 2024): the passage that holds the answer among retrieved ones that do not, its
place drawn evenly, and left out in a share of the examples, some of which are answered with an abstention. The retriever's
negatives are those of NV-Retriever (Moreira et al. 2024): hits that do not score too near the positive, which may be one too.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ragtune_ray import config
from ragtune_ray.answering import prompts
from ragtune_ray.answering.citations import UNSPACED
from ragtune_ray.ingest.splits import positives
from ragtune_ray.schema import ExampleKind, GeneratorExample, JointExample, Passage, Query, Reject, RetrieverExample

__all__ = [
    "Candidates",
    "ChatText",
    "example_type",
    "generator_example",
    "holds_answer",
    "joint_example",
    "positive_passage",
    "replay_count",
    "retriever_example",
]


SHORT_ANSWER = 3
"""Characters up to which an answer must be a word of its own to stand in a text."""


@dataclass(frozen=True, slots=True)
class ChatText:
    """How the generator renders and counts, known without its weights."""

    count_tokens: prompts.CountTokens
    render: prompts.Render


@dataclass(frozen=True, slots=True)
class Candidates:
    """What the index holds for one query."""

    gold: tuple[Passage, ...]
    """The passages of its relevant documents, in the order of the documents."""
    retrieved: tuple[Passage, ...]
    """Best first; may hold gold ones."""
    scores: tuple[float, ...]
    """Of `retrieved`, as the retrieval mode scores."""
    gold_cosines: tuple[float, ...] = ()
    """Of `gold`, for the retriever's examples."""
    retrieved_cosines: tuple[float, ...] = ()
    """Of `retrieved`, likewise."""
    neighbors: tuple[Passage, ...] = ()
    """What is retrieved for the text of the query's `positive_passage`, best first, without that passage itself."""


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether any of the answers stands in the text, whatever its case and width of letters.

    A word must begin where the answer does; it may go on ("Norman" stands in "Normans"), but for answers of up to three letters.

    >>> holds_answer("It was built in 1889.", ["1889"]), holds_answer("It was not.", ["no"])
    (True, False)
    """
    folded = _folded(text)
    return any(_stands_in(_folded(answer), folded) for answer in answers)


def _stands_in(answer: str, text: str) -> bool:
    if not answer or answer not in text:  # quick, and all there is to it for most pairs
        return False
    begins = r"(?<!\w)" if _is_spaced(answer[0]) else ""
    ends = r"(?!\w)" if len(answer) <= SHORT_ANSWER and _is_spaced(answer[-1]) else ""
    return re.search(begins + re.escape(answer) + ends, text) is not None


def _is_spaced(character: str) -> bool:
    """A letter or digit of a script that puts spaces between words."""
    return character.isalnum() and not UNSPACED.match(character)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def example_type(settings: config.Training) -> type[GeneratorExample | JointExample | RetrieverExample]:
    """The record that the objective learns from."""
    match settings.objective:
        case "sft":
            return GeneratorExample
        case "joint":
            return JointExample
    return RetrieverExample


def generator_example(
    query: Query,
    candidates: Candidates | None,
    chat: ChatText,
    settings: config.Config,
    kind: ExampleKind | None = None,
) -> GeneratorExample | Reject:
    """The training example of one query.

    Args:
        query: with gold answers; one that is known to have none is answered with the abstention.
        candidates: of the index; None in the arm ft and for replay.
        chat: of the generator that is trained.
        settings: prompt, training and seed are used.
        kind: of a query without candidates, `question_only` or `replay`; None: drawn, where there are candidates.

    Returns:
        The example, or why the query gives none.
    """
    if query.answers is None:
        return Reject(query.query_id, "has no answers to learn", "row")
    if candidates is None:
        answer = query.answers[0] if query.answers else settings.training.abstention
        return _rendered(query, (), None, answer, kind or "question_only", chat, settings)
    source = _source(settings.seed, query.query_id)
    count = settings.training.passages or settings.retrieval.top_k
    gold = positive_passage(query, candidates)
    found, order = candidates.retrieved, source
    if gold is not None and settings.training.distractors == "passage":
        # The same passages in the same order, whichever question is asked about the gold one.
        found, order = (gold, *candidates.neighbors), _source(settings.seed, gold.passage_id)
    others = [
        passage
        for passage in found
        if _is_distractor(passage, query) and not holds_answer(passage.title, query.answers)
    ]
    training = settings.training
    if query.answers and gold is not None and source.random() >= training.gold_left_out_share:
        return _with_gold(query, gold, others[: count - 1], order, chat, settings)
    shown = list(others[:count] if query.answers else found[:count])
    abstains = not query.answers or source.random() < training.abstain_share
    order.shuffle(shown)
    if abstains:
        return _rendered(query, shown, None, training.abstention, "abstention", chat, settings)
    return _rendered(query, shown, None, query.answers[0], "without_gold", chat, settings)


def _source(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _with_gold(
    query: Query,
    gold: Passage,
    others: list[Passage],
    order: np.random.Generator,
    chat: ChatText,
    settings: config.Config,
) -> GeneratorExample | Reject:
    """Fewer others are shown until the gold passage stands whole enough in the prompt to hold the answer, as it words it.

    Its place is drawn anew each time: were only what stands behind it dropped, the last place that fits would be the likeliest.
    """
    assert query.answers
    answer = next((answer for answer in query.answers if holds_answer(gold.text, [answer])), query.answers[0])
    while True:
        shown = [gold, *others]
        order.shuffle(shown)
        example = _rendered(query, shown, gold, answer, "with_gold", chat, settings)
        if isinstance(example, Reject):
            return example
        if example.gold_place or not others:
            break
        others = others[:-1]
    if example.gold_place:
        return example
    return Reject(
        query.query_id,
        f"the part of passage {gold.passage_id} that holds the answer does not fit the smaller of training.max_tokens "
        f"({settings.training.max_tokens}) and prompt.max_tokens ({settings.prompt.max_tokens}); raise it or lower "
        "chunking.size_tokens",
        "row",
    )


def _rendered(
    query: Query,
    shown: Sequence[Passage],
    gold: Passage | None,
    answer: str,
    kind: ExampleKind,
    chat: ChatText,
    settings: config.Config,
) -> GeneratorExample | Reject:
    """The prompt as answering builds it, in what the whole answer leaves of the window."""
    training, prompt_settings = settings.training, settings.prompt
    cites = bool(training.cite and gold is not None)
    longest = f" [{len(shown)}]" if cites else ""
    num_answer_tokens = _with_end(answer + longest, chat)
    # As in answering, it is the arm that decides: one that retrieves keeps its instruction where nothing is found.
    asked_alone = kind in ("question_only", "replay")
    system = prompt_settings.system_without_passages if asked_alone else prompt_settings.system
    try:
        prompt = prompts.build_prompt(
            query.text,
            shown,
            system=system,
            max_tokens=min(prompt_settings.max_tokens, training.max_tokens - num_answer_tokens),
            count_tokens=chat.count_tokens,
            render=chat.render,
        )
    except prompts.PromptError as error:
        reason = f"its answer takes {num_answer_tokens} of training.max_tokens ({training.max_tokens}): {error}"
        return Reject(query.query_id, reason, "row")
    place = _place(prompt.passages, gold, answer)
    taught = f"{answer} [{place}]" if cites and place else answer
    return GeneratorExample(
        query_id=query.query_id,
        kind=kind,
        prompt=chat.render(prompt.messages),
        answer=taught,
        passage_ids=tuple(passage.passage_id for passage in prompt.passages),
        gold_place=place,
        num_prompt_tokens=prompt.num_tokens,
        num_answer_tokens=_with_end(taught, chat),
    )


def _with_end(answer: str, chat: ChatText) -> int:
    """Tokens of an answer and of its end."""
    (count,) = chat.count_tokens([answer])
    return count + 1


def _place(shown: Sequence[Passage], gold: Passage | None, answer: str) -> int:
    """Where the gold passage stands, from 1; 0 if it was dropped, or shortened before the answer that it held."""
    for number, passage in enumerate(shown, start=1):
        if gold is not None and passage.passage_id == gold.passage_id:
            lost = holds_answer(gold.text, [answer]) and not holds_answer(passage.text, [answer])
            return 0 if lost else number
    return 0


def positive_passage(query: Query, candidates: Candidates) -> Passage | None:
    """The passage that an example rests on; None: there is none.

    Of the relevant documents' passages the first that holds an answer, else the best retrieved, else the first; where no
    document is judged relevant, the best retrieved passage that holds an answer.
    """
    answers = query.answers or ()
    for passage in candidates.gold:
        if holds_answer(passage.text, answers):
            return passage
    relevant = set(positives(query))
    if not relevant:
        return next((passage for passage in candidates.retrieved if holds_answer(passage.text, answers)), None)
    found = (passage for passage in candidates.retrieved if passage.document_id in relevant)
    return next(found, candidates.gold[0] if candidates.gold else None)


def _is_distractor(passage: Passage, query: Query) -> bool:
    """Not of a relevant document, and not holding the answer by chance or as a copy."""
    return passage.document_id not in positives(query) and not holds_answer(passage.text, query.answers or ())


def retriever_example(
    query: Query,
    candidates: Candidates,
    settings: config.Config,
    count_tokens: Callable[[Sequence[str]], list[int]],
    teacher: Callable[[str, Sequence[str]], Sequence[float]] | None = None,
) -> RetrieverExample | Reject:
    """A query with a passage that answers it and hits that do not.

    Args:
        query: with a relevant document, or an answer that a hit holds.
        candidates: with cosines.
        settings: training is used.
        count_tokens: the encoder's, as far as it reads.
        teacher: scores passages for a query, larger is better; None: the scores that the hits came with.
    """
    positive = None if query.answers == () else positive_passage(query, candidates)
    if positive is None:
        return Reject(query.query_id, "has no passage that answers it", "row")
    cosines = {passage.passage_id: cosine for passage, cosine in _with_cosines(candidates)}
    ceiling = (1 - settings.training.negative_margin) * cosines[positive.passage_id]
    negatives = [
        passage
        for passage in candidates.retrieved
        if _is_distractor(passage, query)
        and passage.document_id != positive.document_id
        and (not settings.training.negative_margin or cosines[passage.passage_id] <= ceiling)
    ][: settings.training.hard_negatives]
    passages = [positive, *negatives]
    texts = [passage.text for passage in passages]
    taught: Sequence[float] = ()
    if settings.training.objective == "distillation":
        found = dict(zip((passage.passage_id for passage in candidates.retrieved), candidates.scores, strict=True))
        floor = min(found.values(), default=0.0)
        raw = teacher(query.text, texts) if teacher else [found.get(passage.passage_id, floor) for passage in passages]
        taught = _scaled(raw)
    return RetrieverExample(
        query_id=query.query_id,
        query=query.text,
        passage_ids=tuple(passage.passage_id for passage in passages),
        passages=tuple(texts),
        teacher_scores=tuple(taught),
        num_tokens=sum(count_tokens([query.text, *([] if settings.training.keeps_index else texts)])),
    )


def joint_example(
    query: Query, passages: Sequence[Passage], chat: ChatText, settings: config.Config
) -> JointExample | Reject:
    """A query, its answer, and for each candidate passage the prompt that shows it alone.

    Args:
        query: with answers.
        passages: the candidates, as the retriever ranks them (`teaching.chosen`).
        chat: of the generator that is trained.
        settings: prompt and training are used.
    """
    if not query.answers or not passages:
        return Reject(query.query_id, "has no answer to learn" if passages else "has no passage to read", "row")
    answer = next(
        (each for each in query.answers if any(holds_answer(passage.text, [each]) for passage in passages)),
        query.answers[0],
    )
    shown = [_rendered(query, [passage], None, answer, "with_gold", chat, settings) for passage in passages]
    for each in shown:
        if isinstance(each, Reject):
            return each
    read = [each for each in shown if isinstance(each, GeneratorExample)]
    return JointExample(
        query_id=query.query_id,
        query=query.text,
        passage_ids=tuple(passage.passage_id for passage in passages),
        prompts=tuple(each.prompt for each in read),
        answer=answer,
        num_tokens=sum(each.num_tokens for each in read),
    )


def _with_cosines(candidates: Candidates) -> Iterable[tuple[Passage, float]]:
    yield from zip(candidates.gold, candidates.gold_cosines, strict=True)
    yield from zip(candidates.retrieved, candidates.retrieved_cosines, strict=True)


def _scaled(scores: Sequence[float]) -> list[float]:
    """To 0..1, so that one temperature fits every teacher; the positive's, which is first, never below another's.

    >>> _scaled([2.0, 4.0, 3.0])
    [1.0, 1.0, 0.5]
    """
    values = np.asarray(scores, dtype=np.float64)
    spread = float(values.max() - values.min())
    if spread <= 0:
        return [1.0] * len(values)
    values = (values - values.min()) / spread
    values[0] = 1.0
    return [float(value) for value in values]


def replay_count(num_examples: int, share: float) -> int:
    """How many replay examples make up this share of all.

    >>> replay_count(90, 0.1)
    10
    """
    return round(num_examples * share / (1 - share))
