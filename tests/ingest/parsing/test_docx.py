"""Word documents: the text that a reader sees, once and in order."""

from __future__ import annotations

import io

import docx as python_docx
import pytest

from ragtune_ray.ingest.parsing.archives import open_package
from ragtune_ray.ingest.parsing.docx import parse
from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, count_characters
from tests.support.office_files import docx, package, paragraph, part

LIMIT = 1_000_000


def read(body: str, **parts: str) -> list[str]:
    return parse(docx(body, **parts), LIMIT).text.split("\n")


def run(text: str, properties: str = "") -> str:
    return f"<w:r><w:rPr>{properties}</w:rPr><w:t>{text}</w:t></w:r>"


def test_content_controls_are_read_as_blocks_in_lines_in_rows_and_in_cells() -> None:
    inline = (
        f"<w:p>{run('a ')}<w:sdt><w:sdtPr><w:alias/></w:sdtPr><w:sdtContent>{run('b')}</w:sdtContent></w:sdt></w:p>"
    )
    block = f"<w:sdt><w:sdtContent>{paragraph('c')}<w:sdt><w:sdtContent>{paragraph('d')}</w:sdtContent></w:sdt></w:sdtContent></w:sdt>"
    cell = f"<w:tc>{paragraph('e')}</w:tc>"
    wrapped = f"<w:sdt><w:sdtContent><w:tc>{paragraph('f')}</w:tc></w:sdtContent></w:sdt>"
    rows = f"<w:tr>{cell}{wrapped}</w:tr><w:sdt><w:sdtContent><w:tr>{cell}{wrapped}</w:tr></w:sdtContent></w:sdt>"
    found = read(inline + block + f"<w:tbl>{rows}</w:tbl>" + f"<w:customXml>{paragraph('g')}</w:customXml>")
    assert found == ["a b", "c", "d", "| e | f |", "|---|---|", "| e | f |", "g"]


def test_tracked_changes_are_accepted() -> None:
    deleted = "<w:del><w:r><w:delText>old </w:delText></w:r></w:del>"
    line = f"<w:p>{run('one ')}{deleted}<w:ins>{run('new ')}</w:ins>{run('two')}</w:p>"
    moved = f"<w:p><w:moveFrom>{run('away')}</w:moveFrom><w:moveTo>{run('here')}</w:moveTo></w:p>"
    joined = paragraph("first ", "<w:rPr><w:del/></w:rPr>") + paragraph("second")
    gone = f"<w:tr><w:trPr><w:del/></w:trPr><w:tc>{paragraph('x')}</w:tc><w:tc>{paragraph('y')}</w:tc></w:tr>"
    kept = f"<w:tr><w:trPr><w:ins/></w:trPr><w:tc>{paragraph('p')}</w:tc><w:tc>{paragraph('q')}</w:tc></w:tr>"
    found = read(line + moved + joined + f"<w:tbl>{gone}{kept}</w:tbl>")
    assert found == ["one new two", "here", "first second", "| p | q |", "|---|---|"]


def test_text_boxes_are_read_once_after_their_paragraph() -> None:
    box = f"<w:txbxContent>{paragraph('boxed')}{paragraph('again')}</w:txbxContent>"
    new = f'<mc:Choice Requires="wps"><w:drawing><wps:txbx>{box}</wps:txbx></w:drawing></mc:Choice>'
    old = f"<mc:Fallback><w:pict><v:textbox>{box}</v:textbox></w:pict></mc:Fallback>"
    body = f"<w:p>{run('before ')}<w:r><mc:AlternateContent>{new}{old}</mc:AlternateContent></w:r>{run('after')}</w:p>"
    assert read(body) == ["before after", "boxed", "again"]
    legacy = f"<w:p>{run('host')}<w:r><w:pict><v:textbox>{box}</v:textbox></w:pict></w:r></w:p>"
    assert read(legacy) == ["host", "boxed", "again"]
    empty = f"<w:p><mc:AlternateContent><mc:Choice Requires='x'/>{old}</mc:AlternateContent></w:p>"
    assert read(empty) == ["", "boxed", "again"]


def test_headers_and_footers_are_read_once_around_the_body() -> None:
    section = '<w:sectPr><w:headerReference r:id="{}"/><w:footerReference r:id="footer"/></w:sectPr>'
    body = (
        paragraph("one", section.format("header"))
        + paragraph("two", section.format("header2"))
        + section.format("header")
    )
    parts = {"header": paragraph("Top"), "header2": paragraph("Top"), "footer": paragraph("Bottom")}
    parsed = parse(docx(body, **parts), LIMIT)
    assert parsed.text.split("\n") == ["Top", "one", "two", "Bottom"]
    assert parsed.plain_characters == len("ToponetwoBottom")


