"""Finds what is wrong with a question before anybody answers it: it is trivial, gives its answer away, or lacks evidence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

import regex  # type: ignore[import-untyped]  # the library has no stubs
from rapidfuzz.distance import LCSseq

from ragtune_ray.answering.citations import UNSPACED_BLOCKS
from ragtune_ray.config import Language, Normalization
from ragtune_ray.config.evaluation import QuestionKind, Questions
from ragtune_ray.evaluation.metrics.answers import contains_answer
from ragtune_ray.evaluation.metrics.normalization import normalize_answer
from ragtune_ray.evaluation.questions.writing.drafts import Draft
from ragtune_ray.evaluation.questions.writing.evidence import cited
from ragtune_ray.schema import Citation, Passage

Reason = Literal[
    "request failed",
    "malformed reply",
    "not a question",
    "too short",
    "points at the passage",
    "yes or no",
    "copies the passage",
    "gives its answer away",
    "evidence is not in the passage",
    "evidence is from one passage",
    "answer is not in the passage",
    "answered without the passage",
    "not answered from the passage",
    "answered by other documents",
    "check failed",
    "duplicate",
    "near duplicate",
    "enough about its document",
    "documents are in different splits",
    "not needed",
]
"""Why a question is not kept, in the order in which the filters look."""
REASONS: tuple[Reason, ...] = get_args(Reason)

MIN_WORDS = 4
"""Of a question in a language with spaces."""
MIN_CHARACTERS = 6
"""Of any question, as Chinese ones are short."""
COPIED_SHARE = 0.8
"""A question copies a passage that contains this share of its tokens, in this order and close together."""
COPIED_SHARE_UNSPACED = 0.9
"""The same in scripts without spaces, where a token is a character, so that other questions overlap more."""
COPIED_WINDOW = 1.5
"""Close together: within so many times the question's length."""
GIVEN_SHARE = 0.8
"""An answer of several words is given away if this share of its words is in the question."""

_POINTS_AT_PASSAGE = re.compile(
    r"\b(?:this|the|that|given|above|provided|following) (?:\w+ )?(?:passage|text|article|document|paragraph|excerpt|context|"
    r"section|author|question)\b"
    r"|\b(?:according to|mentioned in|described in|stated in|based on) (?:the|this) (?:\w+ )?(?:passage|text|article|document|"
    r"paragraph|excerpt|context|section|above)\b"
    r"|\bpassage \d|\bpassages?\?"
    r"|\b(?:laut|gemäß|in|aus) (?:dem|der|diesem|dieser|den) (?:\w+ )?(?:text|textes|passage|abschnitt|artikel|dokument|absatz)\b"
    r"|\b(?:diese[rms]?|de[rm]) (?:text|passage|abschnitt|artikel|absatz)\b"
    r"|\b(?:selon|d'après|dans) (?:le|ce|cet|la) (?:texte|passage|article|document|paragraphe|extrait)\b"
    r"|\b(?:según|en) (?:el|este) (?:texto|pasaje|artículo|documento|párrafo|fragmento)\b"
    r"|(?:这|本|该|上述|以上|根据|據)(?:段|篇|个|些)?(?:文章|段落|短文|文本|文字|课文|材料|文档|篇|段)|文中|本文|作者认为",
    re.IGNORECASE,
)
_QUESTION_END = ("?", "？", "؟", ";")
_QUESTION_WITHOUT_MARK = regex.compile(r"か。?$|[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|՞")
_YES_NO = frozenset(
    [
        "yes",
        "no",
        "true",
        "false",
        "ja",
        "nein",
        "doch",
        "oui",
        "non",
        "si",
        "sí",
        "sim",
        "não",
        "да",
        "нет",
        "是",
        "否",
        "是的",
        "不是",
        "对",
        "不",
        "不对",
        "有",
        "没有",
        "会",
        "不会",
        "可以",
        "不可以",
    ]
)
_YES_NO_QUESTION = re.compile(
    r"^(?:is|are|was|were|do|does|did|can|could|will|would|has|have|had|should|may|might)\b(?!.*\bor\b)|.*[吗嗎][?？]$",
    re.IGNORECASE | re.DOTALL,
)


def form_problem(text: str) -> Reason | None:
    """Why a text is no self-contained question; None if it is one.

    >>> form_problem("What does the passage say about Mars?"), form_problem("Why?"), form_problem("Who walked on the Moon first?")
    ('points at the passage', 'too short', None)
    """
    plain = text.strip()
    if not asks(plain) or "\n" in plain:
        return "not a question"
    if len(plain) < MIN_CHARACTERS or (_is_spaced(plain) and len(plain.split()) < MIN_WORDS):
        return "too short"
    return "points at the passage" if _POINTS_AT_PASSAGE.search(plain) else None


