"""Finds the passages that support an answer, from its citation marks or from its words."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence

from ragtune_ray.answering.abstention import is_abstention
from ragtune_ray.index.words import tokens, visible
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
_JOINED = r"(?:[,，、;；&](?:\s*+(?:and|&))?|[-–—~－～]|and|und|et|y|和|与|及)"
_NUMBERS = rf"\d{{1,6}}(?:\s*+{_JOINED}\s*+\d{{1,6}})*"
MARK = re.compile(rf"[\[【［]\s*({_NUMBERS})\s*(?:†[^\]】］\n]{{0,40}})?[\]】］]")
"""A citation mark, or text that looks like one; its first group has the numbers. `parse_citations` says which are marks."""
_SPAN = re.compile(r"(\d+)(?:\s*[-–—~－～]\s*(\d+))?")
_MARKS = rf"(?:[ \t]*{MARK.pattern})*"
_CITED_SENTENCE_END = re.compile(
    rf"""[.!?]["'”’)\]]*{_MARKS}(?=\s|\Z)|[。！？]["”’』」）]*{_MARKS}|\n(?:{_MARKS}(?=\s|\Z))?"""
)
"""As `_SENTENCE_OR_LINE_END`, in a text with marks: those that follow belong to the sentence before them."""
_UNFINISHED_MARK = re.compile(r"\s*[\[【［][\d\s,，、;；&–—~－～-]{0,40}$")
_REMOVED = "\x00"  # replaces a removed mark until the spaces around it are repaired

# A bracket after "=" or "f(" is a list, and one of two numbers before a unit is an interval.
_BEFORE_A_LIST = re.compile(r"(?:[=∈]\s*|\w\(\s*)$")
_UNIT = re.compile(r"\s?(?:[kmcµμn]?(?:g|m|l|s|mol|Hz|V|W|Pa)|[kKMG]i?B|dl|dL|mL|ppm|min|h|d|°C?|%|‰|€)(?![\w'’])")
_WORD_BEFORE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")
_PLAIN_NAME = re.compile(r"[A-Z][a-z]+")
# Shorter words, such as arr or data, are often names in code, and so is what follows an operator or a dot.
_LONG_WORD = re.compile(r"(?<![=+*/%<>]\s)(?<![\w.=+*/%<>])[A-Za-z][a-z]{4,}$")
_REMARK = re.compile(r"(?<!\w)\([^()\n]*\)$")  # "(1969)", but not "f(x)"
_CLAUSE_END = re.compile(rf"(?:{MARK.pattern})*(?:[.,;:](?!\w)|\s*\Z)")
_FENCE = re.compile(r"(?m)^[ \t]{0,3}(`{3,}|~{3,})([^\n]*)\n")
_TICKS = re.compile(r"(?<![`\w])`+|(?<=\w)`+(?=[^\w`])|(?<=\w)``+")
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")


def code_spans(text: str) -> list[tuple[int, int]]:
    """The (start, end) of each block of code and inline code of a Markdown text, in order.

    A block without an end reaches to the end of the text, as in Markdown. Inline code must end in the paragraph where it begins.

    >>> code_spans("Use `arr[0]` now.")
    [(4, 12)]
    """
    return [(start, end) for start, end in _code(text) if end is not None]


def open_code(text: str) -> int:
    """Where code may begin that only later text would end; the length of the text if there is no such place."""
    unended = re.search(r"(?m)^[ \t]{0,3}~+[^\n]*\Z", text)  # a block's first line, if a line break follows
    starts = [start for start, end in _code(text) if end is None]
    return min([*starts[:1], unended.start() if unended else len(text)])


def _code(text: str) -> Iterator[tuple[int, int | None]]:
    """The (start, end) of code; end is None where inline code would begin, but neither it nor its paragraph has ended."""
    at = 0
    while at < len(text):
        fence = _FENCE.search(text, at)
        while fence and "`" in fence[1] and "`" in fence[2]:  # a line with inline code
            fence = _FENCE.search(text, fence.end())
        ticks = _TICKS.search(text, at, fence.start() if fence else len(text))
        if ticks:
            paragraph = _PARAGRAPH_END.search(text, ticks.end())
            stop = min(fence.start() if fence else len(text), paragraph.start() if paragraph else len(text))
            closing = re.compile(rf"(?<!`){ticks[0]}(?!`)").search(text, ticks.end(), stop)
            at = closing.end() if closing else ticks.end()
            if closing or stop == len(text):
                yield ticks.start(), closing.end() if closing else None
        elif fence:
            last_line = re.compile(rf"(?m)^[ \t]{{0,3}}{fence[1][0]}{{{len(fence[1])},}}[ \t]*$")
            closing = last_line.search(text, fence.end())
            at = closing.end() if closing else len(text)
            yield fence.start(), at
        else:
            return


def without_unfinished_mark(text: str) -> str:
    """A cut text without the beginning of a citation mark at its end.

    >>> without_unfinished_mark("Paris [1] is large [2, ")
    'Paris [1] is large'
    """
    return _UNFINISHED_MARK.sub("", text)


def finished_sentences(text: str) -> str:
    """The start of a cut text up to the end of its last whole sentence; empty if none is whole.

    >>> finished_sentences("It is far. It was reached in 19")
    'It is far.'
    """
    ends = [found.end() for found in _SENTENCE_OR_LINE_END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else ""


def parse_citations(answer: str, passages: Sequence[Passage]) -> tuple[str, tuple[Citation, ...]]:
    """Remove the citation marks from an answer and return the passages that they name.

    Marks are [n], [n, m, and k], [n][m], [n-m], 【n】, ［n］ and 【n†source】. Numbers without a passage are removed too. The
    following are part of the answer:

    - [1969] with five passages: all numbers have more than two digits and more digits than the number of passages;
    - what stands in code, or in `x = [1, 2]`;
    - lists and ranges that contain 0, and intervals before a unit: [0, 1], [1-2] mg;
    - what follows `)` or an identifier: f(x)[1], arr[1]. A word right before [1] is not an identifier if it is a name such as
      Paris, or if a passage contains it and does not index or call it. At the end of a clause, as in "(1969)[1]." and
      "discovered[1].", a remark in brackets and a longer word are none either, if there is a passage with that number.

    Returns:
        The answer without marks and with the spaces around them repaired; the citations in order of first mention.

    >>> parse_citations("Paris [1].", [])
    ('Paris.', ())
    >>> parse_citations("x = arr[0] + arr[1]", [])
    ('x = arr[0] + arr[1]', ())
    """
    cited: dict[int, None] = {}
    text, before = answer.replace(_REMOVED, ""), ""
    while text != before:  # repeat, because "[[1]2]" becomes "[2]"
        text, before = _tidied(_marks_removed(text, passages, cited)), text
    return text.strip(), tuple(_citation(passages[number - 1]) for number in cited)


def citations_by_sentence(answer: str, passages: Sequence[Passage]) -> tuple[tuple[str, ...], ...] | None:
    """For each sentence of an answer with marks, as `sentences` splits it without them, the passages that its marks name.

    A mark after the end of a sentence belongs to that sentence.

    Args:
        answer: as the generator wrote it.
        passages: in the prompt.

    Returns:
        The ids of the passages; None if the answer has no marks, or they cannot be told apart by sentence.

    >>> one, two = (Passage(f"m#{number}", "m", "", "", "{}", 0, 0) for number in (0, 1))
    >>> citations_by_sentence("It is far [1]. It is old. [2] So what?", [one, two])
    (('m#0',), ('m#1',), ())
    """
    found: list[tuple[str, ...]] = []
    ends = [end.end() for end in _CITED_SENTENCE_END.finditer(answer)]
    for start, end in zip([0, *ends], [*ends, len(answer)], strict=True):
        text, citations = parse_citations(answer[start:end], passages)
        names = tuple(citation.passage_id for citation in citations)
        if text:
            found.append(names)
        elif found:  # marks on a line of their own
            found[-1] = tuple(dict.fromkeys(found[-1] + names))
    whole, _ = parse_citations(answer, passages)
    return tuple(found) if any(found) and len(found) == len(sentences(whole)) else None


def _marks_removed(text: str, passages: Sequence[Passage], cited: dict[int, None]) -> str:
    """The text with `_REMOVED` for each mark; the passages that the marks name are added to `cited`."""
    code = code_spans(text)
    parts, done, kept = [], 0, -1
    for mark in MARK.finditer(text):
        while code and code[0][1] <= mark.start():
            code = code[1:]
        in_code = bool(code) and code[0][0] <= mark.start()
        # A bracket right after one that stays is another index: arr[0][1].
        if in_code or mark.start() == kept or not _is_mark(mark, passages):
            kept = mark.end()
            continue
        cited.update(dict.fromkeys(_numbers(mark[1], len(passages))))
        parts += [text[done : mark.start()], _REMOVED]
        done = mark.end()
    return "".join([*parts, text[done:]])


def _is_mark(found: re.Match[str], passages: Sequence[Passage]) -> bool:
    """Whether a bracket outside of code is a mark, by the rules of `parse_citations`."""
    text, start, numbers = found.string, found.start(), re.findall(r"\d+", found[1])
    most_digits = max(2, len(str(len(passages))))
    if all(len(digits) > most_digits for digits in numbers):
        return False
    if len(numbers) > 1 and any(int(digits) == 0 for digits in numbers):
        return False
    if found[0][0] != "[" or "†" in found[0]:
        return True
    before = text[max(0, start - 80) : start]
    if _BEFORE_A_LIST.search(before) or (len(numbers) > 1 and _UNIT.match(text, found.end())):
        return False
    exists = all(1 <= int(digits) <= len(passages) for digits in numbers)
    ends_clause = exists and _CLAUSE_END.match(text, found.end()) is not None
    if before.endswith(")"):
        return ends_clause and _REMARK.search(text[max(0, start - 300) : start]) is not None
    word = _WORD_BEFORE.search(before)
    looks_so = ends_clause and _LONG_WORD.search(before) is not None
    return word is None or _is_prose(word[0], text[: found.end()], passages, looks_so=looks_so)


def _is_prose(word: str, text: str, passages: Sequence[Passage], *, looks_so: bool) -> bool:
    """Whether the word right before the bracket at the end of the text is no identifier; see `parse_citations`."""
    if _PLAIN_NAME.fullmatch(word):
        return True
    if f"{word}[0" in text:
        return False
    if any(word.lower() in _prose_words(passage.text) for passage in passages):
        return True
    return looks_so and not any(word.lower() in _code_words(passage.text) for passage in passages)


@functools.lru_cache(maxsize=256)
def _prose_words(text: str) -> frozenset[str]:
    """The words of a passage, in lower case, without those that are indexed or called."""
    return frozenset(re.findall(r"[a-z]{2,}", text.lower())) - _code_words(text)


@functools.lru_cache(maxsize=256)
def _code_words(text: str) -> frozenset[str]:
    """The words of a passage, in lower case, that are indexed or called: arr[0], f(x)."""
    return frozenset(word.lower() for word in re.findall(r"(\w+)[\[(]", text))


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
    places = [(passage, *place) for passage in passages for place in sentences(passage.text)]
    contents = [_content_words(passage.text[start:end]) for passage, start, end in places]
    titles = [_content_words(passage.title) for passage, _, _ in places]
    cited: dict[Citation, None] = {}
    for start, end in sentences(answer):
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
    return set(tokens([text], "en-folded")[0])


def sentences(text: str) -> list[tuple[int, int]]:
    """The (start, end) of each sentence or line, without surrounding whitespace.

    >>> sentences("It is far. Apollo went.")
    [(0, 10), (11, 23)]
    """
    ends = [found.end() for found in _SENTENCE_OR_LINE_END.finditer(text)]
    found = []
    for first, last in zip([0, *ends], [*ends, len(text)], strict=True):
        part = text[first:last]
        if part.strip():
            found.append((first + len(part) - len(part.lstrip()), first + len(part.rstrip())))
    return found


def _numbers(mark: str, num_passages: int) -> Iterator[int]:
    """The passage numbers of a mark, with ranges expanded, limited to 1..num_passages."""
    for first, last in _SPAN.findall(mark):
        low, high = sorted((int(first), int(last or first)))
        yield from range(max(low, 1), min(high, num_passages) + 1)


_EMPTY_BRACKETS = re.compile(rf"\([\s,;]*{_REMOVED}[\s,;{_REMOVED}]*\)|（\s*{_REMOVED}[\s，、；{_REMOVED}]*）")
_REPEATED_STOP = re.compile(rf"(?<![.])([.。!?！？])[ \t]*{_REMOVED}[ \t{_REMOVED}]*[.。](?=\s|$)")
_GAP = re.compile(rf"([ \t]*){_REMOVED}(?:[ \t]*[,;，、；]?[ \t]*{_REMOVED})*([ \t]*)")
_CLOSING = re.compile(r"[,.;:!?)\]](?:\s|[.,;:!?)]|$)|[，。；：！？、）]|\n|$")


def _tidied(text: str) -> str:
    """The text without `_REMOVED`, and with the spaces, brackets and full stops around it repaired; the rest is untouched."""
    if _REMOVED not in text:
        return text
    text = _EMPTY_BRACKETS.sub(_REMOVED, text)  # "([1])"; "(see [1])" stays as "(see)"
    text = _REPEATED_STOP.sub(r"\1", text)  # "Paris. [1]." has two full stops
    return _GAP.sub(_gap, text)


def _gap(found: re.Match[str]) -> str:
    """The space that remains where marks were removed."""
    text = found.string
    before, after = text[max(0, found.start() - 1) : found.start()], text[found.end() : found.end() + 1]
    if before in ("", "\n") or _CLOSING.match(text, found.end()):
        return ""
    if found[1] or found[2]:
        return " "
    joins = before.isalnum() and after.isalnum() and not (UNSPACED_BLOCKS.match(before) or UNSPACED_BLOCKS.match(after))
    return " " if joins else ""


def _citation(passage: Passage, start: int = 0, end: int | None = None) -> Citation:
    stop = passage.end if end is None else passage.start + end
    return Citation(passage.passage_id, passage.document_id, passage.start + start, stop)


_LETTERS = rf"(?:(?!{UNSPACED_BLOCKS.pattern})[^\W_])+"
_WORD = re.compile(rf"{UNSPACED_BLOCKS.pattern}|{_LETTERS}(?:[\u00ad\u200b-\u200d\u2060]+{_LETTERS})*")


def _words(text: str) -> Iterator[tuple[str, int, int]]:
    """The (normalized word, start, end) of each word; each character of an unspaced script is a word."""
    for found in _WORD.finditer(text):
        if found[0][0].isalnum():  # otherwise it is punctuation of an unspaced script
            yield unicodedata.normalize("NFKC", visible(found[0])).casefold(), found.start(), found.end()


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