def numbering(*levels: tuple[str, str], extra: str = "") -> str:
    rows = "".join(
        f'<w:lvl w:ilvl="{place}"><w:start w:val="1"/><w:numFmt w:val="{form}"/><w:lvlText w:val="{text}"/></w:lvl>'
        for place, (form, text) in enumerate(levels)
    )
    first = '<w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num>'
    return f'<w:abstractNum w:abstractNumId="0">{rows}</w:abstractNum>{first}{extra}'


def item(text: str, level: int = 0, number: int = 1) -> str:
    return paragraph(text, f'<w:numPr><w:ilvl w:val="{level}"/><w:numId w:val="{number}"/></w:numPr>')


def test_list_numbers_are_those_that_word_shows() -> None:
    lists = numbering(("decimal", "%1."), ("lowerLetter", "%1.%2)"), ("bullet", "•"))
    body = (
        item("a")
        + item("b")
        + item("c", 1)
        + item("d", 1)
        + item("e", 2)
        + paragraph("text")
        + item("f")
        + item("g", 1)
    )
    found = read(body, numbering=lists)
    assert found == ["1. a", "2. b", "2.a) c", "2.b) d", "- e", "text", "3. f", "3.a) g"]
    restart = '<w:num w:numId="2"><w:abstractNumId w:val="0"/><w:lvlOverride w:ilvl="0"><w:startOverride w:val="4"/></w:lvlOverride></w:num>'
    lists = numbering(("upperRoman", "Article %1:"), extra=restart)
    found = read(item("a") + item("b", number=2) + item("c", number=2) + item("d"), numbering=lists)
    assert found == ["Article I: a", "Article IV: b", "Article V: c", "Article VI: d"]


def test_list_numbers_of_styles_are_kept_and_number_0_takes_them_away() -> None:
    document = python_docx.Document()
    for text in ("one", "two"):
        document.add_paragraph(text, style="List Number")
    document.add_paragraph("dot", style="List Bullet")
    buffer = io.BytesIO()
    document.save(buffer)
    assert parse(buffer.getvalue(), LIMIT).text.split("\n") == ["1. one", "2. two", "- dot"]
    assert read(item("a", number=0), numbering=numbering(("decimal", "%1."))) == ["a"]


def test_the_title_is_the_paragraph_of_style_title() -> None:
    document = python_docx.Document()
    document.core_properties.title = "Stale"
    document.core_properties.author = "A. Hall"
    document.add_paragraph("Moons of Mars", style="Title")
    buffer = io.BytesIO()
    document.save(buffer)
    parsed = parse(buffer.getvalue(), LIMIT)
    assert (parsed.title, parsed.text, parsed.metadata["author"]) == ("Moons of Mars", "Moons of Mars", "A. Hall")


def test_notes_follow_their_paragraph() -> None:
    notes = f'<w:footnote w:type="separator" w:id="0">{paragraph("-")}</w:footnote><w:footnote w:id="1">{paragraph("note")}</w:footnote>'
    ends = f'<w:endnote w:id="1">{paragraph("end")}</w:endnote>'
    body = f'<w:p>{run("a")}<w:r><w:footnoteReference w:id="1"/></w:r>{run("b")}<w:r><w:endnoteReference w:id="1"/></w:r></w:p>'
    assert read(body + paragraph("c"), footnotes=notes, endnotes=ends) == ["a[1]b[2]", "[1] note", "[2] end", "c"]


def test_raised_and_lowered_characters_keep_their_meaning() -> None:
    up, down = '<w:vertAlign w:val="superscript"/>', '<w:vertAlign w:val="subscript"/>'
    body = f"<w:p>{run('10')}{run('6', up)}{run(' m')}{run('2', up)}{run(' H')}{run('2', down)}{run('O, 1')}{run('st', up)}</w:p>"
    assert read(body) == ["10^6 m² H₂O, 1st"]
    math = "<m:sSup><m:e><m:r><m:t>x</m:t></m:r></m:e><m:sup><m:r><m:t>2</m:t></m:r></m:sup></m:sSup>"
    half = "<m:f><m:num><m:r><m:t>1</m:t></m:r></m:num><m:den><m:r><m:t>2</m:t></m:r></m:den></m:f>"
    assert read(f"<w:p><m:oMath>{math}{half}</m:oMath></w:p>") == ["x^21/2"]


