"""Query + passages -> a prompt inside a token budget; citations out of an answer.

In: texts, and two functions of the generator: one counts tokens, one applies its chat template. Out: prompts and
citations. This module knows nothing of models, files, torch or Ray.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ragtune_ray.abstention import is_abstention
from ragtune_ray.schema import Citation, Passage

__all__ = [
    "CountTokens",
    "Prompt",
    "PromptError",
    "Render",
    "build_prompt",
    "build_prompts",
    "parse_citations",
    "supporting_citations",
]

CountTokens = Callable[[Sequence[str]], list[int]]
"""Texts -> the number of tokens of each."""
Render = Callable[[Sequence[tuple[str, str]]], str]
"""Messages (role, content) -> the text that the model reads."""

_USEFUL_TOKENS = 32  # a last passage shortened below this is dropped instead
_MIN_ANSWER_CHARACTERS = 2


class PromptError(ValueError):
    """The question does not fit the budget; the message names both sizes."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the generator is shown for one query."""

    messages: tuple[tuple[str, str], ...]
    """(role, content), the system's first."""
    passages: tuple[Passage, ...]
    """Those that stand in it, numbered from 1, as shown: a shortened one has its shortened text and end."""
    num_tokens: int
    """Of the rendered messages."""


def build_prompt(
    query: str,
    passages: Sequence[Passage],
    *,
    system: str,
    max_tokens: int,
    count_tokens: CountTokens,
    render: Render,
) -> Prompt:
    """`build_prompts` for one query."""
    (prompt,) = build_prompts(
        [query], [passages], system=system, max_tokens=max_tokens, count_tokens=count_tokens, render=render
    )
    return prompt


def build_prompts(
    queries: Sequence[str],
    passages: Sequence[Sequence[Passage]],
    *,
    system: str,
    max_tokens: int,
    count_tokens: CountTokens,
    render: Render,
) -> list[Prompt]:
    """Chat messages for every query: the system's, then the user's with numbered passages and the question.

    Whole passages are dropped from the end until the rest fits; the last that stays is shortened at the end of a sentence
    or word when that keeps useful text. The question is never shortened, and one passage always stays. All texts are
    counted in one call, then the finished prompts in one call (and those still too long again).

    Args:
        queries: the questions.
        passages: best first, per query; none gives the prompt of the base arm.
        system: the instruction; empty means no system message.
        max_tokens: longest rendered prompt.
        count_tokens: the generator's.
        render: the generator's.

    Raises:
        PromptError: system and question, or they and the shortest piece of a passage, exceed `max_tokens`.
    """
    drafts = [
        _Draft(query, tuple(shown), _messages(system, query, ()))
        for query, shown in zip(queries, passages, strict=True)
    ]
    sizes = _counts(
        [render(draft.messages) for draft in drafts] + [_body(p) for draft in drafts for p in draft.offered],
        count_tokens,
    )
    for draft in drafts:
        base = sizes[render(draft.messages)]
        if base > max_tokens:
            raise PromptError(
                f"question and system prompt take {base} tokens, prompt.max_tokens is {max_tokens}; raise it or shorten "
                f"the question: {draft.query[:80]!r}"
            )
        draft.plan(sizes, max_tokens - base)
    pending = drafts
    while pending:
        for draft in pending:
            draft.messages = _messages(system, draft.query, draft.kept)
        rendered = [render(draft.messages) for draft in pending]
        for draft, num_tokens in zip(pending, count_tokens(rendered), strict=True):
            draft.num_tokens = num_tokens
        pending = [draft for draft in pending if draft.num_tokens > max_tokens]
        for draft in pending:
            draft.shrink(draft.num_tokens - max_tokens, max_tokens)
    return [Prompt(draft.messages, draft.kept, draft.num_tokens) for draft in drafts]


@dataclass(slots=True)
class _Draft:
    """A prompt on its way into the budget."""

    query: str
    offered: tuple[Passage, ...]
    messages: tuple[tuple[str, str], ...]
    kept: tuple[Passage, ...] = ()
    num_tokens: int = 0

    def plan(self, sizes: dict[str, int], room: int) -> None:
        """Keep the passages that fit by the estimate: sizes of the bodies, and 5 tokens for a number and line ends."""
        for passage in self.offered:
            size = sizes[_body(passage)] + 5
            if size <= room:
                self.kept += (passage,)
                room -= size
                continue
            if room >= _USEFUL_TOKENS or not self.kept:
                shorter = _shortened(passage, int(len(passage.text) * max(room, 1) / size))
                self.kept += (shorter or _first_word(passage),)
            return

    def shrink(self, excess: int, max_tokens: int) -> None:
        """Take `excess` tokens or a little more from the last passage, or drop it when nothing useful would stay."""
        last = self.kept[-1]
        # Each character taken is at most about one token; 2 per token is gentle, and the loop comes back if needed.
        shorter = _shortened(last, min(len(last.text) - 1, len(last.text) - 2 * excess))
        if len(self.kept) > 1:
            keeps = shorter is not None and len(shorter.text) >= _USEFUL_TOKENS
            self.kept = (*self.kept[:-1], shorter) if keeps and shorter is not None else self.kept[:-1]
            return
        self.kept = (shorter or _first_word(last),)
        if len(self.kept[0].text) >= len(last.text):
            raise PromptError(
                f"question, system prompt and the first word of passage {last.passage_id} take {self.num_tokens} tokens, "
                f"prompt.max_tokens is {max_tokens}; raise it"
            )


