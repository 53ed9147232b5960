"""Turns queries and their retrieved passages into training examples of the generator and of the retriever.

Every random choice depends only on the seed and the id of the query (or of its passage), so the examples do not
depend on how the queries are divided among workers. A query that yields no example becomes a `Reject`.

The generator's examples follow RAFT (Zhang et al. 2024): the prompt shows the passage with the answer at a random place among
retrieved passages without it. In a share of the examples that passage is left out, and some of these teach an abstention. The
retriever's negatives follow NV-Retriever (Moreira et al. 2024): hits that score clearly below the positive.
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
from ragtune_ray.answering.citations import UNSPACED_BLOCKS
from ragtune_ray.answering.pipeline import with_instruction
from ragtune_ray.index.words import visible
from ragtune_ray.ingest.splits import positives
from ragtune_ray.schema import (
    ExampleKind,
    GeneratorExample,
    JointExample,
    Passage,
    Query,
    Reject,
    RerankerExample,
    RetrieverExample,
)

SHORT_ANSWER = 3
"""Answers of up to this many characters must match whole words."""


@dataclass(frozen=True, slots=True)
class ChatText:
    """The generator's tokenizer and chat template, without its weights."""

    count_tokens: prompts.CountTokens
    render: prompts.Render


@dataclass(frozen=True, slots=True)
class Candidates:
    """Passages of the index that may appear in a query's example."""

    gold: tuple[Passage, ...]
    """Passages of the query's relevant documents, in the order of the documents."""
    retrieved: tuple[Passage, ...]
    """Hits, best first; may include gold passages."""
    scores: tuple[float, ...]
    """Retrieval score of each hit."""
    gold_cosines: tuple[float, ...] = ()
    """Cosine of each gold passage with the query; only for the retriever's examples."""
    retrieved_cosines: tuple[float, ...] = ()
    """Cosine of each hit with the query; only for the retriever's examples."""
    neighbors: tuple[Passage, ...] = ()
    """Hits for the text of the query's `positive_passage`, best first, without that passage."""


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether the text contains any of the answers, ignoring case and character width.

    An answer must start at the start of a word. It may end inside a longer word ("Norman" matches "Normans") unless it
    has three characters or fewer.

    >>> holds_answer("It was built in 1889.", ["1889"]), holds_answer("It was not.", ["no"])
    (True, False)
    """
    folded = _folded(text)
    return any(_contains(folded, _folded(answer)) for answer in answers)


def _contains(text: str, answer: str) -> bool:
    if not answer or answer not in text:
        return False
    begins = r"(?<!\w)" if _is_spaced(answer[0]) else ""
    ends = r"(?!\w)" if len(answer) <= SHORT_ANSWER and _is_spaced(answer[-1]) else ""
    return re.search(begins + re.escape(answer) + ends, text) is not None


def _is_spaced(character: str) -> bool:
    """Whether this is a letter or digit of a script that separates words by spaces."""
    return character.isalnum() and not UNSPACED_BLOCKS.match(character)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", visible(text)).casefold().split())


def example_type(
    settings: config.Training,
) -> type[GeneratorExample | JointExample | RetrieverExample | RerankerExample]:
    """The record type that the objective trains on."""
    match settings.objective:
        case "sft":
            return GeneratorExample
        case "joint":
            return JointExample
        case "reranker":
            return RerankerExample
    return RetrieverExample


def generator_example(
    query: Query,
    candidates: Candidates | None,
    chat: ChatText,
    settings: config.Config,
    kind: ExampleKind | None = None,
) -> GeneratorExample | Reject:
    """Make the generator's example of one query; a query known to be unanswerable is answered with the abstention.

    `candidates` is None in the arm ft and for replay; `kind` is then `question_only` or `replay`.
    """
    if query.answers is None:
        return Reject(query.query_id, "has no answers to learn", "row")
    training = settings.training
    if candidates is None:
        answer = query.answers[0] if query.answers else training.abstention
        return _example_with(query, (), None, answer, kind or "question_only", chat, settings)
    rng = _random_for(settings.seed, query.query_id)
    count = training.passages or settings.retrieval.top_k
    gold = positive_passage(query, candidates)
    found, order_rng = candidates.retrieved, rng
    if gold is not None and training.distractors == "passage":
        # All questions about a gold passage see the same passages in the same order.
        found, order_rng = (gold, *candidates.neighbors), _random_for(settings.seed, gold.passage_id)
    distractors = [
        passage
        for passage in found
        if _is_distractor(passage, query) and not holds_answer(passage.title, query.answers)
    ]
    if query.answers and gold is not None and rng.random() >= training.gold_left_out_share:
        return _with_gold(query, gold, distractors[: count - 1], order_rng, chat, settings)
    shown = list(distractors[:count] if query.answers else found[:count])
    abstains = not query.answers or rng.random() < training.abstain_share
    order_rng.shuffle(shown)
    if abstains:
        return _example_with(query, shown, None, training.abstention, "abstention", chat, settings)
    return _example_with(query, shown, None, query.answers[0], "without_gold", chat, settings)


def _random_for(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _with_gold(
    query: Query,
    gold: Passage,
    distractors: list[Passage],
    rng: np.random.Generator,
    chat: ChatText,
    settings: config.Config,
) -> GeneratorExample | Reject:
    """Drop distractors until enough of the gold passage fits into the prompt to contain the answer.

    The passages are shuffled again after each drop: otherwise the last place that fits would be the most likely one.
    """
    assert query.answers
    answer = next((answer for answer in query.answers if holds_answer(gold.text, [answer])), query.answers[0])
    for count in range(len(distractors), -1, -1):
        shown = [gold, *distractors[:count]]
        rng.shuffle(shown)
        example = _example_with(query, shown, gold, answer, "with_gold", chat, settings)
        if isinstance(example, Reject) or example.gold_place:
            return example
    return Reject(
        query.query_id,
        f"the part of passage {gold.passage_id} that contains the answer does not fit the smaller of training.max_tokens "
        f"({settings.training.max_tokens}) and prompt.max_tokens ({settings.prompt.max_tokens}); raise it or lower "
        "chunking.size_tokens",
        "row",
    )


def _example_with(
    query: Query,
    shown: Sequence[Passage],
    gold: Passage | None,
    answer: str,
    kind: ExampleKind,
    chat: ChatText,
    settings: config.Config,
) -> GeneratorExample | Reject:
    """Build the prompt as answering does, but leave enough tokens for the answer."""
    training, shown_in = settings.training, settings.prompt
    cites = training.cite and gold is not None
    longest_target = f"{answer} [{len(shown)}]" if cites else answer
    num_answer_tokens = _count_answer_tokens(longest_target, chat)
    # As in answering, an arm that retrieves keeps its instruction even if nothing is found.
    closed_book = kind in ("question_only", "replay")
    system = shown_in.system_without_passages if closed_book else shown_in.system
    try:
        prompt = prompts.build_prompt(
            query.text,
            shown,
            system=with_instruction(system, query),
            max_tokens=min(shown_in.max_tokens, training.max_tokens - num_answer_tokens),
            count_tokens=chat.count_tokens,
            render=chat.render,
            history=query.history,
        )
    except prompts.PromptError as error:
        reason = f"its answer takes {num_answer_tokens} of training.max_tokens ({training.max_tokens}): {error}"
        return Reject(query.query_id, reason, "row")
    place = _gold_place(prompt.passages, gold, answer)
    target = f"{answer} [{place}]" if cites and place else answer
    return GeneratorExample(
        query_id=query.query_id,
        kind=kind,
        prompt=chat.render(prompt.messages),
        answer=target,
        passage_ids=tuple(passage.passage_id for passage in prompt.passages),
        gold_place=place,
        num_prompt_tokens=prompt.num_tokens,
        num_answer_tokens=_count_answer_tokens(target, chat),
    )


def _count_answer_tokens(answer: str, chat: ChatText) -> int:
    """Number of tokens of an answer and its end token."""
    (count,) = chat.count_tokens([answer])
    return count + 1


def _gold_place(shown: Sequence[Passage], gold: Passage | None, answer: str) -> int:
    """Place of the gold passage, from 1; 0 if it was dropped or its part with the answer was cut off."""
    for number, passage in enumerate(shown, start=1):
        if gold is not None and passage.passage_id == gold.passage_id:
            cut_off = holds_answer(gold.text, [answer]) and not holds_answer(passage.text, [answer])
            return 0 if cut_off else number
    return 0


def positive_passage(query: Query, candidates: Candidates) -> Passage | None:
    """Choose the passage that answers the query, or None.

    With relevant documents: their first passage that contains an answer, else the best retrieved one, else the first.
    Without: the best retrieved passage that contains an answer.
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
    """Whether the passage belongs to no relevant document and does not happen to contain an answer."""
    return passage.document_id not in positives(query) and not holds_answer(passage.text, query.answers or ())


