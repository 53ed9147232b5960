"""Presentations, spreadsheets, e-books, e-mails and reStructuredText: what a reader of each would miss."""

from __future__ import annotations

import datetime as dt
import email.message
import io
import time
from pathlib import Path

import openpyxl
import pptx
import pytest
from pptx.util import Inches

from ragtune_ray.config import Corpus
from ragtune_ray.ingest import parsers
from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.parsers import parse_file
from ragtune_ray.ingest.parsing import docx, html
from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, TransientError
from ragtune_ray.ingest.readers import read_documents
from ragtune_ray.schema import Document
from tests.support.corpora import write
from tests.support.documents import make_docx, make_epub, make_pptx, sentences
from tests.support.office_files import package, part

CORPUS = Corpus(max_document_bytes=1_000_000)


def parse(name: str, data: bytes) -> ParsedFile:
    return parse_file(name, data, CORPUS)


def reason(name: str, data: bytes) -> str:
    with pytest.raises(ParseError) as caught:
        parse(name, data)
    return str(caught.value)


def test_slides_are_pages_and_the_first_title_is_the_title() -> None:
    texts = sentences(3)
    parsed = parse("x.pptx", make_pptx(texts))
    assert parsed.title == texts[0]
    assert [parsed.text[start:].split("\n")[0] for start in parsed.page_starts] == [texts[0], texts[6]]


def slide(shapes: str) -> bytes:
    body = f"<p:cSld><p:spTree>{shapes}</p:spTree></p:cSld>"
    parts = {"ppt/presentation.xml": part("p:presentation", '<p:sldIdLst><p:sldId id="256" r:id="s1"/></p:sldIdLst>')}
    parts["ppt/slides/slide1.xml"] = part("p:sld", body)
    links = {"ppt/presentation.xml": {"s1": ("slide", "slides/slide1.xml")}}
    return package("ppt/presentation.xml", parts, links)


def shape(paragraphs: str, kind: str = "") -> str:
    placeholder = f'<p:ph type="{kind}"/>' if kind else ""
    return f"<p:sp><p:nvSpPr><p:nvPr>{placeholder}</p:nvPr></p:nvSpPr><p:txBody>{paragraphs}</p:txBody></p:sp>"


def line(text: str, properties: str = "") -> str:
    return f"<a:p>{properties}<a:r><a:t>{text}</a:t></a:r></a:p>"


def test_slides_keep_numbers_and_raised_digits_and_drop_fields() -> None:
    number = '<a:pPr lvl="0"><a:buAutoNum type="{}"/></a:pPr>'
    raised = '<a:p><a:r><a:t>10</a:t></a:r><a:r><a:rPr baseline="30000"/><a:t>6</a:t></a:r><a:br/><a:r><a:t>x</a:t></a:r></a:p>'
    body = line("a", number.format("arabicPeriod")) + line("b", number.format("arabicPeriod")) + line("text")
    body += line("c", number.format("alphaLcParenR")) + raised
    shapes = shape(body) + shape(line("7"), "sldNum") + shape(line("Top"), "title")
    alternative = f"<mc:AlternateContent><mc:Choice Requires='x'>{shape(line('new'))}</mc:Choice><mc:Fallback>{shape(line('old'))}</mc:Fallback></mc:AlternateContent>"
    assert parse("x.pptx", slide(shapes + alternative)).text.split("\n") == [
        "Top", "1. a", "2. b", "text", "a) c", "10^6", "x", "new",
    ]  # fmt: skip


def test_footers_of_slides_are_read_once() -> None:
    presentation = pptx.Presentation()
    for _ in range(2):
        added = presentation.slides.add_slide(presentation.slide_layouts[6])
        added.shapes.add_textbox(Inches(1), Inches(1), Inches(1), Inches(1)).text_frame.text = "body"
    buffer = io.BytesIO()
    presentation.save(buffer)
    assert parse("x.pptx", buffer.getvalue()).text == "body\n\nbody"
    footer = shape(line("Confidential"), "ftr")
    assert parse("x.pptx", slide(shape(line("a")) + footer + footer)).text == "a\nConfidential"


def workbook(*rows: list[object]) -> bytes:
    book = openpyxl.Workbook()
    book.active.title = "Moons"
    for row in rows:
        book.active.append(row)
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def test_cells_are_written_as_people_read_them() -> None:
    day, moment = dt.datetime(1977, 8, 12), dt.datetime(2024, 5, 1, 10, 30)  # noqa: DTZ001 - cells have no zone
    data = workbook(
        ["name", "n", None, "seen"], ["Phobos", 3.0, None, day], ["a|b", 0.1, None, moment], [True, None, None, "x\ny"]
    )
    assert parse("x.xlsx", data).text.split("\n") == [
        "Moons", "", "| name | n | seen |", "|---|---|---|", "| Phobos | 3 | 1977-08-12 |",
        "| a\\|b | 0.1 | 2024-05-01T10:30:00 |", "| TRUE | | x y |",
    ]  # fmt: skip


