"""The probe of scripts: what it counts, and when an encoder counts as not knowing a script."""

from collections.abc import Sequence

import numpy as np
import pytest

from ragtune_ray.models import scripts
from ragtune_ray.models.encoder import HashingEncoder

ENGLISH = [f"Vessel {number} sails north. Its cook is from port{number}. It carries salt." for number in range(40)]
CHINESE = [f"第{number}艘船向北航行。它的厨师来自港口{number}。它运载盐。" for number in range(40)]


class OnlyLatin(HashingEncoder):
    """Gives all texts with a Chinese character the same vector, as an encoder without Chinese in its vocabulary does."""

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        vectors = super().encode_passages(texts)
        vectors[[any("一" <= character <= "鿿" for character in text) for text in texts]] = np.eye(self.dimension)[0]
        return vectors


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Who wrote it?", "LATIN"),
        ("Ｗｈｏ wrote it?", "LATIN"),  # full width
        ("谁写了 BERT 这篇论文?", "CJK"),
        ("これはだれがかいたのですか", "HIRAGANA"),
        ("Кто это написал?", "CYRILLIC"),
        ("من كتبه؟", "ARABIC"),
        ("1969 - 2.5 %", ""),
        ("", ""),
    ],
)
def test_the_script_of_a_text_is_that_of_most_letters(text: str, script: str) -> None:
    assert scripts.script_of(text) == script


def test_passages_are_looked_for_by_their_longest_sentence_among_those_of_their_script() -> None:
    asked: list[str] = []

    class Asked(OnlyLatin):
        def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
            asked.extend(texts)
            return super().encode_queries(texts)

    encoder = Asked("hashing-512")
    texts = [text for pair in zip(ENGLISH, CHINESE, strict=True) for text in pair]
    found = scripts.probe(encoder, texts, OnlyLatin("hashing-512").encode_passages(texts))
    # All Chinese vectors are equal, so the first three passages are nearest to every sentence; 0 and 1 are probed.
    assert found == {"CJK": {"passages": 24, "found": 2}, "LATIN": {"passages": 24, "found": 24}}
    assert "Its cook is from port0." in asked
    assert "它的厨师来自港口39。" in asked
    assert len(asked) == 48
    assert scripts.unknown_scripts(found) == {"CJK"}


def test_a_text_of_one_sentence_is_looked_for_by_its_first_half() -> None:
    asked: list[str] = []

    class Asked(HashingEncoder):
        def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
            asked.extend(texts)
            return super().encode_queries(texts)

    encoder = Asked("hashing-64")
    texts = ["abcdefghi"] * 8
    scripts.probe(encoder, texts, HashingEncoder("hashing-64").encode_passages(texts))
    assert asked == ["abcde"] * 8


def test_a_passage_that_stands_twice_is_found() -> None:
    encoder = HashingEncoder("hashing-512")
    texts = [*ENGLISH[:10], *ENGLISH[:10]]
    found = scripts.probe(encoder, texts, encoder.encode_passages(texts))
    assert found == {"LATIN": {"passages": 20, "found": 20}}


def test_few_passages_are_not_judged() -> None:
    encoder = OnlyLatin("hashing-64")
    assert scripts.probe(encoder, CHINESE[:7], encoder.encode_passages(CHINESE[:7])) == {}
    few = scripts.probe(encoder, CHINESE[:8], encoder.encode_passages(CHINESE[:8]))
    assert few == {"CJK": {"passages": 8, "found": 3}}
    assert scripts.unknown_scripts(few) == frozenset()
    assert scripts.unknown_scripts(scripts.add_facts([few, few])) == {"CJK"}


@pytest.mark.parametrize(("found", "unknown"), [(74, True), (75, False)])
def test_an_encoder_knows_a_script_in_which_it_finds_three_of_four(found: int, unknown: bool) -> None:
    assert bool(scripts.unknown_scripts({"THAI": {"passages": 100, "found": found}})) is unknown