def test_symbols_are_read_unless_malformed_or_of_a_symbol_font() -> None:
    for code, shown in {"2192": "→", "1F600": "😀", "F0B7": "", "ZZ": "", "": "", "-1": "", "FFFFFF": ""}.items():
        assert read(f'<w:p>{run("a")}<w:r><w:sym w:char="{code}"/></w:r>{run("b")}</w:p>') == [f"a{shown}b"]
    assert read(f"<w:p>{run('a')}<w:r><w:sym/></w:r></w:p>") == ["a"]


def test_a_file_that_needs_too_much_memory_is_not_called_broken() -> None:
    with pytest.raises(MemoryError), open_package("DOCX", docx(paragraph("a")), LIMIT):
        raise MemoryError


def test_diagrams_and_charts_are_read() -> None:
    diagram = "<dgm:ptLst><dgm:pt><dgm:t><a:p><a:r><a:t>step</a:t></a:r></a:p></dgm:t></dgm:pt></dgm:ptLst>"
    chart = "<a:p><a:r><a:t>Sales</a:t></a:r></a:p><c:strCache><c:pt><c:v>North</c:v></c:pt></c:strCache>"
    body = '<w:p><w:drawing><dgm:relIds r:dm="diagramData"/><c:chart r:id="chart"/></w:drawing></w:p>'
    assert read(body, diagramData=diagram, chart=chart) == ["", "step", "Sales", "North"]


def test_tables_that_only_arrange_are_read_as_blocks() -> None:
    inner = f"<w:tbl><w:tr><w:tc>{paragraph('a')}</w:tc><w:tc>{paragraph('b')}</w:tc></w:tr></w:tbl>"
    outer = f"<w:tbl><w:tr><w:tc>{paragraph('left')}</w:tc><w:tc>{inner}</w:tc></w:tr></w:tbl>"
    assert read(outer) == ["left", "| a | b |", "|---|---|"]
    assert read(f"<w:tbl><w:tr><w:tc>{paragraph('x')}{paragraph('y')}</w:tc></w:tr></w:tbl>") == ["x", "y"]
    merged = '<w:tc><w:tcPr><w:gridSpan w:val="999999999"/></w:tcPr>{}</w:tc>'.format(paragraph("wide"))
    assert read(f"<w:tbl><w:tr>{merged}<w:tc>{paragraph('z')}</w:tc></w:tr></w:tbl>") == ["| wide | z |", "|---|---|"]


def test_strict_documents_are_read() -> None:
    strict = part("w:document", f"<w:body>{paragraph('strict')}</w:body>").replace(
        "http://schemas.openxmlformats.org/wordprocessingml/2006/main",
        "http://purl.oclc.org/ooxml/wordprocessingml/main",
    )
    assert parse(package("word/document.xml", {"word/document.xml": strict}, {}), LIMIT).text == "strict"


def reason(data: bytes) -> str:
    with pytest.raises(ParseError) as caught:
        parse(data, LIMIT)
    return str(caught.value)


def test_entities_are_not_expanded_and_nothing_is_fetched() -> None:
    declared = '<!DOCTYPE d [<!ENTITY a "secret"><!ENTITY b SYSTEM "file:///etc/passwd">]>'
    document = declared + part("w:document", f"<w:body>{paragraph('x&a;&b;y')}</w:body>")
    assert parse(package("word/document.xml", {"word/document.xml": document}, {}), LIMIT).text in {"x", "xy"}


def test_files_that_are_no_document_are_refused() -> None:
    assert "no main part" in reason(package("missing.xml", {}, {}))
    assert "format before 2007" in reason(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")
    assert "DOCX is broken" in reason(docx("<w:sdt>" * 3_000 + "</w:sdt>" * 3_000))
    assert "DOCX is broken" in reason(docx("<w:p>"))


def test_nothing_is_lost_against_the_plain_text_of_a_document() -> None:
    document = python_docx.Document()
    document.add_heading("Head", 0)
    document.add_paragraph("Body text, number 1.", style="List Number")
    buffer = io.BytesIO()
    document.save(buffer)
    parsed: ParsedFile = parse(buffer.getvalue(), LIMIT)
    assert parsed.plain_characters == len("HeadBodytextnumber1")
    assert count_characters(parsed.text) == parsed.plain_characters + len("1")
