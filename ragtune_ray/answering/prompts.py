"""Query + passages -> a prompt inside a token budget; the way back, citations out of an answer, is `citations`.

In: texts, and two functions of the generator: one counts tokens, one applies its chat template. Out: prompts. This
module knows nothing of models, files, torch or Ray.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ragtune_ray import RagtuneError
from ragtune_ray.answering.citations import MARK, SENTENCE_END, UNSPACED_BLOCKS
from ragtune_ray.generation.interface import Prompt
from ragtune_ray.schema import Passage

__all__ = [
    "CountTokens",
    "PromptError",
    "Render",
    "build_prompt",
    "build_prompts",
]

CountTokens = Callable[[Sequence[str]], list[int]]
"""Texts -> the number of tokens of each."""
Render = Callable[[Sequence[tuple[str, str]]], str]
"""Messages (role, content) -> the text that the model reads."""

_USEFUL_TOKENS = 32  # a last passage shortened below this is dropped instead
_USEFUL_CHARACTERS = 40
_NUMBER_TOKENS = 5  # about what "[12] " and the empty line between passages take


class PromptError(RagtuneError, ValueError):
    """The question does not fit the budget; the message names both sizes."""


def build_prompt(
    query: str,
    passages: Sequence[Passage],
    *,
    system: str,
    max_tokens: int,
    count_tokens: CountTokens,
    render: Render,
    history: Sequence[tuple[str, str]] = (),
) -> Prompt:
    """`build_prompts` for one query, which may have a conversation before it.

    Of its history, (role, content) of what was said before, oldest first, the latest turns are kept, as many as leave half of
    the budget to the rest, beginning with one of the user's.
    """
    kept = _latest(history, max_tokens // 2, count_tokens, render)
    (prompt,) = _build([_Draft(query, tuple(passages), system, kept)], max_tokens, count_tokens, render)
    return prompt


def _latest(
    history: Sequence[tuple[str, str]], max_tokens: int, count_tokens: CountTokens, render: Render
) -> tuple[tuple[str, str], ...]:
    """As many of the latest turns as fit, beginning with one of the user's."""

    def fits(start: int) -> bool:
        return count_tokens([render(history[start:])])[0] <= max_tokens

    starts = [place for place, (role, _) in enumerate(history) if role == "user"]
    if starts and not fits(starts[0]):
        # Fewer turns are never longer, so halving finds the first that fits; one by one would count a long history many times.
        starts = starts[bisect.bisect_left(starts, True, lo=1, key=fits) :]
    return tuple(history[starts[0] :]) if starts else ()


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
    drafts = [_Draft(query, tuple(shown), system) for query, shown in zip(queries, passages, strict=True)]
    return _build(drafts, max_tokens, count_tokens, render)


def _build(drafts: list[_Draft], max_tokens: int, count_tokens: CountTokens, render: Render) -> list[Prompt]:
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
            draft.write()
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
    system: str
    history: tuple[tuple[str, str], ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    kept: tuple[Passage, ...] = ()
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.write()

    def write(self) -> None:
        """The messages with the passages that are kept so far."""
        before = (("system", self.system), *self.history) if self.system else self.history
        self.messages = (*before, ("user", _user_message(self.query, self.kept)))

    def plan(self, sizes: dict[str, int], room: int) -> None:
        """Keep the passages that fit by the estimate, a sum of `sizes` of the bodies."""
        for passage in self.offered:
            size = sizes[_body(passage)] + _NUMBER_TOKENS
            if size <= room:
                self.kept += (passage,)
                room -= size
                continue
            if room >= _USEFUL_TOKENS or not self.kept:
                characters_per_token = len(_body(passage)) / max(size - _NUMBER_TOKENS, 1)
                shorter = _shortened(passage, len(passage.text) - int((size - room) * characters_per_token))
                self.kept += (shorter or _first_word(passage),)
            return

    def shrink(self, excess: int, max_tokens: int) -> None:
        """Take `excess` tokens or a little more from the last passage, or drop it when nothing useful would stay."""
        last = self.kept[-1]
        # A token has 1 (Chinese) to 5 (English) characters; where 3 are too few the caller comes back.
        shorter = _shortened(last, len(last.text) - 3 * excess)
        if len(self.kept) > 1:
            useful = shorter is not None and len(shorter.text) >= _USEFUL_CHARACTERS
            self.kept = (*self.kept[:-1], shorter) if shorter is not None and useful else self.kept[:-1]
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


def _user_message(query: str, passages: Sequence[Passage]) -> str:
    blocks = [f"[{number}] {_shown(_body(passage), len(passages))}" for number, passage in enumerate(passages, start=1)]
    return "\n\n".join([*blocks, f"Question: {query.strip()}"])


def _body(passage: Passage) -> str:
    title = " ".join(passage.title.split())
    return f"{title}\n{passage.text}" if title else passage.text


def _shown(body: str, num_passages: int) -> str:
    """A passage's own "[2]" becomes "(2)", lest a copied one be read as a citation; its "Question:" lines are quoted."""

    def defused(mark: re.Match[str]) -> str:
        return f"({mark[1]})" if any(int(digits) <= num_passages for digits in re.findall(r"\d+", mark[1])) else mark[0]

    return re.sub(r"(?m)^(\s*)(Question:)", r'\1"\2"', MARK.sub(defused, body))


def _shortened(passage: Passage, num_characters: int) -> Passage | None:
    """The passage cut to at most so many characters: after a sentence if that keeps over half, else after a word.

    None when nothing would be left.
    """
    text = passage.text[: max(num_characters, 0)]
    if len(text) < len(passage.text):
        ends = [
            found.end() for found in SENTENCE_END.finditer(passage.text, 0, len(text) + 1) if found.end() <= len(text)
        ]
        after_sentence = ends[-1] if ends and ends[-1] * 2 > len(text) else 0
        text = text[: after_sentence or _word_boundary(passage.text, len(text))]
    text = text.rstrip()
    return dataclasses.replace(passage, text=text, end=passage.start + len(text)) if text else None


def _word_boundary(text: str, cut: int) -> int:
    """The last place at or before `cut` that splits no word and no combined character."""
    boundary = cut
    while boundary > 0 and _is_inside_word(text, boundary):
        boundary -= 1
    return boundary


def _is_inside_word(text: str, cut: int) -> bool:
    if cut >= len(text):
        return False
    before, after = text[cut - 1], text[cut]
    if unicodedata.combining(after):
        return True
    return not (before.isspace() or after.isspace() or UNSPACED_BLOCKS.match(before) or UNSPACED_BLOCKS.match(after))


def _first_word(passage: Passage) -> Passage:
    match = re.match(rf"\s*(?:{UNSPACED_BLOCKS.pattern}|\S{{1,100}})", passage.text)
    text = match[0] if match else passage.text
    return dataclasses.replace(passage, text=text, title="", end=passage.start + len(text))