def retriever_example(
    query: Query,
    candidates: Candidates,
    settings: config.Config,
    count_tokens: Callable[[Sequence[str]], list[int]],
    teacher: Callable[[str, Sequence[str]], Sequence[float]] | None = None,
) -> RetrieverExample | Reject:
    """Make the retriever's example of one query: a positive passage and hard negatives.

    The candidates need cosines. `count_tokens` counts the encoder's tokens, up to its maximum length. Without a `teacher`, which
    scores passages for a query (larger is better), distillation uses the retrieval scores.
    """
    training = settings.training
    positive = None if query.answers == () else positive_passage(query, candidates)
    if positive is None:
        return Reject(query.query_id, "has no passage that answers it", "row")
    passages = [positive, *_hard_negatives(query, positive, candidates, training)]
    texts = [passage.text for passage in passages]
    teacher_scores: Sequence[float] = ()
    if training.objective == "distillation":
        found = dict(zip((passage.passage_id for passage in candidates.retrieved), candidates.scores, strict=True))
        floor = min(found.values(), default=0.0)
        raw = teacher(query.text, texts) if teacher else [found.get(passage.passage_id, floor) for passage in passages]
        teacher_scores = _scaled(raw)
    return RetrieverExample(
        query_id=query.query_id,
        query=query.text,
        passage_ids=tuple(passage.passage_id for passage in passages),
        passages=tuple(texts),
        teacher_scores=tuple(teacher_scores),
        num_tokens=sum(count_tokens([query.text, *([] if training.keeps_index else texts)])),
    )


