"""Text of HTML pages."""

from __future__ import annotations

import re
from collections import Counter

from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, clean, count_characters

# Building a tree of nested blocks takes time quadratic in its depth: 0.03 s at 5,000, 15 s at 80,000.
_MAX_DEPTH = 5_000
_TAG = re.compile(r"<(/?)([A-Za-z][^\s/<>]*)([^<>]*)")
_DROPPED_TAGS = ["script", "style", "nav", "footer", "header", "aside", "template", "noscript"]
# The end tags of these elements are optional or do not exist, so an unclosed one does not mean nesting.
_TAGS_WITHOUT_END = (
    "area,base,body,br,caption,col,colgroup,dd,dt,embed,head,hr,html,img,input,li,link,meta,optgroup,option,p,param,rp,rt,"
    "source,tbody,td,tfoot,th,thead,tr,track,wbr"
)
_BLOCK_TAGS = (
    "address,article,blockquote,br,caption,dd,details,div,dl,dt,fieldset,figcaption,figure,form,h1,h2,h3,h4,h5,h6,hr,"
    "li,main,ol,p,pre,section,summary,table,tbody,thead,tr,ul"
)


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


def parse(source: str) -> ParsedFile:
    """Title and visible text of a page, with a line per block; navigation and scripts are left out.

    Raises:
        ParseError: the page is nested too deeply.
    """
    from selectolax.lexbor import LexborHTMLParser

    depth = _depth(source)
    if depth > _MAX_DEPTH:
        raise ParseError(f"HTML nested {depth:,} elements deep; at most {_MAX_DEPTH:,} are read; save it as plain text")
    mark = "\x1e"  # marks a line break, since newlines in the source are only spaces
    tree = LexborHTMLParser(source.replace(mark, " "))
    heading = tree.css_first("title") or tree.css_first("h1")
    title = heading.text() if heading else ""
    tree.strip_tags(["script", "style", "template", "noscript"])
    plain = tree.body.text() if tree.body else ""
    tree.strip_tags(_DROPPED_TAGS)
    for node in tree.css("pre"):
        node.replace_with(mark + node.text().replace("\n", mark) + mark)
    for node in tree.css(_BLOCK_TAGS):
        node.insert_before(mark)
        node.insert_after(mark)
    for node in tree.css("td,th"):
        node.insert_after(" ")
    text = re.sub(r"[ \t\n\r\f]+", " ", tree.body.text() if tree.body else "")
    text = clean(re.sub(rf" ?{mark}[ {mark}]*", "\n", text).strip())
    return ParsedFile(title, text, plain_characters=count_characters(plain))