def _counts(texts: Sequence[str], count_tokens: CountTokens) -> dict[str, int]:
    unique = list(dict.fromkeys(texts))  # one passage is often a hit of many queries
    return dict(zip(unique, count_tokens(unique), strict=True))


def _messages(system: str, query: str, passages: Sequence[Passage]) -> tuple[tuple[str, str], ...]:
    blocks = [f"[{number}] {_shown(_body(passage), len(passages))}" for number, passage in enumerate(passages, start=1)]
    user = "\n\n".join([*blocks, f"Question: {query.strip()}"])
    return (("system", system), ("user", user)) if system else (("user", user),)


def _body(passage: Passage) -> str:
    title = " ".join(passage.title.split())
    return f"{title}\n{passage.text}" if title else passage.text


def _shown(body: str, num_passages: int) -> str:
    """A passage's own "[2]" becomes "(2)", lest a copied one be read as a citation; its "Question:" lines are quoted."""

    def defused(mark: re.Match[str]) -> str:
        return f"({mark[1]})" if any(int(digits) <= num_passages for digits in re.findall(r"\d+", mark[1])) else mark[0]

    return re.sub(r"(?m)^(\s*)(Question:)", r'\1"\2"', _MARK.sub(defused, body))


_SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s)|[。！？]["”’』」）]*|\n(?=\s*\n)""")


def _shortened(passage: Passage, num_characters: int) -> Passage | None:
    """The passage cut to at most so many characters: after a sentence if that keeps over half, else after a word.

    None when nothing would be left.
    """
    text = passage.text[: max(num_characters, 0)]
    if len(text) < len(passage.text):
        ends = [
            found.end() for found in _SENTENCE_END.finditer(passage.text, 0, len(text) + 1) if found.end() <= len(text)
        ]
        if ends and ends[-1] * 2 > len(text):
            text = text[: ends[-1]]
        else:
            text = text[: _word_boundary(passage.text, len(text))]
    text = text.rstrip()
    return dataclasses.replace(passage, text=text, end=passage.start + len(text)) if text else None


def _word_boundary(text: str, cut: int) -> int:
    """The last place at or before `cut` that splits no word and no combined character."""
    boundary = cut
    while boundary > 0 and _is_inside_word(text, boundary):
        boundary -= 1
    if boundary > 0:
        return boundary
    while cut > 0 and cut < len(text) and unicodedata.combining(text[cut]):
        cut -= 1
    return cut if " " not in text[:cut].strip() and len(text) > 4 * cut > _MAX_WORD else 0


_MAX_WORD = 400  # a "word" longer than a hundred characters is no word and may be cut anywhere


def _is_inside_word(text: str, cut: int) -> bool:
    if cut >= len(text):
        return False
    before, after = text[cut - 1], text[cut]
    if unicodedata.combining(after):
        return True
    return not (before.isspace() or after.isspace() or _UNSPACED.match(before) or _UNSPACED.match(after))


def _first_word(passage: Passage) -> Passage:
    match = re.match(rf"\s*(?:{_UNSPACED.pattern}|\S{{1,100}})", passage.text)
    text = match[0] if match else passage.text
    return dataclasses.replace(passage, text=text, title="", end=passage.start + len(text))


# --- citations -------------------------------------------------------------------------------------------------------

_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_NUMBERS = r"\d+(?:\s*(?:[,，、;；&]|[-–—~]|and)\s*\d+)*"
_MARK = re.compile(rf"[\[【]\s*({_NUMBERS})\s*(?:†[^\]】\n]{{0,40}})?[\]】]")
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
        text, before = _MARK.sub(taken, text), text
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
    joins = before.isalnum() and after.isalnum() and not (_UNSPACED.match(before) or _UNSPACED.match(after))
    return " " if joins else ""


def _tidied(text: str) -> str:
    text = re.sub(r"\(\s*[,;]*\s*\)|（\s*）", "", text)  # the brackets of "(see [1])" stay, those of "([1])" do not
    text = re.sub(r"[ \t]+(?=[,.;:!?)\]](?:\s|[.,;:!?)]|$)|[，。；：！？、）])", "", text)
    text = re.sub(r"(?<![.])([.。!?！？])[.。](?=\s|$)", r"\1", text)  # "Paris. [1]." leaves two stops
    return re.sub(r"[ \t]{2,}", " ", text)


def _citation(passage: Passage, start: int = 0, end: int | None = None) -> Citation:
    stop = passage.end if end is None else passage.start + end
    return Citation(passage.passage_id, passage.document_id, passage.start + start, stop)


_WORD = re.compile(rf"{_UNSPACED.pattern}|(?:(?!{_UNSPACED.pattern})[^\W_])+")


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
    breaks = [found.end() for found in re.finditer(rf"{_SENTENCE_END.pattern}|\n", text)]
    first = max((at for at in breaks if at <= start), default=0)
    last = min((at for at in breaks if at >= end), default=len(text))
    first += len(text[first:start]) - len(text[first:start].lstrip())
    return first, first + len(text[first:last].rstrip())
