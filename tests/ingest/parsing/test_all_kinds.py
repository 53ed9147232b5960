"""Files of all kinds: every sentence is found once and in order, and damaged files are refused in bounded time."""

from __future__ import annotations

import html
import io
import os
import random
import re
import time
import zipfile
from pathlib import Path

import pytest

from ragtune_ray.config import Corpus
from ragtune_ray.ingest.parsers import FILE_SUFFIXES, parse_file
from ragtune_ray.ingest.parsing.text import ParseError, count_characters
from ragtune_ray.schema import Document
from tests.support.corpora import read
from tests.support.documents import MAKERS, sentences

CORPUS = Corpus(max_document_bytes=4_000_000)
NUM_MUTATIONS = int(os.environ.get("RAGTUNE_MUTATIONS", "100"))
"""Damaged files per kind; 2,000 for a thorough run."""
ALIASES = {".markdown", ".htm", ".xhtml"}


def test_every_kind_has_a_maker() -> None:
    assert set(FILE_SUFFIXES) - ALIASES == set(MAKERS)


def test_every_sentence_of_a_folder_of_all_kinds_is_found_once_and_in_order(tmp_path: Path) -> None:
    expected = {}
    for seed in range(44):
        suffix = list(MAKERS)[seed % len(MAKERS)]
        expected[f"{seed}{suffix}"] = sentences(seed, 12 + seed)
        (tmp_path / f"{seed}{suffix}").write_bytes(MAKERS[suffix](expected[f"{seed}{suffix}"]))
    found = {item.document_id: item.text for item in read(tmp_path) if isinstance(item, Document)}
    assert set(found) == set(expected)
    for name, texts in expected.items():
        text = " ".join(found[name].split())
        places = [text.find(sentence) for sentence in texts]
        assert places == sorted(places), name
        assert [text.count(sentence) for sentence in texts] == [1] * len(texts), name


def plain_text(suffix: str, data: bytes) -> str:
    """An independent extraction: the text nodes of XML and HTML, found by stripping tags."""
    wanted = {".docx": r"word/(document|header\d|footer\d)\.xml", ".pptx": r"ppt/slides/slide\d+\.xml"}
    wanted |= {".xlsx": r"xl/sharedStrings\.xml", ".epub": r"OEBPS/.*(one|two)\.xhtml"}
    if suffix not in wanted:
        return re.sub(r"<style.*?</style>|<[^>]*>", " ", html.unescape(data.decode()))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(wanted[suffix], name)]
        return html.unescape(re.sub(r"<[^>]*>", " ", " ".join(archive.read(name).decode() for name in names)))


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".csv", ".html", ".docx", ".pptx", ".xlsx", ".epub"])
def test_characters_are_kept_against_a_plain_extraction(suffix: str) -> None:
    data = MAKERS[suffix](sentences(7, 40))
    kept = count_characters(parse_file(f"x{suffix}", data, CORPUS).text)
    assert kept >= 0.99 * count_characters(plain_text(suffix, data))


@pytest.mark.parametrize("suffix", MAKERS)
def test_the_own_count_of_plain_characters_agrees(suffix: str) -> None:
    parsed = parse_file(f"x{suffix}", MAKERS[suffix](sentences(7, 40)), CORPUS)
    assert parsed.plain_characters <= count_characters(parsed.text) <= 1.05 * parsed.plain_characters


def damaged(data: bytes, generator: random.Random) -> bytes:
    """Change, remove, repeat or swap some bytes; in archives, those of an unpacked part, so that the parsers see them."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 12)):
        start = generator.randrange(len(changed))
        stop = min(len(changed), start + generator.choice([1, 1, 4, 40, 400]))
        match generator.randrange(4):
            case 0:
                changed[start] = generator.randrange(256)
            case 1:
                del changed[start:stop]
            case 2:
                changed[start:start] = changed[start:stop] * generator.choice([1, 2, 50])
            case 3:
                changed[start:stop] = generator.randbytes(stop - start)
        if not changed:
            return b"x"
    return bytes(changed)


def damaged_part(data: bytes, generator: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(buffer, "w") as archive:
        names = whole.namelist()
        chosen = generator.choice([name for name in names if name.endswith((".xml", ".rels", ".opf", ".xhtml"))])
        for name in names:
            content = whole.read(name)
            archive.writestr(name, damaged(content, generator) if name == chosen else content)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", MAKERS)
def test_damaged_files_are_read_or_refused_in_bounded_time(suffix: str) -> None:
    generator = random.Random(0)
    whole = MAKERS[suffix](sentences(1))
    outcomes = {"read": 0, "refused": 0}
    for place in range(NUM_MUTATIONS):
        in_part = suffix in {".docx", ".pptx", ".xlsx", ".epub"} and place % 4
        data = damaged_part(whole, generator) if in_part else damaged(whole, generator)
        started = time.monotonic()
        try:
            parse_file(f"x{suffix}", data, CORPUS).text.encode()
            outcomes["read"] += 1
        except ParseError:
            outcomes["refused"] += 1
        assert time.monotonic() - started < 10
    assert outcomes["read"]
