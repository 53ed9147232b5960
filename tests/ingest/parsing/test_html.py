"""HTML pages: content stays, what belongs to the site goes."""

from __future__ import annotations

import time

import pytest

from ragtune_ray.ingest.parsing.html import parse


def lines(page: str) -> list[str]:
    return parse(page.encode()).text.split("\n")


def test_headers_and_footers_of_articles_are_content() -> None:
    page = """<body><header><h1>Site</h1><a>Log in</a></header><nav>Menu</nav><main><article><header><h1>Mars</h1><p>lead</p>
    </header><p>text</p><aside>note</aside><footer>By A. Hall</footer></article></main><aside>Ads</aside><footer>Imprint</footer>"""
    assert lines(page) == ["Mars", "lead", "text", "note", "By A. Hall"]
    assert lines("<header>Site</header><section><header><h2>Part</h2></header><p>x</p></section>") == ["Part", "x"]
    assert lines("<div role=banner>B</div><p>x</p><div role=contentinfo>C</div><div role=complementary>D</div>") == [
        "x"
    ]


def test_the_header_of_a_page_without_structure_is_its_title_and_abstract() -> None:
    assert lines("<header><h1>Mars</h1><p>abstract</p><nav>N</nav></header><h2>One</h2>") == ["Mars", "abstract", "One"]
    assert lines("<header><h1>Site</h1></header><h1>Mars</h1>") == ["Mars"]


@pytest.mark.parametrize(
    "furniture",
    [
        "<div role=navigation>F</div>",
        "<ol class='breadcrumb'><li>F</ol>",
        "<div id='breadcrumbs'>F</div>",
        "<div class='site-breadcrumb-nav'>F</div>",
        "<ul aria-label='Breadcrumb'><li>F</ul>",
        "<ol itemtype='https://schema.org/BreadcrumbList'><li>F</ol>",
        "<div id='cookie-banner'><p>F<nav>F</nav></div>",
        "<div id='cookie-banner'><h2>F</h2><p>F<p><button>F</button></div>",
        "<div class='eu-cookie-law'>F</div>",
        "<div class='x CookieConsent'>F</div>",
        "<div class='gdpr_popup_wrapper'>F</div>",
        "<section id='onetrust-consent-sdk'><div class='onetrust-pc'>F</div></section>",
        "<div role=dialog aria-label='Cookie settings'>F</div>",
        "<a class=skip-link href=#m>F</a>",
        "<main><nav>F</nav></main>",
    ],
)
def test_navigation_breadcrumbs_and_cookie_banners_are_left_out(furniture: str) -> None:
    assert lines(f"<body>{furniture}<p>text</p>") == ["text"]


@pytest.mark.parametrize(
    "content",
    [
        "<div class='cookie-recipes'>C</div>",
        "<p class=breadcrumbed-schnitzel>C</p>",
        "<div class='has-breadcrumb'>C</div>",
        "<h2 id='informed-consent-dialog'>C</h2>",
        "<div class='cookie-banner'><article>C</article></div>",
        "<section id=consent><p>C</section>",
        "<div id=gdpr-law>C</div>",
    ],
)
def test_what_only_sounds_like_furniture_stays(content: str) -> None:
    assert lines(f"<body>{content}<p>text</p>") == ["C", "text"]


@pytest.mark.parametrize(
    "name", ["consent-dialog", "cookie-notice", "gdpr-law", "cookie-law", "onetrust-setup", "breadcrumbs"]
)
@pytest.mark.parametrize(
    "page",
    [
        "<div role=main><section id='{}'><h2>C</h2><p>x</p></section></div>",
        "<main><p class='{}'>C</p><p>x</p></main>",
        "<article><div id='{}'>C<p>x</p></div></article>",
        "<section id='{}'><h2>C</h2><p>x</p></section>",
        "<section id='{0}'><h2>C</h2><div class='{0}'>x</div></section>",
        "<div class='section' id='{}'><h2>C</h2><p>x</p></div>",
        "<div class='section level2' id='{}'><h2>C</h2><label><input type=checkbox>x</label></div>",
        "<div id='{}'><h3>C</h3><p>x</p></div>",
    ],
)
def test_sections_named_after_their_heading_stay(name: str, page: str) -> None:
    assert lines(page.format(name)) == ["C", "x"]


@pytest.mark.parametrize(
    ("banner", "length"),
    [
        ("<div class=cookie-banner>{}</div>", 300),
        ("<div class=breadcrumb>{}</div>", 300),
        ("<ul aria-label=Breadcrumb><li>{}</ul>", 300),
        ("<div id=cookie-consent><h2></h2>{}<button></button></div>", 1_000),
        ("<div id=onetrust-consent-sdk><div class=onetrust-banner>{}<input></div></div>", 1_000),
        ("<div id=breadcrumbs>{}<button></button></div>", 300),
    ],
)
def test_names_remove_only_what_is_short(banner: str, length: int) -> None:
    assert lines(banner.format("é" * length) + "<p>x") == ["x"]
    assert lines(banner.format("é" * (length + 1)) + "<p>x") == ["- " * ("<li>" in banner) + "é" * (length + 1), "x"]


def test_names_that_would_remove_much_of_a_page_remove_nothing() -> None:
    notice = "<p class=consent-notice>" + "a" * 250
    assert lines(notice * 8 + "<p>x") == ["x"]
    assert lines(notice * 9 + "<p>x") == ["a" * 250] * 9 + ["x"]


