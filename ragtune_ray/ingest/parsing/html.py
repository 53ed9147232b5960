"""Text of HTML pages, without what belongs to the site and not to the page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

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
_MARGINS = "header:not(#title-block-header),footer,aside:not([role^=doc-]),[role=banner],[role=contentinfo],[role=complementary]"
"""Not the title, author and date that pandoc writes, nor footnotes."""
_NAVIGATION = "nav,[role=navigation],[role=search]"
_MAIN = "article,main,[role=main],[role=article]"
"""Names say nothing inside one of these: a manual has sections on cookie banners."""
_TRAILS = "[aria-label=breadcrumb i],[itemtype*=BreadcrumbList],a.skip-link"
_SUSPECTS = frozenset(["div", "ol", "ul", "p", "section", "aside", "dialog", "form", "header", "footer", "span"])
_NAMED = ",".join(
    f'[{name}*="{word}" i]'
    for word in ("cookie", "consent", "gdpr", "breadcrumb", "onetrust")
    for name in ("class", "id", "aria-label")
)
_BREADCRUMB = re.compile(
    r"(?!has-|no-|with-).*bread-?crumbs?(?:[-_]?(?:nav|list|container|wrapper|trail|bar))?", re.IGNORECASE
)
_COOKIES = re.compile(
    r"onetrust.*|cybotcookiebot.*|cookie-?consent|.*cookie[-_]?law(?:[-_].*)?|.*(?:cookie|consent|gdpr).*?"
    r"(?:banner|bar|notice|notification|consent|popup|modal|dialog|message|alert|overlay|wall|prompt)(?:[-_].*)?",
    re.IGNORECASE,
)
_HEADINGS = frozenset(["h1", "h2", "h3", "h4", "h5", "h6"])
_CONTROLS = frozenset(["button", "input", "select", "textarea"])
_MAX_CHARACTERS = 300
"""Letters and digits of a breadcrumb, or of a banner without a button, which then has no heading either."""
_MAX_CHARACTERS_WITH_BUTTON = 1_000
_MAX_CHARACTERS_OF_PAGE = 2_000
"""If names would remove more from a page than this, they mean something else on it and remove nothing."""


def parse(data: bytes, *, is_xml: bool = False, has_furniture: bool = True) -> ParsedFile:
    """Title and visible text of a page, with a line per block and tables as Markdown.

    Scripts, navigation, breadcrumbs, cookie banners and the page's own header and footer are left out; those of an article
    stay. `<link rel=canonical>` becomes the metadata `url`.

    Args:
        data: the file.
        is_xml: it is XHTML, in which `<title/>` is an empty element. Otherwise a page is XHTML if it begins with `<?xml`.
        has_furniture: it is a page of a site. A chapter of a book is not: all of its text is content.

    Raises:
        ParseError: the page is nested too deeply, or its encoding is not certain.
    """
    source = _decoded(data)
    if is_xml or source.lstrip("\ufeff").startswith("<?xml"):
        source = _EMPTY_ELEMENT.sub(_as_pair, source)
    return parse_source(source, has_furniture=has_furniture)


def parse_source(source: str, *, has_furniture: bool = True) -> ParsedFile:
    """Parse a page that is decoded already.

    Args:
        source: the page.
        has_furniture: as in `parse`.

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
    if has_furniture:
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


class _Contents(NamedTuple):
    num_characters: int
    has_heading: bool
    has_control: bool


def _drop_furniture(tree: Any) -> None:
    """Remove the furniture of a page; by its name alone only what is short and outside the page's main part."""
    sections = {node.mem_id for node in tree.css(_SECTIONS)}
    headings = tree.css("h1")
    is_flat = len(headings) == 1 and tree.css_first("main,article,[role=main]") is None
    # The header of a page without any structure contains its title, and perhaps its abstract.
    titled = _around(headings) if is_flat else set()
    inside: dict[int, bool] = {}
    doomed = [
        node for node in tree.css(_MARGINS) if node.mem_id not in titled and not _is_inside(node, sections, inside)
    ]
    doomed += tree.css(_NAVIGATION)
    doomed += _named(tree, headings)
    seen = {node.mem_id: node for node in doomed}
    for node in seen.values():
        node.remove()


