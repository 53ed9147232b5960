"""Small Office files, written part by part."""

from __future__ import annotations

import io
import zipfile

_RELATION = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_SPACES = " ".join(
    f'xmlns:{name}="{url}"'
    for name, url in {
        "w": "http://schemas.openxmlformats.org/wordprocessingml/2006/main",
        "r": _RELATION,
        "m": "http://schemas.openxmlformats.org/officeDocument/2006/math",
        "mc": "http://schemas.openxmlformats.org/markup-compatibility/2006",
        "wps": "http://schemas.microsoft.com/office/word/2010/wordprocessingShape",
        "v": "urn:schemas-microsoft-com:vml",
        "a": "http://schemas.openxmlformats.org/drawingml/2006/main",
        "p": "http://schemas.openxmlformats.org/presentationml/2006/main",
        "dgm": "http://schemas.openxmlformats.org/drawingml/2006/diagram",
        "c": "http://schemas.openxmlformats.org/drawingml/2006/chart",
    }.items()
)


def package(main: str, parts: dict[str, str], links: dict[str, dict[str, tuple[str, str]]]) -> bytes:
    """A zip of XML parts; `links` has for each part (or "") its relationships: id -> (kind, target)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
        for name, found in ({"": {"rId1": ("officeDocument", main)}} | links).items():
            folder, _, base = name.rpartition("/")
            rows = "".join(
                f'<Relationship Id="{key}" Type="{_RELATION}/{kind}" Target="{target}"/>'
                for key, (kind, target) in found.items()
            )
            archive.writestr(
                f"{folder}/_rels/{base}.rels".lstrip("/"),
                f'<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{rows}</Relationships>',
            )
    return buffer.getvalue()


def part(root: str, content: str) -> str:
    """The XML of a part with the root element `root`, such as `w:document`."""
    return f"<{root} {_SPACES}>{content}</{root}>"


def docx(body: str, **parts: str) -> bytes:
    """A Word document; parts are named by their kind, such as `header` or `numbering`, with a number where needed.

    The relationship id of a part is its name: `<w:headerReference r:id="header"/>`.
    """
    roots = {"header": "w:hdr", "footer": "w:ftr", "footnotes": "w:footnotes", "endnotes": "w:endnotes"}
    roots |= {"numbering": "w:numbering", "styles": "w:styles", "diagramData": "dgm:dataModel", "chart": "c:chartSpace"}
    kinds = {name: name.rstrip("0123456789") for name in parts}
    contents = {f"word/{name}.xml": part(roots[kinds[name]], content) for name, content in parts.items()}
    contents["word/document.xml"] = part("w:document", f"<w:body>{body}</w:body>")
    links = {"word/document.xml": {name: (kinds[name], f"{name}.xml") for name in parts}}
    return package("word/document.xml", contents, links)


def paragraph(text: str, properties: str = "") -> str:
    """A paragraph with one run."""
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"
