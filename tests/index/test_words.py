"""Tokens of texts: languages, scripts, stop words."""

import subprocess
import sys
from typing import get_args

import pytest
from bm25s import stopwords

from ragtune_ray.config import WordLanguage
from ragtune_ray.index.words import folded, stop_words, term_of, tokens


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


@pytest.mark.parametrize(
    ("language", "text", "query"),
    [
        ("de", "Die Verträge wurden von beiden Häusern gekündigt.", "Vertrag Haus"),
        ("fr", "Les activités de l'entreprise étaient régulières.", "activite reguliere"),
        ("es", "Las canciones fueron escritas por él.", "cancion escrita"),
        ("it", "I contratti dell'azienda sono annullati.", "contratto annullato"),
        ("ru", "Договоры были расторгнуты.", "договор расторгнут"),
        ("sv", "Avtalen hade sagts upp av bolagen.", "avtal bolag"),
        ("tr", "Sözleşmeler ve evler", "sözleşme ev"),
        ("fi", "Talossa on ikkunoita", "talo"),
    ],
)
def test_another_form_of_a_word_has_the_same_token(language: str, text: str, query: str) -> None:
    rules, unstemmed = folded(language), folded("none")
    assert set(tokens([query], rules)[0]) <= set(tokens([text], rules)[0])
    assert not set(tokens([query], unstemmed)[0]) & set(tokens([text], unstemmed)[0])


def test_stop_words_are_those_of_bm25s() -> None:
    lists = {
        "en": stopwords.STOPWORDS_EN_PLUS, "da": stopwords.STOPWORDS_DANISH, "de": stopwords.STOPWORDS_GERMAN,
        "es": stopwords.STOPWORDS_SPANISH, "fr": stopwords.STOPWORDS_FRENCH, "it": stopwords.STOPWORDS_ITALIAN,
        "nl": stopwords.STOPWORDS_DUTCH, "no": stopwords.STOPWORDS_NORWEGIAN, "pt": stopwords.STOPWORDS_PORTUGUESE,
        "ru": stopwords.STOPWORDS_RUSSIAN, "sv": stopwords.STOPWORDS_SWEDISH, "tr": stopwords.STOPWORDS_TURKISH,
    }  # fmt: skip
    for language, expected in lists.items():
        assert stop_words(language) == frozenset(expected), language
    assert tokens(["Für die Verträge", "Était-ce la même ?"], "de-folded")[0] == ["vertrag"]
    assert tokens(["Était la même"], "fr-folded") == [["etait", "la", "mem"]], "a query of stop words keeps them"
    assert stop_words("fi") == stop_words("none") == frozenset()


def test_every_language_of_the_setting_has_a_stemmer() -> None:
    for language in get_args(WordLanguage):
        assert term_of(folded(language))("a")
    with pytest.raises(ValueError, match=r"index\.language is 'xx-folded'"):
        term_of("xx-folded")


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
