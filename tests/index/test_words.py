"""Tokens of texts: languages, scripts, stop words."""

import subprocess
import sys

import pytest
from bm25s import stopwords

from ragtune_ray.index.words import _stop_words, folded, tokens


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        pytest.param("The Running DOGS", "en", ["run", "dog"], id="english_stems_and_drops_stop_words"),
        pytest.param("The Running DOGS", "none", ["the", "running", "dogs"], id="none_does_neither"),
        pytest.param("To be, or not to be", "en", ["to", "be", "or", "not", "to", "be"], id="only_stop_words_stay"),
        pytest.param("Don’t ask Beyoncé's mum", "en", ["ask", "beyoncé", "mum"], id="apostrophes"),
        pytest.param("vitamin C, Apollo 8", "none", ["vitamin", "c", "apollo", "8"], id="single_characters_stay"),
        pytest.param("snake_case-word 3.14", "none", ["snake", "case", "word", "3", "14"], id="marks_separate"),
        pytest.param(
            "ＡＢＣ ﬁre STRASSE straße", "none", ["abc", "fire", "strasse", "strasse"], id="nfkc_and_casefold"
        ),
        pytest.param("cafe\u0301", "none", ["café"], id="decomposed_is_composed"),
        pytest.param("हिन्दी", "none", ["हिन्दी"], id="vowel_signs_stay_in_the_word"),
        pytest.param("2008年发射火箭。", "en", ["2008", "年发", "发射", "射火", "火箭"], id="chinese_pairs"),
        pytest.param("见 A火B", "none", ["见", "a", "火", "b"], id="a_lone_character_is_kept"),
        pytest.param("ไทย", "en", ["ไท", "ทย"], id="thai_pairs"),
        pytest.param(" ?! ", "en", [], id="no_word"),
    ],
)
def test_tokens_follow_the_language(text: str, language: str, expected: list[str]) -> None:
    assert tokens([text], language) == [expected]


def test_english_stop_words_are_those_of_bm25s() -> None:
    assert frozenset(stopwords.STOPWORDS_EN_PLUS) == _stop_words()


def test_english_stop_words_need_no_import_of_bm25s() -> None:
    """Importing bm25s starts JAX where that is installed, which then takes most of a GPU's memory."""
    seen = "from ragtune_ray.index import words; import sys; print(words.tokens(['the dogs'], 'en'), 'bm25s' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", seen], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "[['dog']] False"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("co\u00adoperate zero\u200bwidth\ufeff \u200eleft", ["cooper", "zerowidth", "left"]),
        ("Müller cafe\u0301s naïve Ångström", ["muller", "cafe", "naiv", "angstrom"]),
        ("Straße Smørrebrød Łódź œuvre", ["strass", "smorrebrod", "lodz", "oeuvr"]),
        ("İstanbul ISPANAK ıspanak", ["istanbul", "ispanak", "ispanak"]),
        ("ΆΝΘΡΩΠΟΣ άνθρωπος", ["ανθρωποσ", "ανθρωποσ"]),
        ("كِتَاب أحمد كـتاب", ["كتاب", "احمد", "كتاب"]),
        ("שָׁלוֹם", ["שלום"]),
        ("ёлка мой", ["елка", "мой"]),
        ("がく हिन्दी 한국어", ["がく", "हिन्दी", "한국어"]),
    ],
)
def test_folded_words_have_no_accents_and_no_invisible_characters(text: str, expected: list[str]) -> None:
    assert tokens([text], "en-folded") == [expected]
    assert tokens([text], "en") != [expected] or "हिन्दी" in text


def test_folded_words_of_ascii_are_the_same() -> None:
    text = "The snake_case don't RUNNING 3.14"
    assert tokens([text], "en-folded") == tokens([text], "en")
    assert folded("none") == folded(folded("none")) == "none-folded"