def test_what_stays_stays_whole() -> None:
    long = "a" * 301
    assert lines(f"<div id=cookie-notice>{long}<p class=cookie-message>b</p></div>") == [long, "b"]


def test_title_blocks_and_footnotes_of_pandoc_stay() -> None:
    page = "<header id=title-block-header><h1>T</h1><p>A. Hall</p></header><h1>One</h1><aside role=doc-footnote>note</aside>"
    assert lines(page) == ["T", "A. Hall", "One", "note"]


def test_raised_and_lowered_characters_keep_their_meaning() -> None:
    page = "<p>10<sup>6</sup> m<sup>2</sup> s<sup>-1</sup> H<sub>2</sub>O 1<sup>st</sup> x<sup>a+b</sup> y<sub>A</sub> (2)<sup>3</sup>"
    assert lines(page) == ["10^6 m² s⁻¹ H₂O 1st x^a+b y_A (2)^3"]
    assert lines("<p>word<sup><a href=#fn>1</a></sup> cited<sup>[2]</sup> 10<b><sup>9</sup></b>") == [
        "word[1] cited[2] 10^9"
    ]
    assert lines("<p>2<sup>3<sup>4</sup></sup>") == ["2^34"]


def test_lists_keep_their_numbers() -> None:
    page = "<ol start=3><li>a<li value=7><p>b</p><ul><li>c</ul><li></ol><ol type=A><li>d</ol><li>e"
    assert lines(page) == ["3. a", "7. b", "- c", "A. d", "e"]


def test_tables_are_markdown_unless_they_arrange_the_page() -> None:
    page = "<table><caption>Moons</caption><tr><th>Name<th>Year<tr><td>Phobos<br>I<td rowspan=2>18|77<tr><td>Deimos</table>"
    assert lines(page) == ["Moons", "| Name | Year |", "|---|---|", "| Phobos I | 18\\|77 |", "| Deimos |"]
    page = "<table><tr><td colspan=2>wide<td>c<tr><td rowspan=2>a<td>b<td>c<tr><td>d<td>e</table>"
    assert lines(page) == ["| wide | | c |", "|---|---|---|", "| a | b | c |", "| | d | e |"]
    inner = "<table><tr><td>a<td>b<tr><td>c<td>d</table>"
    assert lines(f"<table><tr><td>left<td>{inner}<tr><td>x<td>y</table>") == [
        "left",
        "| a | b |",
        "|---|---|",
        "| c | d |",
        "x y",
    ]
    assert lines("<table role=presentation><tr><td>a<td>b<tr><td>c<td>d</table>") == ["a b", "c d"]
    assert lines("<table><tr><td><h2>Head</h2><td>b<tr><td>c<td>d</table>") == ["Head", "b", "c d"]
    assert lines("<table><tr><td>one<tr><td>two</table>") == ["one", "two"]


def test_code_keeps_its_indentation() -> None:
    assert lines("<pre>if x:\n    y = 1\n\tz\n</pre>") == ["if x:", "    y = 1", "    z"]


def test_the_declared_encoding_is_used() -> None:
    page = "<meta charset=windows-1252><p>Müller – 5 €</p>"
    assert parse(page.encode("cp1252")).text == "Müller – 5 €"
    page = '<meta http-equiv="Content-Type" content="text/html; charset=ISO-8859-1"><p>“Müller”</p>'
    assert parse(page.encode("cp1252")).text == "“Müller”"
    assert parse("<meta charset=latin1><p>Müller</p>".encode()).text == "Müller"
    assert parse("<meta charset=x-unknown><p>Müller</p>".encode()).text == "Müller"


def test_title_url_and_author_are_those_of_the_head() -> None:
    head = "<title>T</title><link rel=canonical href=https://a.org/b><meta name=Author content='A. Hall'>"
    parsed = parse(f"<head>{head}</head><svg><title>S</title></svg><p>x".encode())
    assert (parsed.title, parsed.metadata) == ("T", {"url": "https://a.org/b", "author": "A. Hall"})
    assert parse(b"<svg><title>S</title></svg><h1>H</h1>").title == "H"


def test_the_plain_count_shows_what_was_left_out() -> None:
    parsed = parse(b"<script>s()</script><nav>menu</nav><p>text</p>")
    assert parsed.plain_characters == len("menutext")


@pytest.mark.parametrize(
    "page",
    [
        "<table><tr><td>" * 1_200 + "x" + "y<p>" * 20_000,
        "<sup>" * 4_000 + "x" * 100_000,
        "<ol>" * 2_000 + "<li>x" * 2_000,
        "<div class=cookie-bar>" * 3_000 + "x",
        "<div class=cookie-bar>" * 3_000 + "<p class=cookie-bar>x" * 20_000,
        "<nav><header>" * 2_000 + "x",
        "<td rowspan=999999 colspan=999999>x" * 2_000,
        "<table><tr>" + "<td rowspan=999999 colspan=999>x</td>" * 50 + "<tr><td>x" * 2_000,
    ],
)
def test_pages_built_to_take_long_do_not(page: str) -> None:
    started = time.monotonic()
    parse(page.encode())
    assert time.monotonic() - started < 5


def test_control_characters_by_reference_are_read_once() -> None:
    started = time.process_time()
    found = parse(f"<p>before {'&#29;' * 5000}x y</p>".encode())
    assert time.process_time() - started < 10
    assert found.text.split() == ["before", "x", "y"]
