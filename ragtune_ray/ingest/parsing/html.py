"""Text of HTML pages, without what belongs to the site and not to the page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ragtune_ray.ingest.parsing import html_text
from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, Scalar, clean, count_characters, decode

# Building a tree of nested blocks takes time quadratic in its depth: 0.03 s at 5,000, 15 s at 80,000.
_MAX_DEPTH = 5_000
_TAG = re.compile(r"<(/?)([A-Za-z][^\s/<>]*)([^<>]*)")
_CHARSET = re.compile(
    rb"""<(?:meta|\?xml)[^<>]{0,200}?(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_:.-]{2,40})""", re.IGNORECASE
)
_EMPTY_ELEMENT = re.compile(r"<([A-Za-z][\w:.-]*)((?:\s[^<>]*?)?)/>")
_UNSEEN = ["script", "style", "template", "noscript"]
# The end tags of these elements are optional or do not exist, so an unclosed one does not mean nesting.
_TAGS_WITHOUT_END = (
    "area,base,body,br,caption,col,colgroup,dd,dt,embed,head,hr,html,img,input,li,link,meta,optgroup,option,p,param,rp,rt,"
    "source,tbody,td,tfoot,th,thead,tr,track,wbr"
)
_SECTIONS = "article,main,section,blockquote,details,fieldset,figure,dialog,td,[role=main],[role=article]"
"""A header, footer or aside inside one of these belongs to it, and is content."""
_MARGINS = "header,footer,aside,[role=banner],[role=contentinfo],[role=complementary]"
_CONTENT = "main,article,h1,[role=main]"
_NAVIGATION = "nav,[role=navigation],[role=search],[aria-label=breadcrumb i],[itemtype*=BreadcrumbList],a.skip-link"
_SUSPECTS = "div,ol,ul,p,section,aside,dialog,form,header,footer,span"
_NAMED = ",".join(
    f'[{name}*="{word}" i]'
    for word in ("cookie", "consent", "gdpr", "breadcrumb", "onetrust")
    for name in ("class", "id", "aria-label")
)
_BREADCRUMB = re.compile(
    r"(?!has-|no-|with-).*bread-?crumbs?(?:[-_]?(?:nav|list|container|wrapper|trail|bar))?", re.IGNORECASE
)
_COOKIES = re.compile(
    r"onetrust.*|cybotcookiebot.*|cookie-?consent|.*(?:cookie|consent|gdpr).*?"
    r"(?:banner|bar|notice|notification|consent|popup|modal|dialog|message|alert|overlay|wall|prompt|law)(?:[-_].*)?",
    re.IGNORECASE,
)


def parse(data: bytes, *, is_xml: bool = False) -> ParsedFile:
    """Title and visible text of a page, with a line per block and tables as Markdown.

    Scripts, navigation, breadcrumbs, cookie banners and the page's own header and footer are left out; those of an article
    stay. `<link rel=canonical>` becomes the metadata `url`.

    Args:
        data: the file.
        is_xml: it is XHTML, in which `<title/>` is an empty element. Otherwise a page is XHTML if it begins with `<?xml`.

    Raises:
        ParseError: the page is nested too deeply, or its encoding is not certain.
    """
    source = _decoded(data)
    if is_xml or source.lstrip("\ufeff").startswith("<?xml"):
        source = _EMPTY_ELEMENT.sub(_as_pair, source)
    return parse_source(source)


def parse_source(source: str) -> ParsedFile:
    """Parse a page that is decoded already.

    Raises:
        ParseError: the page is nested too deeply.
    """
    from selectolax.lexbor import LexborHTMLParser

    depth = _depth(source)
    if depth > _MAX_DEPTH:
        raise ParseError(f"HTML nested {depth:,} elements deep; at most {_MAX_DEPTH:,} are read; save it as plain text")
    tree = LexborHTMLParser(html_text.CONTROLS.sub(" ", source))
    if tree.body is None:
        return ParsedFile("", "")
    heading = tree.css_first("head title") or tree.css_first("h1")
    title, metadata = heading.text() if heading else "", _metadata(tree)
    tree.strip_tags(_UNSEEN)
    plain = tree.body.text()
    _drop_furniture(tree)
    return ParsedFile(title, clean(html_text.write(tree.body)), metadata, plain_characters=count_characters(plain))


def _as_pair(tag: re.Match[str]) -> str:
    """An empty element of XML as HTML has it: without an end, or with one of its own."""
    is_void = tag[1].lower() in {
        "br",
        "hr",
        "img",
        "input",
        "link",
        "meta",
        "wbr",
        "area",
        "base",
        "col",
        "source",
        "embed",
    }
    return tag[0] if is_void else f"<{tag[1]}{tag[2]}></{tag[1]}>"


def _decoded(data: bytes) -> str:
    """Decode UTF-8, else what the page declares, else what is certain."""
    declared = _CHARSET.search(data[:2048])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        if declared is None or data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return decode(data)
    name = declared[1].decode("ascii").lower()
    # Browsers read these names as windows-1252, which has more letters.
    name = "windows-1252" if name in {"iso-8859-1", "latin1", "us-ascii", "ascii"} else name
    try:
        return data.decode(name)
    except (UnicodeDecodeError, LookupError):
        return decode(data)


def _metadata(tree: Any) -> dict[str, Scalar | list[Scalar]]:
    found: dict[str, Scalar | list[Scalar]] = {}
    link = tree.css_first("head link[rel=canonical]")
    if link is not None and (link.attributes.get("href") or "").startswith(("http://", "https://")):
        found["url"] = clean(link.attributes["href"].strip())
    for name, selector in {
        "author": "meta[name=author i]",
        "created": 'meta[property="article:published_time"]',
    }.items():
        node = tree.css_first(f"head {selector}")
        if node is not None and (node.attributes.get("content") or "").strip():
            found[name] = clean(node.attributes["content"].strip())
    return found


def _drop_furniture(tree: Any) -> None:
    sections = {node.mem_id for node in tree.css(_SECTIONS)}
    headings = tree.css("h1")
    is_flat = len(headings) == 1 and tree.css_first("main,article,[role=main]") is None
    # The header of a page without any structure contains its title, and perhaps its abstract.
    titled = _around(headings) if is_flat else set()
    holders = _around(tree.css(_CONTENT))
    inside: dict[int, bool] = {}
    doomed = [
        node for node in tree.css(_MARGINS) if node.mem_id not in titled and not _is_inside(node, sections, inside)
    ]
    doomed += tree.css(_NAVIGATION)
    doomed += [
        node
        for node in tree.css(_NAMED)
        if node.tag in _SUSPECTS.split(",") and node.mem_id not in holders and _is_named(node.attributes)
    ]
    seen = {node.mem_id: node for node in doomed}
    for node in seen.values():
        node.remove()


def _around(nodes: Iterable[Any]) -> set[int]:
    """The nodes themselves and all around them, by `mem_id`; every node is visited once."""
    found: set[int] = set()
    for inner in nodes:
        node = inner
        while node is not None and node.mem_id not in found:
            found.add(node.mem_id)
            node = node.parent
    return found


def _is_inside(node: Any, sections: set[int], known: dict[int, bool]) -> bool:
    """Whether a node is below a section; `known` has the answer for nodes that were passed before."""
    passed = []
    node = node.parent
    while node is not None and node.mem_id not in known and node.mem_id not in sections:
        passed.append(node.mem_id)
        node = node.parent
    found = node is not None and (node.mem_id in sections or known[node.mem_id])
    known.update(dict.fromkeys(passed, found))
    return found


def _is_named(attributes: dict[str, str | None]) -> bool:
    """Whether class, id or label say that an element is a breadcrumb or a cookie banner."""
    names = [*(attributes.get("class") or "").split(), attributes.get("id") or ""]
    label = attributes.get("aria-label") or ""
    asks = attributes.get("role") in {"dialog", "alertdialog", "region"} and "cookie" in label.lower()
    return asks or any(_BREADCRUMB.fullmatch(name) or _COOKIES.fullmatch(name) for name in names if len(name) < 200)


def _depth(source: str) -> int:
    """The nesting depth of a page's tags, found in one pass before the parser builds its tree."""
    without_end = frozenset(_TAGS_WITHOUT_END.split(","))
    depth = deepest = 0
    num_open: Counter[str] = Counter()
    for slash, name, rest in _TAG.findall(source) if source.count("<") > _MAX_DEPTH else ():
        tag = name.lower()
        if tag in without_end:
            continue
        if not slash and not rest.endswith("/"):
            num_open[tag] += 1
            depth += 1
            deepest = max(deepest, depth)
        elif slash and num_open[tag]:  # an end tag without a start tag closes nothing
            num_open[tag] -= 1
            depth -= 1
    return deepest
