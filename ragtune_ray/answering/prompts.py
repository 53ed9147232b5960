"""Builds a prompt from a question and its passages, within a token budget."""

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

CountTokens = Callable[[Sequence[str]], list[int]]
"""Returns the number of tokens of each text."""
Render = Callable[[Sequence[tuple[str, str]]], str]
"""Turns messages (role, content) into the text that the model reads."""

_USEFUL_TOKENS = 32  # a last passage that would be shortened below this is dropped
_USEFUL_CHARACTERS = 40
_CHARACTERS_PER_TOKEN = 16  # more than in the text of any language
_NUMBER_TOKENS = 5  # estimate for "[12] " and the empty line between passages


class PromptError(RagtuneError, ValueError):
    """The question is empty or does not fit the token budget."""


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
    """`build_prompts` for one query, with a `history` of earlier turns (role, content), oldest first.

    As many of the latest turns are kept as fit half of the budget, beginning with a turn of the user.
    """
    (prompt,) = build_prompts(
        [query],
        [passages],
        system=system,
        max_tokens=max_tokens,
        count_tokens=count_tokens,
        render=render,
        histories=[history],
    )
    return prompt


def _latest_turns(
    history: Sequence[tuple[str, str]], max_tokens: int, count_tokens: CountTokens, render: Render
) -> tuple[tuple[str, str], ...]:

    def fits(start: int) -> bool:
        return count_tokens([render(history[start:])])[0] <= max_tokens

    history = _short_enough(history, max_tokens * _CHARACTERS_PER_TOKEN)
    starts = [place for place, (role, _) in enumerate(history) if role == "user"]
    if starts and not fits(starts[0]):
        # Fewer turns are never longer, so a binary search finds the first start that fits.
        starts = starts[bisect.bisect_left(starts, True, lo=1, key=fits) :]
    return tuple(history[starts[0] :]) if starts else ()


def _short_enough(history: Sequence[tuple[str, str]], max_characters: int) -> Sequence[tuple[str, str]]:
    """The latest turns with at most so many characters together; tokenizing what cannot fit would delay other requests."""
    start = len(history)
    while start and len(history[start - 1][1]) <= max_characters:
        start -= 1
        max_characters -= len(history[start][1])
    return history[start:]