def reranker_example(
    query: Query,
    candidates: Candidates,
    settings: config.Config,
    count_tokens: Callable[[Sequence[str]], list[int]],
    *,
    ranks_hits: bool = False,
) -> RerankerExample | Reject:
    """Make the reranker's example of one query: a positive passage and hard negatives.

    With `ranks_hits`, for validation, the others are all candidates of other documents, as a search would rerank them; the
    positive must be one of the candidates.
    """
    positive = None if query.answers == () else positive_passage(query, candidates)
    if positive is None:
        return Reject(query.query_id, "has no passage that answers it", "row")
    scores = dict(zip((passage.passage_id for passage in candidates.retrieved), candidates.scores, strict=True))
    if ranks_hits:
        if positive.passage_id not in scores:
            return Reject(query.query_id, f"its passage is not among the first {len(scores)} hits", "row")
        relevant = {positive.document_id, *positives(query)}
        others = [passage for passage in candidates.retrieved if passage.document_id not in relevant]
    else:
        others = _hard_negatives(query, positive, candidates, settings.training)
    if not others:
        return Reject(query.query_id, "has no hit that does not answer it", "row")
    passages = [positive, *others]
    lowest = min(scores.values())  # an upper bound of the score of a positive that was not found
    found = [scores.get(passage.passage_id, lowest) for passage in passages]
    texts = [passage.text for passage in passages]
    query_tokens, *passage_tokens = count_tokens([query.text, *texts])
    return RerankerExample(
        query_id=query.query_id,
        query=query.text,
        passage_ids=tuple(passage.passage_id for passage in passages),
        passages=tuple(texts),
        first_scores=tuple(score / (abs(max(scores.values())) or 1.0) for score in found),
        num_tokens=sum(query_tokens + count for count in passage_tokens),
    )


def _hard_negatives(
    query: Query, positive: Passage, candidates: Candidates, training: config.Training
) -> list[Passage]:
    """Hits of other documents that do not answer the query and score clearly below the positive; best first."""
    cosines = {passage.passage_id: cosine for passage, cosine in _with_cosines(candidates)}
    ceiling = (1 - training.negative_margin) * cosines[positive.passage_id]
    return [
        passage
        for passage in candidates.retrieved
        if _is_distractor(passage, query)
        and passage.document_id != positive.document_id
        and (not training.negative_margin or cosines[passage.passage_id] <= ceiling)
    ][: training.hard_negatives]


def joint_example(
    query: Query, passages: Sequence[Passage], chat: ChatText, settings: config.Config
) -> JointExample | Reject:
    """Make an example of both models: a query, its answer, and one prompt for each of `teaching.choose_candidates`."""
    if not query.answers or not passages:
        return Reject(query.query_id, "has no answer to learn" if passages else "has no passage to read", "row")
    answer = next(
        (each for each in query.answers if any(holds_answer(passage.text, [each]) for passage in passages)),
        query.answers[0],
    )
    prompted: list[GeneratorExample] = []
    for passage in passages:
        example = _example_with(query, [passage], None, answer, "with_gold", chat, settings)
        if isinstance(example, Reject):
            return example
        prompted.append(example)
    return JointExample(
        query_id=query.query_id,
        query=query.text,
        passage_ids=tuple(passage.passage_id for passage in passages),
        prompts=tuple(each.prompt for each in prompted),
        answer=answer,
        num_tokens=sum(each.num_tokens for each in prompted),
    )


def _with_cosines(candidates: Candidates) -> Iterable[tuple[Passage, float]]:
    yield from zip(candidates.gold, candidates.gold_cosines, strict=True)
    yield from zip(candidates.retrieved, candidates.retrieved_cosines, strict=True)


def _scaled(scores: Sequence[float]) -> list[float]:
    """Scale scores to 0..1, so that one temperature fits every teacher; the first score, of the positive, becomes 1.

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
    """Number of replay examples that make up this share of all examples.

    >>> replay_count(90, 0.1)
    10
    """
    return round(num_examples * share / (1 - share))