def test_a_sheet_that_spans_millions_of_empty_cells_is_refused_before_it_is_loaded() -> None:
    book = openpyxl.Workbook()
    book.active["A1"], book.active["XFD1048576"] = 1, 2
    buffer = io.BytesIO()
    book.save(buffer)
    started = time.monotonic()
    assert "2 cells in 1,048,576 rows and 16,384 columns" in reason("x.xlsx", buffer.getvalue())
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("text", "second"),
    [
        ("a,b\n1,2\n", "| 1 | 2 |"),
        ("a;b\n1,5;2\n", "| 1,5 | 2 |"),
        ("a\tb\n1, or so\t2\n", "| 1, or so | 2 |"),
        ('a,b\n"x, ""y""\nz",2\n', '| x, "y" z | 2 |'),
        ("only\none\n", "| one |"),
    ],
)
def test_the_delimiter_of_a_csv_file_is_found(text: str, second: str) -> None:
    assert parse("x.csv", text.encode()).text.split("\n")[2] == second


def test_rows_of_sheets_are_documents_if_that_is_wanted(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "name;year;code", "Phobos;1877;007", "Deimos;1877.5;")
    write(tmp_path / "b.csv", "id,title,text,year", "x,Mars,A planet.,1610", ",,,")
    (tmp_path / "c.xlsx").write_bytes(workbook(["name", "n"], ["Phobos", 1]))
    (unit,) = plan_units(str(tmp_path), 10**6).units
    found = {
        item.document_id: item for item in read_documents(unit, Corpus(sheets="rows")) if isinstance(item, Document)
    }
    assert {name: item.text for name, item in found.items()} == {
        "a.csv#2": "name: Phobos\nyear: 1877\ncode: 007",
        "a.csv#3": "name: Deimos\nyear: 1877.5",
        "x": "A planet.",
        "c.xlsx#Moons!2": "name: Phobos\nn: 1",
    }
    assert found["a.csv#2"].metadata == '{"code": "007", "name": "Phobos", "year": 1877}'
    assert (found["x"].title, found["x"].metadata) == ("Mars", '{"year": 1610}')


def test_a_cell_that_is_too_long_is_refused() -> None:
    assert "field larger than field limit" in reason("x.csv", b'a,"' + b"x" * 200_000)


def test_books_name_their_author_and_read_chapters_of_xhtml() -> None:
    parsed = parse("x.epub", make_epub(sentences(1)))
    assert (parsed.title, parsed.metadata) == ("Notes", {"author": "A. Hall"})
    page = '<?xml version="1.0"?><html><head><title/></head><body><a id="x"/><p>one<br/>two</p><div class="a" /></body></html>'
    assert html.parse(page.encode()).text == "one\ntwo"
    assert "EPUB is broken" in reason("x.epub", package("x", {}, {}))


def test_chapters_and_mails_have_no_furniture() -> None:
    chapter = (
        "<header>Chapter head</header><nav>Plan</nav><p>text</p><div class='cookie-notice'>Recipes</div>"
        "<aside epub:type='footnote'>note</aside><footer>end</footer>"
    )
    kept = ["Chapter head", "Plan", "text", "Recipes", "note", "end"]
    book = parse("x.epub", make_epub([chapter, "last"]))
    assert book.text.split("\n") == [*kept, "", "last"]
    made = message("")
    made.set_content(chapter, subtype="html")
    assert parse("x.eml", made.as_bytes()).text.split("\n")[-6:] == kept


def message(body: str = "Hello.") -> email.message.EmailMessage:
    made = email.message.EmailMessage()
    made["Subject"], made["From"], made["To"] = "Möons", "Asaph Hall <hall@a.org>", "b@b.org"
    made["Date"] = "Sun, 12 Aug 1877 10:00:00 +0000"
    made.set_content(body)
    return made


def test_mails_say_who_wrote_and_prefer_plain_text() -> None:
    made = message("Plain text.")
    made.add_alternative("<p>HTML text.</p>", subtype="html")
    parsed = parse("x.eml", made.as_bytes())
    assert parsed.title == "Möons"
    assert (
        parsed.text
        == "From: Asaph Hall <hall@a.org>\nTo: b@b.org\nDate: Sun, 12 Aug 1877 10:00:00 +0000\n\nPlain text."
    )
    assert parsed.metadata == {"author": "Asaph Hall <hall@a.org>", "created": "1877-08-12T10:00:00+00:00"}
    only_html = message("")
    only_html.set_content("<p>10<sup>6</sup></p>", subtype="html")
    assert parse("x.eml", only_html.as_bytes()).text.endswith("\n\n10^6")


