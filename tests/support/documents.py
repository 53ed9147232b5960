"""Files of all kinds that contain given sentences, made with the libraries that people make such files with."""

from __future__ import annotations

import email.message
import io
import random
import zipfile
from collections.abc import Callable, Sequence

import docx
import openpyxl
import pptx
from pptx.util import Inches
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import getSampleStyleSheet
from reportlab.platypus import PageBreak, Paragraph, SimpleDocTemplate

_SUBJECTS = "Phobos Deimos Mariner Viking Olympus Hellas Tharsis Curiosity Schiaparelli Hall".split()
_VERBS = "orbits crosses measured photographed covers approached left described mapped found".split()
_OBJECTS = (
    "the dust plains|a crater of 94 km|the polar cap in 1877|two probes|an old river bed|the émigré's café".split("|")
)


def sentences(seed: int, number: int = 12) -> list[str]:
    """Sentences that differ from each other and from those of other seeds."""
    generator = random.Random(seed)
    return [
        f"{generator.choice(_SUBJECTS)} {generator.choice(_VERBS)} {generator.choice(_OBJECTS)}, note {seed}-{place}."
        for place in range(number)
    ]


def _saved(document: object) -> bytes:
    buffer = io.BytesIO()
    document.save(buffer)  # type: ignore[attr-defined]
    return buffer.getvalue()


def make_text(texts: Sequence[str]) -> bytes:
    return "\n".join(texts).encode()


def make_markdown(texts: Sequence[str]) -> bytes:
    return ("---\ntitle: Notes\n---\n# Notes\n\n" + "\n\n".join(f"* {text}" for text in texts)).encode()


def make_rst(texts: Sequence[str]) -> bytes:
    return ("Notes\n=====\n\n.. note::\n\n   " + "\n\n".join(texts)).encode()


def make_csv(texts: Sequence[str]) -> bytes:
    return ('"number";"sentence"\n' + "\n".join(f'{place};"{text}"' for place, text in enumerate(texts))).encode()


def make_html(texts: Sequence[str]) -> bytes:
    first, second, third, fourth, *rest = texts
    cells = "".join(f"<tr><td>{place}</td><td>{text}</td></tr>" for place, text in enumerate(rest))
    return (
        f"<!doctype html><title>Notes</title><body><article><header><h1>{first}</h1><p>{second}</p></header>"
        f"<ol><li>{third}<li>{fourth}</ol><table><tr><th>n<th>text</tr>{cells}</table></article></body>"
    ).encode()


def make_docx(texts: Sequence[str]) -> bytes:
    document = docx.Document()
    document.sections[0].header.paragraphs[0].text = texts[0]
    document.add_heading("Notes", 0)
    for text in texts[1:4]:
        document.add_paragraph(text, style="List Number")
    table = document.add_table(rows=0, cols=2)
    for place, text in enumerate(texts[4:-1]):
        for cell, value in zip(table.add_row().cells, (str(place), text), strict=True):
            cell.text = value
    document.sections[0].footer.paragraphs[0].text = texts[-1]
    return _saved(document)


def make_pptx(texts: Sequence[str]) -> bytes:
    presentation = pptx.Presentation()
    middle = len(texts) // 2
    slide = presentation.slides.add_slide(presentation.slide_layouts[1])
    slide.shapes.title.text = texts[0]
    slide.placeholders[1].text = "\n".join(texts[1 : middle - 1])
    slide.notes_slide.notes_text_frame.text = texts[middle - 1]
    slide = presentation.slides.add_slide(presentation.slide_layouts[5])
    slide.shapes.title.text = texts[middle]
    group = slide.shapes.add_group_shape()
    box = group.shapes.add_textbox(Inches(1), Inches(1), Inches(4), Inches(1))
    box.text_frame.text = texts[middle + 1]
    rest = texts[middle + 2 :]
    table = slide.shapes.add_table(len(rest), 2, Inches(1), Inches(2), Inches(8), Inches(3)).table
    for place, text in enumerate(rest):
        table.cell(place, 0).text, table.cell(place, 1).text = str(place), text
    return _saved(presentation)


def make_xlsx(texts: Sequence[str]) -> bytes:
    book = openpyxl.Workbook()
    middle = len(texts) // 2
    for sheet, part in ((book.active, texts[:middle]), (book.create_sheet("More"), texts[middle:])):
        sheet.append(["number", "sentence"])
        for place, text in enumerate(part):
            sheet.append([place, text])
    return _saved(book)


def make_pdf(texts: Sequence[str]) -> bytes:
    buffer = io.BytesIO()
    styles = getSampleStyleSheet()
    middle = len(texts) // 2
    story = [Paragraph(text, styles["Normal"]) for text in texts]
    SimpleDocTemplate(buffer, pagesize=A4, title="Notes", invariant=True).build(
        [*story[:middle], PageBreak(), *story[middle:]]
    )
    return buffer.getvalue()


def make_epub(texts: Sequence[str]) -> bytes:
    middle = len(texts) // 2
    chapters = {"one.xhtml": texts[:middle], "text/two two.xhtml": texts[middle:]}
    items = "".join(
        f'<item id="c{place}" href="{name.replace(" ", "%20")}" media-type="application/xhtml+xml"/>'
        for place, name in enumerate(chapters)
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>',
        )
        archive.writestr(
            "OEBPS/book.opf",
            '<package xmlns="http://www.idpf.org/2007/opf"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
            "<dc:title>Notes</dc:title><dc:creator>A. Hall</dc:creator></metadata><manifest>"
            f'{items}<item id="nav" properties="nav" href="nav.xhtml"/></manifest>'
            '<spine><itemref idref="nav"/><itemref idref="c0"/><itemref idref="c1"/></spine></package>',
        )
        archive.writestr("OEBPS/nav.xhtml", "<html><body><nav><a>Contents</a></nav></body></html>")
        for name, part in chapters.items():
            body = "".join(f"<p>{text}</p>" for text in part)
            archive.writestr(
                f"OEBPS/{name}", f'<?xml version="1.0"?><html><head><title/></head><body>{body}</body></html>'
            )
    return buffer.getvalue()


def make_eml(texts: Sequence[str]) -> bytes:
    message = email.message.EmailMessage()
    message["Subject"], message["From"], message["To"] = "Notes", "Asaph Hall <hall@a.org>", "b@b.org"
    message["Date"] = "Sun, 12 Aug 1877 10:00:00 +0000"
    middle = len(texts) // 2
    message.set_content("\n".join(texts[:middle]))
    message.add_alternative("".join(f"<p>{text}</p>" for text in texts[:middle]), subtype="html")
    message.add_attachment(make_docx(texts[middle:]), maintype="application", subtype="octet-stream", filename="a.docx")
    return message.as_bytes()


MAKERS: dict[str, Callable[[Sequence[str]], bytes]] = {
    ".txt": make_text,
    ".md": make_markdown,
    ".rst": make_rst,
    ".csv": make_csv,
    ".html": make_html,
    ".docx": make_docx,
    ".pptx": make_pptx,
    ".xlsx": make_xlsx,
    ".pdf": make_pdf,
    ".epub": make_epub,
    ".eml": make_eml,
}
"""Suffix -> makes a file with at least 12 sentences."""
