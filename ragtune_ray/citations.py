"""Which passages an answer rests on: by its citation marks, or by the passage that holds it.

In: an answer and the passages of its prompt. Out: citations with offsets in their documents. This module knows nothing
of models or prompts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from ragtune_ray.abstention import is_abstention
from ragtune_ray.schema import Citation, Passage

__all__ = ["MARK", "SENTENCE_END", "UNSPACED", "parse_citations", "supporting_citations"]

UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""One character of a script that puts no spaces between words."""
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


def supporting_citations(answer: str, passages: Sequence[Passage]) -> tuple[Citation, ...]:
    """The evidence of an answer without marks: the sentence of the best passage that holds the whole answer.

    Compared word by word, whatever the case, width and punctuation; character by character where a script has no
    spaces; a leading article does not count.

    Returns:
        At most one citation, `start` and `end` of that sentence in the document. None when no passage holds the
        answer, or the answer is an abstention or shorter than two characters.
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
    return ()


def _numbers(mark: str, num_passages: int) -> Iterator[int]:
    """The passage numbers of a mark, ranges spelled out, those outside 1..num_passages left out."""
    for part in re.split(r"[,，、;；&]|and", mark):
        span = _RANGE.search(part)
        low, high = sorted(map(int, span.groups())) if span else (int(part), int(part))
        yield from range(max(low, 1), min(high, num_passages) + 1)


def _gap(text: str, start: int, end: int) -> str:
    """What stands in place of a mark: a space if it would join two words."""
    before, after = text[:start][-1:], text[end:][:1]
    joins = before.isalnum() and after.isalnum() and not (UNSPACED.match(before) or UNSPACED.match(after))
    return " " if joins else ""


def _tidied(text: str) -> str:
    text = re.sub(r"\(\s*[,;]*\s*\)|（\s*）", "", text)  # the brackets of "(see [1])" stay, those of "([1])" do not
    text = re.sub(r"[ \t]+(?=[,.;:!?)\]](?:\s|[.,;:!?)]|$)|[，。；：！？、）])", "", text)
    text = re.sub(r"(?<![.])([.。!?！？])[.。](?=\s|$)", r"\1", text)  # "Paris. [1]." leaves two stops
    return re.sub(r"[ \t]{2,}", " ", text)


def _citation(passage: Passage, start: int = 0, end: int | None = None) -> Citation:
    stop = passage.end if end is None else passage.start + end
    return Citation(passage.passage_id, passage.document_id, passage.start + start, stop)


_WORD = re.compile(rf"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})[^\W_])+")


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
