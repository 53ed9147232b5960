"""Which passages an answer rests on: by its citation marks, or by the passage that holds it.

In: an answer and the passages of its prompt. Out: citations with offsets in their documents. This module knows nothing
of models or prompts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from ragtune_ray.answering.abstention import is_abstention
from ragtune_ray.index.words import tokens
from ragtune_ray.schema import Citation, Passage

__all__ = ["MARK", "SENTENCE_END", "UNSPACED_BLOCKS", "parse_citations", "supporting_citations"]

UNSPACED_BLOCKS = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""One character of a Unicode block of a script without spaces between words, CJK punctuation included.

`chunking.UNSPACED_SCRIPTS` is another set: letters by script, without punctuation, with Tibetan, Javanese and Balinese.
"""
SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s)|[。！？]["”’』」）]*|\n(?=\s*\n)""")
"""The end of a sentence, or of a paragraph."""
_MIN_ANSWER_CHARACTERS = 2
_NUMBERS = r"\d+(?:\s*(?:[,，、;；&]|[-–—~]|and)\s*\d+)*"
MARK = re.compile(rf"[\[【]\s*({_NUMBERS})\s*(?:†[^\]】\n]{{0,40}})?[\]】]")
"""A citation mark; its first group holds the numbers."""
_RANGE = re.compile(r"(\d+)\s*[-–—~]\s*(\d+)")


def parse_citations(answer: str, passages: Sequence[Passage]) -> tuple[str, tuple[Citation, ...]]:
    """Take the citation marks out of an answer.

    Marks are [n], [n, m], [n][m], [n-m], 【n】 and 【n†source】. Numbers that name no passage are dropped with their mark.
    A mark whose numbers all have more digits than a citation could ([1969] with five passages: more than two digits, or
    than the number of passages has) is part of the answer and stays.

    Args:
        answer: the generated text.
        passages: those of the prompt, as shown.

    Returns:
        The answer without marks and tidied; the citations in order of first mention, each once.

    >>> parse_citations("Paris [1].", [])
    ('Paris.', ())
    """
    most_digits = max(2, len(str(len(passages))))
    cited: dict[int, None] = {}

    def taken(mark: re.Match[str]) -> str:
        if all(len(digits) > most_digits for digits in re.findall(r"\d+", mark[1])):
            return mark[0]
        cited.update(dict.fromkeys(_numbers(mark[1], len(passages))))
        return _gap(mark.string, mark.start(), mark.end())

    text, before = answer, ""
    while text != before:  # again, since "[[1]2]" leaves "[2]"
        text, before = MARK.sub(taken, text), text
    if text != answer:
        text = _tidied(text)
    return text.strip(), tuple(_citation(passages[number - 1]) for number in cited)


def supporting_citations(answer: str, passages: Sequence[Passage], question: str = "") -> tuple[Citation, ...]:
    """The sentences that hold an answer, for answers without marks: small models rarely write any.

    First, word for word: the best-ranked passage that holds the whole answer. Failing that, sentence by sentence of the
    answer: what it says beyond the question, stop words apart, must stand in one sentence of a passage, which with its title
    must hold half of the question's words too; of several such sentences, that which shares most words is cited.

    Args:
        answer: without marks.
        passages: those of the prompt, best first.
        question: what was asked; empty leaves only the first rule.

    Returns:
        Citations whose offsets are those of a sentence in its document; empty when nothing supports the answer, it is an
        abstention, or it is shorter than two characters.

    >>> moon = Passage("m#0", "m", "It is far. Apollo 11 landed there in July 1969.", "", "{}", 0, 47)
    >>> supporting_citations("It was 1969.", [moon], "When did Apollo 11 land on the Moon?")
    (Citation(passage_id='m#0', document_id='m', start=11, end=47),)
    """
    wanted = [word for word, _, _ in _words(answer)]
    if len(wanted) > 1 and wanted[0] in {"a", "an", "the"}:
        wanted = wanted[1:]
    if len("".join(wanted)) < _MIN_ANSWER_CHARACTERS or is_abstention(answer):
        return ()
    for passage in passages:
        words = list(_words(passage.text))
        found = _find(wanted, [word for word, _, _ in words])
        if found is not None:
            start, end = _sentence(passage.text, words[found][1], words[found + len(wanted) - 1][2])
            return (_citation(passage, start, end),)
    return _sentence_by_sentence(answer, passages, question) if question else ()


