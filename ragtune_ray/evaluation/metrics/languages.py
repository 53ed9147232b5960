"""Finds the language of texts, to warn where answers are not in `evaluate.language`.

A script shows its language, or a few; among languages in Latin letters, stop words decide. Where that is not clear, nothing is
said: names and numbers have no language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import regex  # type: ignore[import-untyped]  # the library has no stubs

from ragtune_ray.config import Language
from ragtune_ray.index.words import stop_words

NAMES = {
    "en": "English", "zh": "Chinese", "ar": "Arabic", "da": "Danish", "de": "German", "el": "Greek", "es": "Spanish",
    "fr": "French", "he": "Hebrew", "hi": "Hindi", "it": "Italian", "ja": "Japanese", "km": "Khmer", "ko": "Korean",
    "lo": "Lao", "my": "Burmese", "nl": "Dutch", "no": "Norwegian", "pt": "Portuguese", "ru": "Russian", "sv": "Swedish",
    "th": "Thai", "tr": "Turkish",
}  # fmt: skip
"""The languages that can be found, by their codes. Of several in one script, the most common names the script."""

# Words, but characters where there are no spaces between words.
_TOKEN = regex.compile(
    r"(?P<zh>\p{Han})|(?P<ja>[\p{Hiragana}\p{Katakana}])|(?P<th>\p{Thai}\p{M}*)|(?P<lo>\p{Lao}\p{M}*)|(?P<km>\p{Khmer}\p{M}*)"
    r"|(?P<my>\p{Myanmar}\p{M}*)|(?P<ko>\p{Hangul}+)|(?P<ar>\p{Arabic}+)|(?P<he>\p{Hebrew}+)|(?P<el>\p{Greek}+)"
    r"|(?P<hi>[\p{Devanagari}\p{M}]+)|(?P<ru>\p{Cyrillic}+)|(?P<latin>\p{Latin}[\p{Latin}\p{M}]*(?:['’]\p{Latin}+)*)"
)
_SAME_SCRIPT = {"uk": "ru"}  # languages whose script carries the name of another
_BY_STOP_WORDS: tuple[Language, ...] = ("en", "da", "de", "es", "fr", "it", "nl", "no", "pt", "sv", "tr")
_MIN_WORDS = 8
_BUNDLE_WORDS = 25
_SCRIPT_SHARE = 0.8
_KANA_SHARE = 0.1  # of Japanese text; Chinese has none
_STOP_SHARE = 0.15  # running text has 0.3 to 0.5
_CLEARLY = 1.5
_WARNED_SHARE, _WARNED_SHARE_UNKNOWN = 0.2, 0.5
_NEARLY_ALL = 0.98
_MOST_TEXTS = 2000


def language_of(text: str) -> str:
    """The code of a text's language; empty if it is not clear.

    >>> language_of("Der Vertrag wurde nach der Frist von beiden Seiten gekündigt."), language_of("契約は終了した。東京")
    ('de', 'ja')
    >>> language_of("Neil Armstrong, 1969")
    ''
    """
    found = [(each.lastgroup, each[0]) for each in _TOKEN.finditer(text)]
    if len(found) < _MIN_WORDS:
        return ""
    counts = Counter(group for group, _ in found)
    if counts["ja"] >= _KANA_SHARE * len(found):
        counts["ja"] += counts.pop("zh", 0)
    script, count = counts.most_common(1)[0]
    if count < _SCRIPT_SHARE * len(found):
        return ""
    return _by_stop_words([word for group, word in found if group == script]) if script == "latin" else script


def _by_stop_words(words: Sequence[str]) -> str:
    """The language with clearly the most stop words; those with a capital letter do not count, as in Los Angeles."""
    shares = {name: sum(word in stop_words(name) for word in words) / len(words) for name in _BY_STOP_WORDS}
    (best, share), (_, second) = Counter(shares).most_common(2)
    return best if share >= max(_STOP_SHARE, _CLEARLY * second) else ""


def shares(texts: Sequence[str]) -> dict[str, float]:
    """The languages of texts and their shares of the words, largest first; `""` is what cannot be told.

    Short texts are joined until their language can be found. At most 2,000 texts are read, spread evenly.

    >>> shares(["Where is the bridge of the old town?", "Who was it that built the house?"])
    {'en': 1.0}
    """
    words: Counter[str] = Counter()
    for bundle in _bundles(texts[:: len(texts) // _MOST_TEXTS + 1]):
        words[language_of(bundle)] += len(_TOKEN.findall(bundle))
    return {name: count / words.total() for name, count in words.most_common()}


def other_language(texts: Sequence[str], language: Language) -> tuple[str, float] | None:
    """The language in which most of the texts are that are not in `language`, and their share; None if that is small.

    Small is below a fifth, or below a half where `language` has no list of stop words to tell it from others. Japanese names in
    Han characters alone are not taken for Chinese.
    """
    if language == "other":
        return None
    expected = _SAME_SCRIPT.get(language, language)
    others = {name: share for name, share in shares(texts).items() if name not in ("", expected)}
    if expected == "ja":
        others.pop("zh", None)
    if expected in NAMES:
        least = _WARNED_SHARE
    else:  # Czech looks like Portuguese to its stop words, and Catalan like Spanish; nothing looks like English
        least = _WARNED_SHARE_UNKNOWN
        others = {name: share for name, share in others.items() if name == "en" or name not in _BY_STOP_WORDS}
    name = max(others, key=others.__getitem__, default="")
    return (name, others[name]) if name and others[name] >= least else None


def _bundles(texts: Sequence[str]) -> Iterator[str]:
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(_TOKEN.findall(text))
        if size >= _BUNDLE_WORDS:
            yield "\n".join(waiting)
            waiting, size = [], 0
    if size >= _MIN_WORDS:
        yield "\n".join(waiting)


def warning(what: str, texts: Sequence[str], language: Language) -> str:
    """A warning if texts are not in `evaluate.language`; empty if they are, or if that is not clear.

    Args:
        what: the texts, such as "the gold answers".
        texts: gold or generated answers.
        language: `evaluate.language`.
    """
    if (found := other_language(texts, language)) is None:
        return ""
    name, share = found
    advice = f"set evaluate.language={name}" if share > 1 / 2 else "score each language by itself"
    if what != "the gold answers":
        advice = "an answer in another language than the gold answer is wrong to every metric that compares words"
    amount = "Nearly all" if share > _NEARLY_ALL else f"About {share:.0%}"
    return f"{amount} of {what} are in {NAMES[name]}, but evaluate.language is {language}: {advice}."
