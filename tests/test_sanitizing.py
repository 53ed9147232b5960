import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray.citations import parse_citations
from ragtune_ray.sanitizing import LINK_REMOVED, AnswerText, without_links
from ragtune_ray.schema import Passage

PASSAGES = [Passage(f"d#{n}", "d", "text", "", "{}", 0, 4) for n in range(3)]
ATOMS = [
    "[1]", "[2]", " [1].", "[", "]", "(", ")", "![", "](", "http://evil.example/x?y=1", "https://nasa.gov/a", "www.evil.example",
    " ", "  ", ".", ",", "Paris", "the", "<img src=x>", "<b>", "<", "5 < 6", "\n", "\n\n", "[1969]", "月球", "。", "【1】", "【", "!",
    "[a]: http://evil.example", "a", "(see [1])", "javascript:alert(1)", "?", "'", "data:", "://", "HTTP", "s",
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
        ("3 < 5 and a[0](x)", "3 < 5 and a0"),
        ("Is 2 > 1? Yes! [sic] At 10:30, ratio 3:4.", "Is 2 > 1? Yes! [sic] At 10:30, ratio 3:4."),
    ],
)
def test_links_images_and_tags_are_taken_out(text: str, expected: str) -> None:
    assert without_links(text, ["nasa.gov"]) == expected


@given(texts)
def test_nothing_is_left_that_markdown_or_html_would_make_a_link_or_an_image_of(text: str) -> None:
    clean = without_links(text)
    assert "](" not in clean
    assert "![" not in clean
    assert not re.search(r"<[A-Za-z/!?]", clean)
    assert not re.search(r"(?i)[a-z][a-z0-9+.-]+://|\bjavascript:\S|\bwww\.", clean)
    assert without_links(clean) == clean


@given(texts, st.lists(st.integers(1, 9), min_size=1))
def test_the_pieces_of_a_stream_are_the_whole_answer_however_it_is_cut(raw: str, sizes: list[int]) -> None:
    text, pieces, start = AnswerText(PASSAGES, ["nasa.gov"]), [], 0
    while start < len(raw):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text.add(raw[start : start + size]))
        start += size
    assert "".join([*pieces, text.end()]) == text.whole()
    assert text.whole() == without_links(parse_citations(raw.strip(), PASSAGES)[0], ["nasa.gov"])


def test_an_answer_without_links_is_what_the_bulk_job_writes() -> None:
    raw = " It was 1969 [1], said  NASA (see [2]). 嫦娥四号【3】。"
    text = AnswerText(PASSAGES)
    text.add(raw)
    assert text.whole() == parse_citations(raw.strip(), PASSAGES)[0]


def test_words_are_shown_as_they_come_and_not_at_the_end() -> None:
    text = AnswerText(PASSAGES)
    shown = [text.add(piece) for piece in ["The", " Moon", " orbits", " the", " Earth", "."]]
    assert shown == ["", "The", " Moon", " orbits", " the", ""]
    assert text.end() == " Earth."
    assert [AnswerText(PASSAGES).add(piece) for piece in ("月球绕着",)] == ["月球绕着"]


def test_hostile_text_takes_no_longer_than_its_length_warrants() -> None:
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
