"""Finds the passages that support an answer, from its citation marks or from its words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from ragtune_ray.answering.abstention import is_abstention
from ragtune_ray.index.words import tokens
from ragtune_ray.schema import Citation, Passage

UNSPACED_BLOCKS = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""A character of a script without spaces between words, by Unicode block, CJK punctuation included.

`chunking.UNSPACED_SCRIPTS` differs: letters by script, without punctuation, with Tibetan, Javanese and Balinese.
"""
SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s)|[。！？]["”’』」）]*|\n(?=\s*\n)""")
"""The end of a sentence or paragraph, for citing a sentence or shortening a passage.

`chunking` and `abstention` have patterns of their own: chunking handles more scripts and abbreviations, and a shared pattern
would change passages or abstentions.
"""
_SENTENCE_OR_LINE_END = re.compile(rf"{SENTENCE_END.pattern}|\n")
_MIN_ANSWER_CHARACTERS = 2
_NUMBERS = r"\d+(?:\s*(?:[,，、;；&]|[-–—~]|and)\s*\d+)*"
MARK = re.compile(rf"[\[【]\s*({_NUMBERS})\s*(?:†[^\]】\n]{{0,40}})?[\]】]")
"""A citation mark; its first group has the numbers."""
_RANGE = re.compile(r"(\d+)\s*[-–—~]\s*(\d+)")


def parse_citations(answer: str, passages: Sequence[Passage]) -> tuple[str, tuple[Citation, ...]]:
    """Remove the citation marks from an answer and return the passages that they name.

    Marks are [n], [n, m], [n][m], [n-m], 【n】 and 【n†source】. Numbers without a passage are removed too. But [1969] with five
    passages is part of the answer: a mark stays in the text if all its numbers have more than two digits and more digits than
    the number of passages.

    Returns:
        The answer without marks and with spacing and punctuation repaired; the citations in order of first mention.

    >>> parse_citations("Paris [1].", [])
    ('Paris.', ())
    """
    most_digits = max(2, len(str(len(passages))))
    cited: dict[int, None] = {}

    def remove(mark: re.Match[str]) -> str:
        if all(len(digits) > most_digits for digits in re.findall(r"\d+", mark[1])):
            return mark[0]
        cited.update(dict.fromkeys(_numbers(mark[1], len(passages))))
        return _replacement(mark.string, mark.start(), mark.end())

    text, before = answer, ""
    while text != before:  # repeat, because "[[1]2]" becomes "[2]"
        text, before = MARK.sub(remove, text), text
    if text != answer:
        text = _tidied(text)
    return text.strip(), tuple(_citation(passages[number - 1]) for number in cited)


def supporting_citations(answer: str, passages: Sequence[Passage], question: str = "") -> tuple[Citation, ...]:
    """Find the sentences that support an answer without citation marks, which small models rarely write.

    1. Cite the sentence of the best-ranked passage that contains the whole answer word for word.
    2. Otherwise, if `question` is not empty, cite for each sentence of the answer the passage sentence that shares most words
       with it. That sentence must contain all words of the answer's sentence that are not in the question and, together with
       the passage's title, at least half of the question's words. Stop words do not count.

    Returns:
        Citations with the offsets of sentences in their documents; empty if nothing supports the answer, it is an
        abstention, or it has fewer than two characters.

    >>> moon = Passage("m#0", "m", "It is far. Apollo 11 landed there in July 1969.", "", "{}", 0, 47)
    >>> supporting_citations("It was 1969.", [moon], "When did Apollo 11 land on the Moon?")
    (Citation(passage_id='m#0', document_id='m', start=11, end=47),)
    """
    answer_words = [word for word, _, _ in _words(answer)]
    if len(answer_words) > 1 and answer_words[0] in {"a", "an", "the"}:
        answer_words = answer_words[1:]
    if len("".join(answer_words)) < _MIN_ANSWER_CHARACTERS or is_abstention(answer):
        return ()
    for passage in passages:
        words = list(_words(passage.text))
        found = _index_of(answer_words, [word for word, _, _ in words])
        if found is not None:
            start, end = _sentence_around(passage.text, words[found][1], words[found + len(answer_words) - 1][2])
            return (_citation(passage, start, end),)
    return _cite_each_sentence(answer, passages, question) if question else ()


