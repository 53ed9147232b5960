"""Text of e-mails (.eml): who wrote what to whom, and the attachments that can be read."""

from __future__ import annotations

import email
import email.policy
import email.utils
from collections.abc import Callable, Iterator
from email.message import EmailMessage

from ragtune_ray.ingest.parsing import html
from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, Scalar, clean, count_characters, decode

_SHOWN = ("From", "To", "Cc", "Date")
# The standard library's parser raises errors of many kinds on malformed headers.
_BROKEN = (ValueError, LookupError, AttributeError, TypeError, RuntimeError, OverflowError)
_MAX_PARTS = 1_000
_MAX_DEPTH = 20
ReadAttachment = Callable[[str, bytes], ParsedFile | None]
"""Takes name and bytes of an attachment; None if files of its type are not read."""


def parse(data: bytes, read: ReadAttachment) -> ParsedFile:
    """Subject and text of a message: its headers, its body (plain text rather than HTML) and its attachments.

    Raises:
        ParseError: it is not a message, or has too many or too deeply nested parts.
    """
    try:
        message = email.message_from_bytes(data, policy=email.policy.default)
        assert isinstance(message, EmailMessage)
        headers = _headers(message, *_SHOWN)
        subject = _headers(message, "Subject").get("Subject", "")
        if not headers and not subject:
            raise ParseError("not an e-mail: it has none of the headers From, To, Date and Subject")
        blocks = list(_blocks(message, read))
    except _BROKEN as error:
        if isinstance(error, ParseError):
            raise
        raise ParseError(f"e-mail is broken: {type(error).__name__}: {error}") from None
    shown = _lines(headers)
    plain = count_characters(shown) + sum(number for _, number in blocks)
    text = "\n\n".join(text for text in (shown, *(text.strip() for text, _ in blocks)) if text)
    return ParsedFile(subject, text, _metadata(headers), plain_characters=plain)


def _headers(message: EmailMessage, *names: str) -> dict[str, str]:
    """The headers that are not empty; one that the standard library cannot parse, as it was written."""
    found = {}
    for name in names:
        try:
            value = str(message[name] or "")
        except _BROKEN:
            written = (str(value) for key, value in message.raw_items() if key.lower() == name.lower())
            value = " ".join(next(written).split())
        if value:
            found[name] = clean(value)
    return found


def _lines(headers: dict[str, str]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in headers.items())


def _metadata(headers: dict[str, str]) -> dict[str, Scalar | list[Scalar]]:
    found: dict[str, Scalar | list[Scalar]] = {}
    if "From" in headers:
        found["author"] = headers["From"]
    if "Date" in headers:
        try:
            found["created"] = email.utils.parsedate_to_datetime(headers["Date"]).isoformat()
        except _BROKEN:
            found["created"] = headers["Date"]
    return found


def _blocks(message: EmailMessage, read: ReadAttachment) -> Iterator[tuple[str, int]]:
    """The texts of the parts to show, and the letters and digits of each in plain text."""
    for part in _parts(message):
        if part.is_multipart():  # a forwarded message; its own parts follow
            for inner in part.iter_parts():
                text = _lines(_headers(inner, *_SHOWN, "Subject")) if isinstance(inner, EmailMessage) else ""
                yield text, count_characters(text)
            continue
        data = part.get_payload(decode=True)
        if not isinstance(data, bytes):
            continue
        if not _is_attached(part):
            yield _body(part, data)
            continue
        name = part.get_filename() or ""
        label = f"Attachment: {clean(name)}" if name else ""
        attached = read(name, data) if name else None
        text, number = (attached.text, attached.plain_characters) if attached else ("", 0)
        if not attached and part.get_content_maintype() == "text" and part.get_content_disposition() != "attachment":
            text, number = _body(part, data)
        yield f"{label}\n\n{text}", count_characters(label) + number


def _is_attached(part: EmailMessage) -> bool:
    """Whether a part is a file rather than text of the message, which may have a name, too, but says nothing about it."""
    disposition, kind = part.get_content_disposition(), part.get_content_type()
    if disposition == "attachment" or not kind.startswith("text/"):
        return True
    return bool(part.get_filename()) and (disposition is not None or kind not in {"text/plain", "text/html"})


def _body(part: EmailMessage, data: bytes) -> tuple[str, int]:
    if part.get_content_type() == "text/html":
        page = html.parse_source(_decoded(part, data), has_furniture=False)
        return page.text, page.plain_characters
    text = clean(_decoded(part, data))
    return text, count_characters(text)


def _parts(message: EmailMessage) -> Iterator[EmailMessage]:
    """The parts to show, in order: of alternatives the plain text, unless it is empty; and messages before their parts."""
    waiting = [(message, 0)]
    num_parts = 0
    while waiting:
        part, depth = waiting.pop()
        num_parts += 1
        if num_parts > _MAX_PARTS or depth > _MAX_DEPTH:
            raise ParseError(
                f"e-mail of more than {_MAX_PARTS:,} parts, or nested deeper than {_MAX_DEPTH}; save its parts as files"
            )
        if not part.is_multipart():
            yield part
            continue
        inner = [each for each in part.iter_parts() if isinstance(each, EmailMessage)]
        if part.get_content_type() == "multipart/alternative":
            inner = _best(inner)
        elif part.get_content_type() in {"message/rfc822", "message/global"}:
            yield part
        waiting += [(each, depth + 1) for each in reversed(inner)]


def _best(alternatives: list[EmailMessage]) -> list[EmailMessage]:
    plain = [
        each for each in alternatives if each.get_content_type() == "text/plain" and str(each.get_payload()).strip()
    ]
    return plain[:1] or alternatives[-1:]


def _decoded(part: EmailMessage, data: bytes) -> str:
    charset = part.get_content_charset()
    try:
        return data.decode(charset or "utf-8")
    except (LookupError, UnicodeDecodeError):
        return decode(data)