def build_prompts(
    queries: Sequence[str],
    passages: Sequence[Sequence[Passage]],
    *,
    system: str | Sequence[str],
    max_tokens: int,
    count_tokens: CountTokens,
    render: Render,
    histories: Sequence[Sequence[tuple[str, str]]] = (),
) -> list[Prompt]:
    """Chat messages for every query: the system message, then one of the user with numbered passages and the question.

    Passages (best first) are dropped from the end until the prompt fits; the last one kept may be cut after a sentence or word.
    The question is never shortened, and at least one passage is kept. The prompts with all their passages are counted in one
    call; for those that are too long, their passages in another, and the shorter prompts until they fit.

    Args:
        queries: the questions.
        passages: for each, best first.
        system: one system message for all prompts, or one for each; an empty text means none.
        max_tokens: budget of each prompt.
        count_tokens: counts the generator's tokens.
        render: applies its chat template.
        histories: for each query the turns before it, as in `build_prompt`; empty: no query has any.

    Raises:
        PromptError: system message, question and the first word of a passage exceed `max_tokens`.
    """
    systems = [system] * len(queries) if isinstance(system, str) else system
    turns = [_latest_turns(each, max_tokens // 2, count_tokens, render) for each in histories or [()] * len(queries)]
    parts = zip(queries, map(tuple, passages), systems, turns, strict=True)
    return _build([_Draft(*each) for each in parts], max_tokens, count_tokens, render)


def _build(drafts: list[_Draft], max_tokens: int, count_tokens: CountTokens, render: Render) -> list[Prompt]:
    _count(drafts, count_tokens, render)
    tight = [draft for draft in drafts if draft.num_tokens > max_tokens]
    if tight:
        _choose_passages(tight, max_tokens, count_tokens, render)
    pending = tight
    while pending:
        _count(pending, count_tokens, render)
        pending = [draft for draft in pending if draft.num_tokens > max_tokens]
        for draft in pending:
            draft.shrink(draft.num_tokens - max_tokens, max_tokens)
    return [Prompt(draft.messages, draft.kept, draft.num_tokens) for draft in drafts]


def _count(drafts: Sequence[_Draft], count_tokens: CountTokens, render: Render) -> None:
    """Write the messages of prompts, and count their tokens."""
    for draft in drafts:
        draft.write()
    for draft, num_tokens in zip(drafts, count_tokens([render(draft.messages) for draft in drafts]), strict=True):
        draft.num_tokens = num_tokens


def _choose_passages(drafts: Sequence[_Draft], max_tokens: int, count_tokens: CountTokens, render: Render) -> None:
    """Choose the passages of prompts that are too long with all of them."""
    for draft in drafts:
        draft.kept = ()
        draft.write()
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
    _keep_whole(drafts, max_tokens, count_tokens, render)


def _keep_whole(drafts: Sequence[_Draft], max_tokens: int, count_tokens: CountTokens, render: Render) -> None:
    """Take back the cut of a last passage that fits: then the kept passages, offered again, make the same prompt."""
    cut = [draft for draft in drafts if draft.kept != draft.offered[: len(draft.kept)]]
    planned = [draft.kept for draft in cut]
    for draft in cut:
        draft.kept = draft.offered[: len(draft.kept)]
    if cut:
        _count(cut, count_tokens, render)
    for draft, kept in zip(cut, planned, strict=True):
        if draft.num_tokens > max_tokens:
            draft.kept = kept


@dataclass(slots=True)
class _Draft:
    """A prompt while it is fitted into the budget."""

    query: str
    offered: tuple[Passage, ...]
    system: str
    history: tuple[tuple[str, str], ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    kept: tuple[Passage, ...] = ()
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.kept = self.offered

    def write(self) -> None:
        """Write the messages with the passages kept so far."""
        before = (("system", self.system), *self.history) if self.system else self.history
        self.messages = (*before, ("user", _user_message(self.query, self.kept)))

    def plan(self, sizes: dict[str, int], room: int) -> None:
        """Keep the passages that fit, estimated by the sum of their `sizes`."""
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
        """Shorten the last passage by about `excess` tokens, or drop it if nothing useful would remain."""
        last = self.kept[-1]
        # A token has 1 (Chinese) to 5 (English) characters; if 3 per token are too few, the caller calls again.
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
    unique = list(dict.fromkeys(texts))  # one passage is often retrieved for many queries
    return dict(zip(unique, count_tokens(unique), strict=True))


def _user_message(query: str, passages: Sequence[Passage]) -> str:
    bodies = [_neutralize_prompt_syntax(_body(passage), len(passages)) for passage in passages]
    blocks = [f"[{number}] {body}" for number, body in enumerate(bodies, start=1)]
    return "\n\n".join([*blocks, f"Question: {query.strip()}"])


def _body(passage: Passage) -> str:
    title = " ".join(passage.title.split())
    return f"{title}\n{passage.text}" if title else passage.text


def _neutralize_prompt_syntax(body: str, num_passages: int) -> str:
    """Keep a passage from imitating the prompt around it (prompt injection).

    A "[2]" in it becomes "(2)", because a generator that copies the mark would cite another passage. A "Question:" at the
    beginning of a line is put in quotes.
    """

    def to_parentheses(mark: re.Match[str]) -> str:
        return f"({mark[1]})" if any(int(digits) <= num_passages for digits in re.findall(r"\d+", mark[1])) else mark[0]

    return re.sub(r"(?m)^([^\S\n]*)(Question:)", r'\1"\2"', MARK.sub(to_parentheses, body))


def _shortened(passage: Passage, num_characters: int) -> Passage | None:
    """The passage cut to `num_characters`, after a sentence if that keeps over half of them, else after a word; None if empty."""
    text = passage.text[: max(num_characters, 0)]
    if len(text) < len(passage.text):
        ends = (found.end() for found in SENTENCE_END.finditer(passage.text, 0, len(text) + 1))
        last_end = max((end for end in ends if end <= len(text)), default=0)
        after_sentence = last_end if last_end * 2 > len(text) else 0
        text = text[: after_sentence or _word_boundary(passage.text, len(text))]
    text = text.rstrip()
    return dataclasses.replace(passage, text=text, end=passage.start + len(text)) if text else None


def _word_boundary(text: str, cut: int) -> int:
    """The last position at or before `cut` that splits neither a word nor a combined character."""
    return next((place for place in range(cut, 0, -1) if not _is_inside_word(text, place)), 0)


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