def _named(tree: Any, headings: list[Any]) -> list[Any]:
    """The elements that a name or label calls furniture, and whose contents allow it."""
    main = tree.css(_MAIN)
    main_ids = {node.mem_id for node in main}
    holders = _around([*main, *headings])
    trails = {node.mem_id for node in tree.css(_TRAILS)}
    found: dict[int, Any] = {}
    kept: set[int] = set()
    inside: dict[int, bool] = {}
    known: dict[int, _Contents] = {}
    for node in reversed(tree.css(f"{_TRAILS},{_NAMED}")):  # inner ones first: `known` spares a second look at them
        key = node.mem_id
        is_trail, is_banner = _claims(node) if key not in trails else (True, False)
        if not (is_trail or is_banner) or key in holders or (key not in trails and _is_inside(node, main_ids, inside)):
            continue
        known[key] = _contents(node, known)
        if _is_furniture(node, known[key], is_banner=is_banner):
            found[key] = node
        else:
            kept.add(key)
    # What stays, stays whole.
    in_kept: dict[int, bool] = {}
    found = {key: node for key, node in found.items() if key in trails or not _is_inside(node, kept, in_kept)}
    found_ids = set(found)
    in_found: dict[int, bool] = {}
    outermost = {key: node for key, node in found.items() if not _is_inside(node, found_ids, in_found)}
    is_little = sum(known[key].num_characters for key in outermost) <= _MAX_CHARACTERS_OF_PAGE
    return list(outermost.values()) if is_little else []


def _claims(node: Any) -> tuple[bool, bool]:
    """Whether class, id or label of an element say that it is a breadcrumb, or a cookie banner."""
    if node.tag not in _SUSPECTS:
        return False, False
    attributes = node.attributes
    names = [*(attributes.get("class") or "").split(), attributes.get("id") or ""]
    names = [name for name in names if len(name) < 200]
    label = attributes.get("aria-label") or ""
    asks = attributes.get("role") in {"dialog", "alertdialog", "region"} and "cookie" in label.lower()
    return any(map(_BREADCRUMB.fullmatch, names)), asks or any(map(_COOKIES.fullmatch, names))


def _is_furniture(node: Any, contents: _Contents, *, is_banner: bool) -> bool:
    """Whether an element of such a name may go: it is short, and no section of the text."""
    if contents.has_heading and (not is_banner or _is_section(node)):
        return False
    if is_banner and contents.has_control:
        return contents.num_characters <= _MAX_CHARACTERS_WITH_BUTTON
    return contents.num_characters <= _MAX_CHARACTERS and not contents.has_heading


def _contents(root: Any, known: dict[int, _Contents]) -> _Contents:
    """What is below an element; `known` has it for elements inside."""
    num_characters = 0
    has_heading = has_control = False
    node = root.first_child
    while node is not None:
        below = known.get(node.mem_id)
        if below is not None:
            num_characters += below.num_characters
            has_heading |= below.has_heading
            has_control |= below.has_control
        elif node.tag == "-text":
            num_characters += count_characters(node.text_content or "")
        else:
            has_heading |= node.tag in _HEADINGS
            has_control |= node.tag in _CONTROLS
        child = node.first_child if below is None else None
        if child is not None:
            node = child
            continue
        while node.next is None and node.parent.mem_id != root.mem_id:
            node = node.parent
        node = node.next
    return _Contents(num_characters, has_heading, has_control)


def _is_section(node: Any) -> bool:
    """Whether an element is a section, of HTML 5 or as Sphinx and pandoc write it, whose ids come from headings."""
    return node.tag == "section" or "section" in (node.attributes.get("class") or "").split()


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
