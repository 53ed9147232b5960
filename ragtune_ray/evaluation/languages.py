"""Finds the language of a text by its script, and among languages of one script by its most frequent small words.

For counting texts, not for single short ones: a name or a number has no language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache

import regex  # type: ignore[import-untyped]  # the library has no stubs

READ_CHARACTERS = 500
"""The language of a text is that of this many first characters."""
_SMALL_WORDS = {
    "cs": "a aby ale jak jako je jsem jsou kde kdy který kolik na nebo není od podle pro proč při se si že ve",
    "da": "af at den der det du er et for fra hvad hvem hvilken hvor hvordan hvornår ikke med og på som til var",
    "de": "auf bei das dem den der des die ein eine für ist mit nicht oder sich und von wann was welche wer wie wird wo zu",
    "en": "a an and are as at by did do does for from how in is it of on or that the to was what when where which who why with",
    "es": "al como fue con cuál cuándo de del dónde el en es la las los no para por qué quién se su un una y",
    "fi": "ei että hän ja joka kuinka kuka mikä milloin missä mitä miten niin oli olla on ovat sekä se tai vai",
    "fr": "au aux avec c ce comment dans de des du elle en est et il la le les où par pour quand quel qui qu t sur un une été",
    "hu": "a az egy és hogy hogyan hol ki mennyi mi mikor milyen nem van vagy volt melyik miért ha is meg",
    "id": "adalah apa bagaimana dan dari dengan di ini itu kapan ke mana oleh pada siapa untuk yang",
    "it": "a al che chi come con cosa da dei del della di dove e è il in la le nel non per quale quando sono un una",
    "nl": "aan de die een en er het hoe in is met niet of om op te van voor waar wanneer wat welke werd wie zijn",
    "no": "av at den det du en er et for fra hva hvem hvilken hvor hvordan ikke med når og på som til var",
    "pl": "co czy do gdzie i ile jak jaki jest kiedy kto która który na nie o od po przez się są w z że",
    "pt": "a ao as com como da das de do dos e é em foi foram não no o onde os para por qual quando que quem se um uma",
    "ro": "a al ale care ce cine cu cum de din este fost în la nu o pe pentru sau sunt și unde un",
    "sv": "att av den det du ett en är för från hur inte med när och om på som till vad var vem vilken",
    "tr": "bir bu da de hangi için ile kaç kim mı mi nasıl ne neden nerede olan ve veya zaman mu mü",
    "vi": "bao các cho có của được gì hay không là làm nào như những ở tại thế trong và với",
}
"""Words of questions and answers that other languages have less often."""
_SCRIPTS = regex.compile(
    r"(?P<ja>[\p{Hiragana}\p{Katakana}])|(?P<zh>\p{Han})|(?P<ko>\p{Hangul})|(?P<th>\p{Thai})|(?P<lo>\p{Lao})|(?P<km>\p{Khmer})"
    r"|(?P<my>\p{Myanmar})|(?P<el>\p{Greek})|(?P<he>\p{Hebrew})|(?P<hi>\p{Devanagari})|(?P<ar>\p{Arabic})|(?P<ru>\p{Cyrillic})"
    r"|(?P<Latin>\p{Latin})|(?P<other>\p{L})",
    regex.V1,
)
_WORD = regex.compile(r"(?<!\w)\p{L}[\p{L}\p{M}]*(?!\w)")
_UKRAINIAN = frozenset("іїєґІЇЄҐ")


def language_of(text: str) -> str:
    """The ISO 639-1 code of a text's language; `other` if it is none of those that are known, "" if the text is too short to say.

    >>> language_of("Wann wurde die Brücke gebaut?"), language_of("Which bridge is it?"), language_of("什么桥?")
    ('de', 'en', 'zh')
    >>> language_of("Armstrong"), language_of("1969")
    ('', '')
    """
    text = text[:READ_CHARACTERS]
    script = _script(text)
    if script == "Latin":
        return _by_small_words(text)
    return "uk" if script == "ru" and not _UKRAINIAN.isdisjoint(text) else script


def count_languages(texts: Iterable[str]) -> dict[str, int]:
    """Language -> number of texts, most frequent first; texts that are too short to say are left out.

    >>> count_languages(["Who is it?", "What is that?", "Wer ist das?", "1969"])
    {'en': 2, 'de': 1}
    """
    found = Counter(filter(None, map(language_of, texts)))
    return dict(found.most_common())


def _script(text: str) -> str:
    """The script of most letters; Japanese if there is any kana among Chinese characters."""
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else ""
    counts = Counter(found.lastgroup for found in _SCRIPTS.finditer(text))
    if counts["ja"] and counts["ja"] + counts["zh"] > counts["Latin"]:
        return "ja"
    return str(max(counts, key=counts.__getitem__)) if counts else ""


def _by_small_words(text: str) -> str:
    words = _WORD.findall(text.casefold())
    hits = Counter(language for word in words for language in _languages().get(word, ()))
    (first, count), (_, second) = [*hits.most_common(2), ("", 0), ("", 0)][:2]
    if count > second and (count > 1 or len(words) <= 4):
        return first
    return "" if len(words) < 8 or count else "other"


@cache
def _languages() -> dict[str, tuple[str, ...]]:
    """Small word -> the languages that have it."""
    found: dict[str, tuple[str, ...]] = {}
    for language, words in _SMALL_WORDS.items():
        for word in words.split():
            found[word] = (*found.get(word, ()), language)
    return found
