"""What the parsers of all kinds of files share: their result, their error, clean text and its encoding."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, field

from ragtune_ray import RagtuneError

Scalar = str | int | float | bool
"""A value of metadata that filters can compare."""
_UNSAFE = re.compile("[\x00\ud800-\udfff]")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_NOT_ASCII_WORDS = bytes(code for code in range(256) if not (code < 128 and chr(code).isalnum()))
_NOT_WORDS = re.compile(r"[\W_]+")
# The letters beyond ASCII of one language each, in lower case. A text with letters of several is probably no Western text at all.
_ALPHABETS = [
    frozenset(letters)
    for letters in (
        "äöüßéàèáâêôç",
        "àâçéèêëîïôœùûüÿ",
        "áéíóúñü",
        "áâãàçéêíóôõúü",
        "àèéìíîòóùú",
        "åäöéàü",
        "æøåéóòêü",
        "éëïóöüáè",
    )
]
_MARKS = frozenset("‘’‚“”„†•…‰‹›–—€™¡¿§©«»®°±·²³¼½¾ºª£\u00a0")
_MARK_IN_WORD = re.compile(r"[^\W\d_][“”‚„†•…‰‹›™¡¿§©®±²³¼½¾£€][^\W\d_]")
_MAX_ACCENTED_SHARE = 0.4
"""Of the letters of a Western text; a text in Greek or Cyrillic has more that are not ASCII."""
_MIN_ACCENTED = 5
_OTHERS = [
    "utf_16", "utf_32", "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "koi8_r", "gb18030",
    "big5", "cp932", "euc_jp", "cp949",
]  # fmt: skip
_MARGIN = 0.1
"""Of charset-normalizer's measures, both between 0 and 1, by which the best encoding must be better than the others."""
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class ParseError(RagtuneError, ValueError):
    """A row or file cannot be read; the caller adds its location and makes a `Reject`."""


class TransientError(ParseError):
    """A file could not be read this time, but may be another time: its parser crashed, reached a limit or lacks a library."""


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


def decode(data: bytes, encoding: str = "auto") -> str:
    r"""Decode a text file.

    `auto` means what the byte-order mark says, else UTF-8, else another encoding if only one gives a plausible text: a wrong
    guess would silently swap letters.

    >>> decode("Größe".encode("cp1252"))
    'Größe'

    Raises:
        ParseError: the encoding is not certain, or the file is not in the given one.
    """
    marked = next((name for mark, name in _BOMS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(marked if encoding == "auto" else encoding)
    except UnicodeDecodeError as error:
        place = f"(byte 0x{data[error.start]:02x} at {error.start})"
        if encoding != "auto":
            raise ParseError(f"not {encoding} {place}; correct corpus.encoding, or convert the file") from None
    found = _western(data) or _other(data)
    if found is None:
        raise ParseError(
            f"not UTF-8 {place}, and no other encoding is certain; set corpus.encoding to its name, or convert it: "
            "iconv -f ENCODING -t UTF-8 FILE"
        )
    return found


def _western(data: bytes) -> str | None:
    """The text in windows-1252, if it looks like one Western European language; else None."""
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    beyond = set(text.lower()) - {chr(code) for code in range(128)}
    accented = beyond - _MARKS
    if _MARK_IN_WORD.search(text) or not any(accented <= alphabet for alphabet in _ALPHABETS):
        return None
    num_letters = sum(map(str.isalpha, text))
    num_accented = sum(character in accented for character in text.lower())
    if num_accented > _MAX_ACCENTED_SHARE * num_letters:
        return None
    # Central European, Turkish and Baltic files have other letters at some of these bytes.
    is_same = all(data.decode(name, "replace") == text for name in ("cp1250", "cp1254"))
    return text if is_same or num_accented >= _MIN_ACCENTED else None


def _other(data: bytes) -> str | None:
    """The only plausible text in another encoding; None if there is none, or several."""
    from charset_normalizer import from_bytes

    found = from_bytes(data, cp_isolation=_OTHERS)
    best = found.best()
    if best is None:
        return None
    near = [each for each in found if each.chaos < best.chaos + _MARGIN and each.coherence > best.coherence - _MARGIN]
    text = str(best)
    is_certain = len({str(each) for each in near}) == 1 and not _MARK_IN_WORD.search(text)
    return text if is_certain else None
