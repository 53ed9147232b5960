"""What a gold answer is like: yes or no, a number, a date, a short phrase, a list, a sentence or longer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from ragtune_ray.config import Language
from ragtune_ray.evaluation.metrics.numbers import as_number
from ragtune_ray.ingest.chunking import word_spans
from ragtune_ray.ingest.survey import LONG_ANSWER_WORDS
from ragtune_ray.schema import Query

AnswerKind: TypeAlias = Literal[
    "none known", "unanswerable", "yes or no", "number", "date", "short phrase", "list", "sentence", "long"
]
KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)
EXTRACTIVE: frozenset[AnswerKind] = frozenset({"number", "date", "short phrase"})
"""Kinds whose words a document should contain."""
IN_SENTENCES: frozenset[AnswerKind] = frozenset({"list", "sentence", "long"})
"""Kinds that can be worded in many ways."""
SENTENCE_WORDS, PHRASE_WORDS = 40, 5
"""A longer answer is long; one of up to so many words is a phrase even if it ends like a sentence. In scripts without spaces
characters count, and twice as many are allowed."""

_YES = "yes true ja oui sí si sì sim jo tak ano kyllä igen evet da да так ναι نعم כן हाँ 是 是的 有 はい 네 có ya"
_NO = "no false nein non não nee nej nei nie ne ei nem hayır nu нет ні όχι لا לא नहीं 否 不是 没有 いいえ 아니요 không tidak"
_YES_NO = frozenset((*_YES.split(), *_NO.split()))
_ENGLISH_MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
_MONTHS = (
    "januar|jänner|februar|märz|mai|juni|juli|oktober|dezember|janvier|février|mars|avril|juin|juillet|août|septembre|octobre|"
    "novembre|décembre|enero|febrero|marzo|abril|mayo|junio|julio|agosto|septiembre|octubre|noviembre|diciembre|janeiro|"
    "fevereiro|março|maio|junho|julho|setembro|outubro|novembro|dezembro|gennaio|febbraio|aprile|maggio|giugno|luglio|settembre|"
    "ottobre|dicembre"
)
_SHORT_MONTHS = "jan|feb|fév|mar|mär|apr|avr|abr|jun|jul|juil|aug|aoû|ago|sep|sept|oct|okt|out|nov|dec|dez|déc|dic"
_MONTH = rf"(?:(?:{_ENGLISH_MONTHS}|{_MONTHS}|{_SHORT_MONTHS})(?!\w)\.?)"
_DATE = re.compile(
    rf"(?:on |am |le |the )?(?:\d{{4}}-\d\d?-\d\d?|\d\d?[./-]\d\d?[./-]\d{{2,4}}|\d{{4}}年(?:\d\d?月)?(?:\d\d?日)?"
    rf"|(?:\d\d?(?:st|nd|rd|th|er|\.)?(?: of| de)? )?{_MONTH}(?: \d\d?(?:st|nd|rd|th)?)?,?(?: de)?(?: \d{{4}})?)[.]?",
    re.IGNORECASE,
)
_DIGIT = re.compile(r"\d")
_WHOLE_MONTH = re.compile(_ENGLISH_MONTHS, re.IGNORECASE)
_ASCII_WORD = re.compile(r"[^\W_]+")
_ITEM = re.compile(r"^\s*(?:[-*•·–]|\(?\d{1,2}[.)])\s+\S", re.MULTILINE)
_PARTS = re.compile(r"[,;，、；]\s*|\n+|\s(?:and|or|und|oder|et|ou|y|o|e)\s")
_SENTENCE_END = re.compile(r"[.!?。！？।؟][\"'”’)\]]*\s*$")


def num_words(texts: Sequence[str]) -> list[int]:
    """Words of each text, or characters in scripts without spaces; punctuation does not count.

    >>> num_words(["It is red, not blue.", "红色的"])
    [5, 3]
    """
    return [_num_words(text) for text in texts]


def _num_words(text: str) -> int:
    if text.isascii():  # the same, and faster
        return len(_ASCII_WORD.findall(text))
    (spans,) = word_spans([text])
    return sum(any(map(str.isalnum, text[start:end])) for start, end in spans.tolist())


def kind_of(query: Query, language: Language) -> AnswerKind:
    """The kind of a question by its shortest gold answer, since any suffices.

    >>> kind_of(Query("q", "?", ("4.5 million", "about four and a half million people"), (), (), "all"), "en")
    'number'
    """
    if query.answers is None:
        return "none known"
    if not query.answers:
        return "unanswerable"
    return kind_of_answer(min(query.answers, key=len), language)


def kind_of_answer(text: str, language: Language) -> AnswerKind:
    """The kind of one gold answer.

    >>> [kind_of_answer(text, "en") for text in ("Yes.", "12 May 1945", "the far side", "red, green and blue")]
    ['yes or no', 'date', 'short phrase', 'list']
    >>> kind_of_answer("Drive to the gate, type in the code, and ask for Ann.", "en")
    'sentence'
    """
    text = text.strip()
    if text.casefold().rstrip(".!。") in _YES_NO:
        return "yes or no"
    # Without a number, only a whole English month: Mars and out are other words, too.
    if len(text) <= 60 and _DATE.fullmatch(text) and (_DIGIT.search(text) or _WHOLE_MONTH.fullmatch(text)):
        return "date"
    if len(text) <= 80 and as_number(text, language):
        return "number"
    words = _num_words(text)
    wide = 2 if words > len(text.split()) * 2 else 1
    if _is_list(text):
        return "list"
    if words > SENTENCE_WORDS * wide:
        return "long"
    is_phrase = words <= PHRASE_WORDS * wide or (words <= LONG_ANSWER_WORDS * wide and not _SENTENCE_END.search(text))
    return "short phrase" if is_phrase else "sentence"


def _is_list(text: str) -> bool:
    """Whether a text is lines that begin like items, or at least three short parts between commas without a sentence's end."""
    if len(_ITEM.findall(text)) > 1:
        return True
    if _SENTENCE_END.search(text):
        return False
    parts = [part for part in _PARTS.split(text) if part.strip()]
    return len(parts) > 2 and all(len(part.split()) <= 4 and len(part) <= 40 for part in parts)
