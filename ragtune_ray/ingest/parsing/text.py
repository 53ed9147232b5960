"""What the parsers of all kinds of files share: their result, their error, clean text and its encoding."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ragtune_ray import RagtuneError

Scalar = str | int | float | bool
"""A value of metadata that filters can compare."""
_UNSAFE = re.compile("[\x00\ud800-\udfff]")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_NOT_ASCII_WORDS = bytes(code for code in range(256) if not (code < 128 and chr(code).isalnum()))
_NOT_WORDS = re.compile(r"[\W_]+")


class ParseError(RagtuneError, ValueError):
    """A row or file cannot be read; the caller adds its location and makes a `Reject`."""


@dataclass(frozen=True, slots=True)
class ParsedFile:
    """What a parser found in one file."""

    title: str
    """May be empty; `parsers.parse_file` then takes the file's name."""
    text: str
    metadata: dict[str, Scalar | list[Scalar]] = field(default_factory=dict)
    """Values that the file itself states, such as its front matter or author."""
    page_starts: tuple[int, ...] = ()
    """For each page (PDF) or slide, its first character in `text`; empty for files without pages."""
    rows: list[tuple[str, dict[str, Scalar]]] = field(default_factory=list)
    """Rows of tables that are a document each (`corpus.sheets`): place in the file, and column -> value as in a .jsonl file.
    Then `text` is empty."""
    plain_characters: int = 0
    """Letters and digits in a plain extraction of everything visible, without any rule about what matters. The text lost
    something if it has fewer (`count_characters`)."""


def count_characters(text: str) -> int:
    """The number of letters and digits; marks of tables and lists do not count.

    >>> count_characters("| a | b1 |")
    3
    """
    # Nearly all of most texts is ASCII, which bytes.translate counts ten times as fast as a regular expression.
    ascii_ones = text.encode(errors="ignore").translate(None, _NOT_ASCII_WORDS)
    return len(ascii_ones) + sum(len(_NOT_WORDS.sub("", part)) for part in _NOT_ASCII.findall(text))


def clean(text: str) -> str:
    r"""Make a text safe for Arrow and tokenizers: no BOM, NUL or lone surrogate, and only `\n` as newline; no NFC.

    >>> clean("\ufeffa\r\nb\x00")
    'a\nb\ufffd'
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _UNSAFE.sub("\ufffd", text.removeprefix("\ufeff"))


def decode(data: bytes) -> str:
    """Decode UTF-8, or another encoding if charset-normalizer finds exactly one that fits.

    Most Western texts fit several single-byte encodings; a wrong guess would silently swap letters, so none is made.

    Raises:
        ParseError: the encoding is not certain.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        from charset_normalizer import from_bytes

        candidates = from_bytes(data)
        best = candidates.best()
        if best is None or len(candidates) > 1:
            raise ParseError(
                f"not UTF-8 (byte 0x{data[error.start]:02x} at {error.start}), and no other encoding is certain; convert it: "
                "iconv -f ENCODING -t UTF-8 FILE"
            ) from None
        return str(best)