def asks(text: str) -> bool:
    """Whether a text ends as a question does. Thai, Lao, Khmer and Burmese have no mark for that, and Japanese may do without.

    >>> [asks(text) for text in ("Who?", "He did.", "何年に完成しましたか。", "หอไอเฟลสูงกี่เมตร")]
    [True, False, True, True]
    """
    return text.endswith(_QUESTION_END) or bool(_QUESTION_WITHOUT_MARK.search(text))


def _is_spaced(text: str) -> bool:
    return UNSPACED_BLOCKS.search(text) is None


def is_yes_no(question: str, answer: str) -> bool:
    """Whether a question asks for yes or no, by its answer or its form.

    >>> is_yes_no("Is the Moon a planet?", "It is not."), is_yes_no("Is it made of iron or of ice?", "Ice")
    (True, False)
    """
    word = re.split(r"[\s,.;:!。，！]", answer.strip().casefold(), maxsplit=1)[0]
    return word in _YES_NO or bool(_YES_NO_QUESTION.match(question.strip()))


def copies(question: str, passages: Sequence[Passage], language: Language, normalization: Normalization) -> bool:
    """Whether a question is a sentence of a passage with a question mark, or with a gap in place of the answer."""
    tokens = normalize_answer(question, language, normalization).split()
    if len(tokens) < MIN_WORDS:
        return False
    width = max(len(tokens), round(COPIED_WINDOW * len(tokens)))
    share = COPIED_SHARE if _is_spaced(question) else COPIED_SHARE_UNSPACED
    for passage in passages:
        text = normalize_answer(passage.text, language, normalization).split()
        starts = range(0, max(1, len(text) - width + 1), max(1, len(tokens) // 4))
        windows = (text[start : start + width] for start in (*starts, max(0, len(text) - width)))
        if any(LCSseq.similarity(tokens, window) >= share * len(tokens) for window in windows):
            return True
    return False


def gives_away(
    question: str, answer: str, kind: QuestionKind, language: Language, normalization: Normalization
) -> bool:
    """Whether a question contains its answer. The answer to a comparison may be one of the two that it names.

    >>> gives_away("Which rocket, the Saturn V, flew to the Moon?", "Saturn V", "fact", "en", "strict")
    True
    """
    tokens = normalize_answer(answer, language, normalization).split()
    asked = set(normalize_answer(question, language, normalization).split())
    if kind != "comparison" and contains_answer(question, [answer], language, normalization):
        return True
    if kind == "comparison" and len(tokens) <= MIN_WORDS:
        return False
    return len(tokens) > 1 and sum(token in asked for token in tokens) >= GIVEN_SHARE * len(tokens)


def plain_problem(question: str, passage: Passage, language: Language, normalization: Normalization) -> Reason | None:
    """Why a question that came without an answer is thrown out; None if it is not.

    >>> moon = Passage("moon#0", "moon", "Apollo 11 landed on the Moon in July 1969.", "", "{}", 0, 42)
    >>> plain_problem("Apollo 11 landed on the Moon?", moon, "en", "strict")
    'copies the passage'
    """
    problem = form_problem(question)
    if problem or not copies(question, [passage], language, normalization):
        return problem
    return "copies the passage"


def draft_problem(
    draft: Draft,
    kind: QuestionKind,
    passages: Sequence[Passage],
    settings: Questions,
    language: Language,
    normalization: Normalization,
) -> Reason | None:
    """Why a draft is thrown out before anybody answers it; None if it passes.

    Args:
        draft: what the generator wrote.
        kind: what it was asked for.
        passages: what it was shown.
        settings: the section `questions`.
        language: of questions and answers.
        normalization: `evaluate.normalization`.
    """
    for text in filter(None, (draft.full_question, *(each.content for each in draft.messages[:1]))):
        if problem := form_problem(text):
            return problem
    if not asks(draft.question):
        return "not a question"
    question, answer = draft.full_question, draft.answer
    if not settings.yes_no and is_yes_no(question, answer):
        return "yes or no"
    if copies(question, passages, language, normalization):
        return "copies the passage"
    if kind == "unanswerable":
        return None
    before = " ".join([draft.question, question, *(each.content for each in draft.messages)])
    if gives_away(before if kind == "follow_up" else question, answer, kind, language, normalization):
        return "gives its answer away"
    return _evidence_problem(draft, kind, passages, language, normalization)


def _evidence_problem(
    draft: Draft,
    kind: QuestionKind,
    passages: Sequence[Passage],
    language: Language,
    normalization: Normalization,
) -> Reason | None:
    spans = cited(draft.evidence, passages)
    if spans is None:
        return "evidence is not in the passage"
    if kind == "comparison" and len({span.document_id for span in spans}) < len(passages):
        return "evidence is from one passage"
    if kind in ("fact", "follow_up"):
        texts = "\n".join(passage.text for passage in passages)
        if not contains_answer(texts, [draft.answer], language, normalization):
            return "answer is not in the passage"
    return None


def spans_of(draft: Draft, passages: Sequence[Passage]) -> tuple[Citation, ...]:
    """The places of the evidence in the documents, for a draft that passed `draft_problem`."""
    return cited(draft.evidence, passages) or ()