def _sentence_by_sentence(answer: str, passages: Sequence[Passage], question: str) -> tuple[Citation, ...]:
    asked = _content(question)
    places = [(passage, *place) for passage in passages for place in _sentences(passage.text)]
    contents = [_content(passage.text[start:end]) for passage, start, end in places]
    titles = [_content(passage.title) for passage, _, _ in places]
    cited: dict[Citation, None] = {}
    for start, end in _sentences(answer):
        said = _content(answer[start:end])
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


def _content(text: str) -> set[str]:
    """The words of a text that carry meaning, as BM25 sees them."""
    return set(tokens([text], "en")[0])


def _sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text start and end, outer whitespace left out."""
    ends = [found.end() for found in re.finditer(rf"{SENTENCE_END.pattern}|\n", text)]
    found = []
    for first, last in zip([0, *ends], [*ends, len(text)], strict=True):
        part = text[first:last]
        if part.strip():
            found.append((first + len(part) - len(part.lstrip()), first + len(part.rstrip())))
    return found


def _numbers(mark: str, num_passages: int) -> Iterator[int]:
    """The passage numbers of a mark, ranges spelled out, those outside 1..num_passages left out."""
    for part in re.split(r"[,，、;；&]|and", mark):
        span = _RANGE.search(part)
        low, high = sorted(map(int, span.groups())) if span else (int(part), int(part))
        yield from range(max(low, 1), min(high, num_passages) + 1)


def _gap(text: str, start: int, end: int) -> str:
    """What stands in place of a mark: a space if it would join two words."""
    before, after = text[:start][-1:], text[end:][:1]
    joins = before.isalnum() and after.isalnum() and not (UNSPACED_BLOCKS.match(before) or UNSPACED_BLOCKS.match(after))
    return " " if joins else ""


def _tidied(text: str) -> str:
    text = re.sub(
        r"\(\s*(?:[,;]+\s*)?\)|（\s*）", "", text
    )  # the brackets of "(see [1])" stay, those of "([1])" do not
    text = re.sub(r"(?<![ \t])[ \t]+(?=[,.;:!?)\]](?:\s|[.,;:!?)]|$)|[，。；：！？、）])", "", text)
    text = re.sub(r"(?<![.])([.。!?！？])[.。](?=\s|$)", r"\1", text)  # "Paris. [1]." leaves two stops
    return re.sub(r"[ \t]{2,}", " ", text)


def _citation(passage: Passage, start: int = 0, end: int | None = None) -> Citation:
    stop = passage.end if end is None else passage.start + end
    return Citation(passage.passage_id, passage.document_id, passage.start + start, stop)


_WORD = re.compile(rf"{UNSPACED_BLOCKS.pattern}|(?:(?!{UNSPACED_BLOCKS.pattern})[^\W_])+")


def _words(text: str) -> Iterator[tuple[str, int, int]]:
    """(normalised word, start, end); a character of an unspaced script is a word."""
    for found in _WORD.finditer(text):
        if any(character.isalnum() for character in found[0]):
            yield unicodedata.normalize("NFKC", found[0]).casefold(), found.start(), found.end()


def _find(wanted: list[str], words: list[str]) -> int | None:
    size = len(wanted)
    return next((at for at in range(len(words) - size + 1) if words[at : at + size] == wanted), None)


def _sentence(text: str, start: int, end: int) -> tuple[int, int]:
    """The sentence, or sentences, that hold text[start:end]."""
    breaks = [found.end() for found in re.finditer(rf"{SENTENCE_END.pattern}|\n", text)]
    first = max((at for at in breaks if at <= start), default=0)
    last = min((at for at in breaks if at >= end), default=len(text))
    first += len(text[first:start]) - len(text[first:start].lstrip())
    return first, first + len(text[first:last].rstrip())
