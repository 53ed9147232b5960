"""Files of every type become text, or a ParseError with the reason."""

from __future__ import annotations

import io
import random
import zipfile
from typing import Any

import docx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray.config import Corpus
from ragtune_ray.ingest import parsers
from ragtune_ray.ingest.parsers import parse_file
from ragtune_ray.ingest.parsing import pdf
from ragtune_ray.ingest.parsing.text import ParseError, clean, decode

CORPUS = Corpus(max_document_bytes=1_000_000)


def title_and_text(name: str, data: bytes) -> tuple[str, str]:
    parsed = parse_file(name, data, CORPUS)
    return parsed.title, parsed.text


def make_pdf(*pages: str, title: str = "") -> bytes:
    """A minimal PDF with one line of text per page and a correct cross-reference table."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        content = f"BT /F1 24 Tf 72 720 Td ({text}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    objects.append(f"<< /Title ({title}) >>")
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    count = len(objects) + 1
    trailer = f"trailer\n<< /Size {count} /Root 1 0 R /Info {len(objects)} 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return body + f"xref\n0 {count}\n0000000000 65535 f \n{table}{trailer}".encode()


def make_docx(title: str = "") -> bytes:
    document = docx.Document()
    document.core_properties.title = title
    document.add_paragraph("Before.")
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip((cell for row in table.rows for cell in row.cells), "abcd", strict=True):
        cell.text = text
    table.rows[1].cells[0].merge(table.rows[1].cells[1])
    document.add_paragraph("After.")
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def reason(call: Any, *arguments: Any) -> str:
    with pytest.raises(ParseError) as caught:
        call(*arguments)
    return str(caught.value)


def test_clean_replaces_only_what_arrow_and_tokenizers_refuse() -> None:
    assert clean("\ufeffa\r\nb\rc\x00\ud800\ufeff") == "a\nb\nc\ufffd\ufffd\ufeff"
    assert clean("e\u0301") == "e\u0301"


@given(st.text(st.characters()))
def test_cleaned_text_is_stable_and_can_be_encoded(text: str) -> None:
    cleaned = clean(text)
    cleaned.encode()
    assert "\r" not in cleaned
    assert "\x00" not in cleaned
    assert clean(cleaned) == cleaned.removeprefix("\ufeff")


def test_decode_accepts_another_encoding_only_if_certain() -> None:
    chinese = "人工智能是计算机科学的一个分支，它企图了解智能的实质。中国的首都是北京，上海是最大的城市。"
    assert decode(chinese.encode("gb18030")) == chinese
    assert decode("Hello wörld".encode("utf-16")) == "Hello wörld"
    french = "Le château était à côté de l'église, où les élèves jouaient."
    assert decode(french.encode("latin-1")) == french
    assert "iconv" in reason(decode, french.encode("mac_roman"))
    assert "not UTF-8 (byte 0xff at 0)" in reason(decode, b"\xff\xff\x00\x01\x80\x81")


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("intro\n# Mars #\nx", "Mars"),
        ("```\n# comment\n```\n# Real\n", "Real"),
        ("#tag\n## Two\n", "notes"),
        ("", "notes"),
    ],
)
def test_markdown_is_unchanged_and_titled_by_its_first_heading(text: str, title: str) -> None:
    assert title_and_text("a/notes.md", text.encode()) == (title, text)


def test_plain_text_is_titled_by_its_file_name() -> None:
    assert title_and_text("a/log.v2.txt", b"\xef\xbb\xbfx\r\ny") == ("log.v2", "x\ny")


def test_html_separates_blocks_and_drops_navigation_and_scripts() -> None:
    page = """<html><head><title> Red
      planet</title><style>p{}</style></head><body><header>H</header><nav>N</nav><p>One
      <b>bo</b>ld</p><p>two<br>three</p><script>alert(1)</script><template>T</template><noscript>S</noscript>
      <pre>x = 1
  y = 2</pre><table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table><aside>A</aside>
      <footer>F</footer></body></html>"""
    title, text = title_and_text("x.html", page.encode())
    assert title == "Red planet"
    assert text.split("\n") == ["One bold", "two", "three", "x = 1", "  y = 2", "| a | b |", "|---|---|", "| c |"]
    assert title_and_text("x.htm", b"<h1>Top</h1>text") == ("Top", "Top\ntext")
    assert title_and_text("x.html", b"") == ("x", "")
    latin = '<meta charset="iso-8859-1"><p>Le château'.encode("latin-1")
    assert title_and_text("x.html", latin)[1] == "Le château"


def test_pdf_pages_are_joined_by_a_blank_line() -> None:
    assert title_and_text("x.pdf", make_pdf("Page one", "Page two", title="Probe")) == (
        "Probe",
        "Page one\n\nPage two",
    )
    assert title_and_text("x.pdf", make_pdf("One")) == ("x", "One")


def test_broken_empty_encrypted_or_endless_pdf_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be opened" in reason(parse_file, "x.pdf", b"%PDF-1.4 garbage", CORPUS)
    assert "run OCR" in reason(parse_file, "x.pdf", make_pdf(""), CORPUS)
    encryption = (
        f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'11' * 32}> /U <{'22' * 32}> >> /ID [<00> <00>] >>\nst"
    )
    locked = make_pdf("One").replace(b">>\nst" + b"artxref", encryption.encode() + b"artxref")
    assert "it is encrypted" in reason(parse_file, "x.pdf", locked, CORPUS)
    monkeypatch.setattr(pdf, "_MAX_PAGES", 1)
    assert "PDF of 2 pages; at most 1" in reason(parse_file, "x.pdf", make_pdf("One", "Two"), CORPUS)


def test_docx_text_keeps_its_order_with_merged_cells_once() -> None:
    title, text = title_and_text("x.docx", make_docx("Probe"))
    assert title == "Probe"
    assert text == "Before.\n| a | b |\n|---|---|\n| c d |\nAfter."
    assert title_and_text("x.docx", make_docx())[0] == "x"


def test_docx_that_unpacks_to_too_much_is_refused_unopened() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"0" * 30_000)
    assert "unpacks to 30,000 bytes" in reason(
        parse_file, "x.docx", buffer.getvalue(), Corpus(max_document_bytes=1_000)
    )
    assert "DOCX is broken" in reason(parse_file, "x.docx", buffer.getvalue(), CORPUS)


def test_damaged_docx_and_pdf_return_text_or_raise_parse_error() -> None:
    generator = random.Random(0)
    read = refused = 0
    for name, whole in (("x.docx", make_docx()), ("x.pdf", make_pdf("Page one", "Page two"))):
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(generator.randint(1, 20)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            try:
                parse_file(name, bytes(data[: generator.randint(len(data) // 2, len(data) * 2)]), CORPUS)
                read += 1
            except ParseError:
                refused += 1
    assert read
    assert refused


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsers.importlib.util, "find_spec", lambda _: None)
    suffixes = (".pdf", ".docx", ".html", ".eml", ".epub", ".pptx", ".xlsx", ".md", ".csv", ".jsonl")
    found = [parsers.missing_extra(suffix) for suffix in suffixes]
    assert found == ["pdf", "docx", "html", "html", "epub", "office", "office", None, None, None]


@pytest.mark.parametrize("tag", ["div", "span", "B", "my-tag class=x"])
def test_html_nested_too_deeply_is_refused_before_parsing(tag: str) -> None:
    assert title_and_text("x.html", f"<{tag}>x".encode() * 5_000)[1]
    message = reason(parse_file, "x.html", f"<{tag}>x".encode() * 5_001, CORPUS)
    assert "HTML nested 5,001 elements deep; at most 5,000" in message


@pytest.mark.parametrize(
    "element", ["<p>x", "<LI>x", "<br>x", "<td>x", "<div><b>x</b></div>", "<img/>x", "<svg/>x", "</i>x"]
)
def test_html_with_many_sibling_elements_is_read(element: str) -> None:
    assert title_and_text("x.html", element.encode() * 6_000)[1].count("x") == 6_000


def test_end_tag_without_start_does_not_hide_nesting() -> None:
    assert "nested 5,001" in reason(parse_file, "x.html", b"<div></i>x" * 5_001, CORPUS)