def test_attachments_are_read_and_the_others_named(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = message("Inner.")
    inner.add_attachment(b"deep", maintype="text", subtype="plain", filename="deep.txt")
    made = message()
    made.add_attachment(make_docx(sentences(1)), maintype="application", subtype="x", filename="a.docx")
    made.add_attachment(b"not a document", maintype="application", subtype="x", filename="b.docx")
    made.add_attachment(b"\x00\x01", maintype="image", subtype="png", filename="c.png")
    made.add_attachment(inner)
    text = parse("x.eml", made.as_bytes()).text
    blocks = [text.index(found) for found in ("Hello.", "Attachment: a.docx", sentences(1)[2], "Attachment: b.docx")]
    blocks += [text.index(found) for found in ("Attachment: c.png", "Inner.", "deep")]
    assert blocks == sorted(blocks)
    monkeypatch.setattr(parsers, "missing_extra", lambda suffix: "docx" if suffix == ".docx" else None)
    outer = message()
    outer.add_attachment(made.as_bytes(), maintype="application", subtype="x", filename="made.eml")
    for data in (made.as_bytes(), outer.as_bytes()):
        with pytest.raises(
            TransientError, match=r"attachment 'a\.docx' needs a library that is missing; run: .* install "
        ):
            parse("x.eml", data)


def test_an_attachment_that_needs_too_much_memory_does_not_spoil_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: object) -> ParsedFile:
        raise MemoryError

    made = message()
    made.add_attachment(b"", maintype="application", subtype="x", filename="a.docx")
    monkeypatch.setattr(docx, "parse", exhaust)
    assert parse("x.eml", made.as_bytes()).text.endswith("\n\nHello.\n\nAttachment: a.docx")


def test_forwarded_messages_keep_who_wrote_them_when_and_about_what() -> None:
    made = message()
    made.add_attachment(message("Inner."))
    headers = "From: Asaph Hall <hall@a.org>\nTo: b@b.org\nDate: Sun, 12 Aug 1877 10:00:00 +0000"
    assert parse("x.eml", made.as_bytes()).text == f"{headers}\n\nHello.\n\n{headers}\nSubject: Möons\n\nInner."


@pytest.mark.parametrize(
    ("headers", "shown"),
    [
        ('text/plain; name="message"', "a,b"),
        ('text/plain; name="message.txt"', "a,b"),
        ('text/plain; name="x"\nContent-Disposition: inline; filename="x"', "Attachment: x\n\na,b"),
        ('text/x-log; name="x.log"', "Attachment: x.log\n\na,b"),
        ('text/csv; name="x.csv"', "Attachment: x.csv\n\n| a | b |\n|---|---|"),
        ('text/plain\nContent-Disposition: attachment; filename="x.log"', "Attachment: x.log"),
    ],
)
def test_a_name_does_not_make_an_attachment_of_the_body(headers: str, shown: str) -> None:
    text = parse("x.eml", f"From: a@b.org\nContent-Type: {headers}\n\na,b".encode()).text
    assert text == f"From: a@b.org\n\n{shown}"


@pytest.mark.parametrize("date", ["Thu, 1 Jan 1970 00:00:00 +9999999999999", "yesterday", "1 Jan 99999 00:00 +0000"])
def test_a_bad_date_is_kept_as_text(date: str) -> None:
    parsed = parse("x.eml", f"From: a@b.org\nDate: {date}\n\nBody.".encode())
    assert parsed.text == f"From: a@b.org\nDate: {date}\n\nBody."
    assert parsed.metadata["created"] == date


def test_mails_that_are_none_or_too_deep_are_refused() -> None:
    assert "not an e-mail" in reason("x.eml", b"just text\n")
    deep = message()
    for _ in range(30):
        outer = message()
        outer.add_attachment(deep)
        deep = outer
    assert "nested deeper than 20" in reason("x.eml", deep.as_bytes())


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("Mars\n====\n", "Mars"),
        ("====\nMars\n====\n", "Mars"),
        ("=======\n Mars\n=======\n", "Mars"),
        (".. _label:\n\nMars\n----\n", "Mars"),
        ("text\n\n::\n\n   code\n   ----\n", "x"),
        ("| a | b |\n", "x"),
    ],
)
def test_the_title_of_restructured_text_is_its_first_underlined_line(text: str, title: str) -> None:
    parsed = parse("x.rst", text.encode())
    assert (parsed.title, parsed.text) == (title, text)
