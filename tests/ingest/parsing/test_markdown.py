"""Titles and front matter of Markdown, as CommonMark reads them."""

from __future__ import annotations

import time

import pytest

from ragtune_ray.ingest.parsing.markdown import parse


@pytest.mark.parametrize(
    ("text", "title"),
    [
        pytest.param("intro\n# Mars #\nx", "Mars", id="atx"),
        pytest.param("Red planet\n==========\n", "Red planet", id="setext"),
        pytest.param("Two\nlines\n===\n", "Two lines", id="setext-of-two-lines"),
        pytest.param("Lower\n---\n# Top\n", "Top", id="setext-of-level-2"),
        pytest.param("```sh\n# comment\n```\n# Real\n", "Real", id="fence"),
        pytest.param("~~~\n# a\n```\n# b\n~~~\n# Real\n", "Real", id="fence-of-tildes"),
        pytest.param("````\n```\n# a\n````\n# Real\n", "Real", id="longer-fence"),
        pytest.param("<!--\n# old\n-->\n\n# Real\n", "Real", id="comment"),
        pytest.param("    # code\n\n# Real\n", "Real", id="indented-code"),
        pytest.param("# The *red* [planet](m.md) `x`\n", "The red planet x", id="inline-marks"),
        pytest.param("# Mars &amp; Moon <br>", "Mars & Moon ", id="entities"),
        pytest.param("#tag\n## Two\n", "", id="no-heading-of-level-1"),
        pytest.param("x\n\n" * 7_000 + "# Late\n", "Late", id="late"),
        pytest.param("", "", id="empty"),
    ],
)
def test_the_title_is_the_first_heading_of_level_1(text: str, title: str) -> None:
    parsed = parse(text)
    assert parsed.title == title
    assert parsed.text == text


def test_a_heading_at_the_end_of_the_part_that_is_parsed_first_is_read_whole() -> None:
    for size in range(16 * 2**10 - 30, 16 * 2**10 + 5):
        assert parse("x" * (size - 2) + "\n\nOne\nlong title\n======\n\ny\n").title == "One long title"
        assert parse("x" * (size - 2) + "\n\n# One long title\n\ny\n").title == "One long title"


def test_front_matter_becomes_title_and_metadata() -> None:
    yaml = "---\ntitle: Mars\ndate: 2024-05-01\ntags: [red, 4]\ndraft: false\nnested: {a: 1}\nnone:\n---\n\n# Other\ntext\n"
    parsed = parse(yaml)
    assert (parsed.title, parsed.text) == ("Mars", "# Other\ntext\n")
    assert parsed.metadata == {"date": "2024-05-01", "tags": ["red", 4], "draft": False}
    toml = '+++\ntitle = "Mars"\nyear = 1877\nseen = 2024-05-01T10:00:00\n+++\ntext'
    parsed = parse(toml)
    assert (parsed.title, parsed.text) == ("Mars", "text")
    assert parsed.metadata == {"year": 1877, "seen": "2024-05-01T10:00:00"}
    assert parse("---\ntags: x\n...\n# Head\n").title == "Head"
    assert parse("---\na: .inf\nb: .nan\nc: [1.5, -.inf]\n---\ntext").metadata == {"c": [1.5]}
    assert parse("+++\na = inf\nb = 1\n+++\ntext").metadata == {"b": 1}


@pytest.mark.parametrize(
    "text",
    [
        "---\n\nA rule above, and below.\n\n---\nmore",
        "---\n: [broken\n---\nmore",
        "---\nnever: closed\n",
        "+++\nnot toml\n+++\nmore",
        "text\n---\na: 1\n---\n",
        "---\n" + "[" * 20_000 + "\n---\nmore",
    ],
)
def test_what_is_no_front_matter_stays_in_the_text(text: str) -> None:
    parsed = parse(text)
    assert (parsed.text, parsed.metadata) == (text, {})


def test_aliases_of_front_matter_do_not_multiply() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    started = time.monotonic()
    assert parse("---\n" + "\n".join(lines) + "\n---\ntext").metadata["a0"] == ["x"] * 9
    assert time.monotonic() - started < 5