def _cite_each_sentence(answer: str, passages: Sequence[Passage], question: str) -> tuple[Citation, ...]:
    asked = _content_words(question)
    places = [(passage, *place) for passage in passages for place in _sentences(passage.text)]
    contents = [_content_words(passage.text[start:end]) for passage, start, end in places]
    titles = [_content_words(passage.title) for passage, _, _ in places]
    cited: dict[Citation, None] = {}
    for start, end in _sentences(answer):
        said = _content_words(answer[start:end])
        beyond = said - asked
        shared = [
            len((words | title) & (said | asked))
            if beyond <= words and 2 * len((words | title) & asked) >= len(asked)
            else 0
            for words, title in zip(contents, titles, strict=True)
        ]
        if beyond and any(shared):
            passage, first, last = places[shared.index(max(shared))]
            cited[_citation(passage, first, last)] = None
    return tuple(cited)


def _content_words(text: str) -> set[str]:
    """The words of a text as BM25 indexes them: without stop words."""
    return set(tokens([text], "en")[0])


def _sentences(text: str) -> list[tuple[int, int]]:
    """The (start, end) of each sentence, without surrounding whitespace."""
    ends = [found.end() for found in _SENTENCE_OR_LINE_END.finditer(text)]
    found = []
    for first, last in zip([0, *ends], [*ends, len(text)], strict=True):
        part = text[first:last]
        if part.strip():
            found.append((first + len(part) - len(part.lstrip()), first + len(part.rstrip())))
    return found


def _numbers(mark: str, num_passages: int) -> Iterator[int]:
    """The passage numbers of a mark, with ranges expanded, limited to 1..num_passages."""
    for part in re.split(r"[,，、;；&]|and", mark):
        numbers = _RANGE.search(part)
        low, high = sorted(map(int, numbers.groups())) if numbers else (int(part), int(part))
        yield from range(max(low, 1), min(high, num_passages) + 1)


def _replacement(text: str, start: int, end: int) -> str:
    """The replacement of a mark: a space if removing it would join two words, else nothing."""
    before, after = text[:start][-1:], text[end:][:1]
    joins = before.isalnum() and after.isalnum() and not (UNSPACED_BLOCKS.match(before) or UNSPACED_BLOCKS.match(after))
    return " " if joins else ""


def _tidied(text: str) -> str:
    # "([1])" leaves empty brackets; "(see [1])" does not.
    text = re.sub(r"\(\s*(?:[,;]+\s*)?\)|（\s*）", "", text)
    text = re.sub(r"(?<![ \t])[ \t]+(?=[,.;:!?)\]](?:\s|[.,;:!?)]|$)|[，。；：！？、）])", "", text)
    text = re.sub(r"(?<![.])([.。!?！？])[.。](?=\s|$)", r"\1", text)  # "Paris. [1]." leaves two full stops
    return re.sub(r"[ \t]{2,}", " ", text)


def _citation(passage: Passage, start: int = 0, end: int | None = None) -> Citation:
    stop = passage.end if end is None else passage.start + end
    return Citation(passage.passage_id, passage.document_id, passage.start + start, stop)


_WORD = re.compile(rf"{UNSPACED_BLOCKS.pattern}|(?:(?!{UNSPACED_BLOCKS.pattern})[^\W_])+")


def _words(text: str) -> Iterator[tuple[str, int, int]]:
    """The (normalized word, start, end) of each word; each character of an unspaced script is a word."""
    for found in _WORD.finditer(text):
        if any(character.isalnum() for character in found[0]):
            yield unicodedata.normalize("NFKC", found[0]).casefold(), found.start(), found.end()


def _index_of(sequence: list[str], words: list[str]) -> int | None:
    """Where the words contain a sequence of words; None if nowhere."""
    size = len(sequence)
    return next((at for at in range(len(words) - size + 1) if words[at : at + size] == sequence), None)


def _sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """The (start, end) of the sentence or sentences that contain text[start:end]."""
    breaks = [found.end() for found in _SENTENCE_OR_LINE_END.finditer(text)]
    first = max((at for at in breaks if at <= start), default=0)
    last = min((at for at in breaks if at >= end), default=len(text))
    first += len(text[first:start]) - len(text[first:start].lstrip())
    return first, first + len(text[first:last].rstrip())
