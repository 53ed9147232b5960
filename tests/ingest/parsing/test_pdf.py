"""Pages, dates and scanned pages of PDFs."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pypdfium2
import pytest
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

from ragtune_ray.config import Corpus
from ragtune_ray.ingest.parsing.pdf import parse
from ragtune_ray.ingest.parsing.text import TransientError
from tests.support.documents import make_pdf, sentences

OCR = Corpus(ocr="tesseract")


def scanned(texts: list[str]) -> bytes:
    """A page with text, then one that is a picture of text."""
    page = pypdfium2.PdfDocument(make_pdf(texts))[0]
    picture = io.BytesIO()
    page.render(scale=200 / 72).to_pil().save(picture, "PNG")
    buffer = io.BytesIO()
    canvas = Canvas(buffer, pagesize=page.get_size())
    canvas.drawString(72, 700, "Typed page.")
    canvas.showPage()
    canvas.drawImage(ImageReader(picture), 0, 0, *page.get_size())
    canvas.showPage()
    canvas.save()
    return buffer.getvalue()


def test_page_starts_are_offsets_of_pages() -> None:
    texts = sentences(5)
    parsed = parse(make_pdf(texts), Corpus())
    assert [
        parsed.text.startswith(texts[place], start) for place, start in zip((0, 6), parsed.page_starts, strict=True)
    ] == [
        True,
        True,
    ]
    assert parsed.metadata["created"] == "2000-01-01"


def test_scanned_pages_go_to_tesseract_and_typed_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "tesseract"
    command.write_text(f"""#!/bin/sh
head -c 15 > {tmp_path}/picture; cat > /dev/null; echo "$@" > {tmp_path}/arguments; printf 'Recognized.\\n\\f'
""")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    data = scanned(sentences(1))
    assert parse(data, Corpus()).text == "Typed page.\n\n"
    assert parse(data, OCR).text == "Typed page.\n\nRecognized.\n"
    assert (tmp_path / "picture").read_bytes().startswith(b"P5 2481 3508 25")
    assert (tmp_path / "arguments").read_text() == "stdin stdout -l eng\n"
    command.write_text("#!/bin/sh\ncat > /dev/null; echo no such language >&2; exit 1\n")
    with pytest.raises(TransientError, match=r"tesseract failed \(corpus.ocr_languages=eng\): no such language"):
        parse(data, OCR)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(TransientError, match="there is no such command; install it"):
        parse(data, OCR)


@pytest.mark.skipif(not shutil.which("tesseract"), reason="needs tesseract: apt-get install tesseract-ocr")
def test_tesseract_reads_a_scanned_page() -> None:
    found = " ".join(parse(scanned(["Phobos orbits Mars.", "x"]), OCR).text.split())
    assert found == "Typed page. Phobos orbits Mars."
