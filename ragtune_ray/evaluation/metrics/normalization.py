"""Reduces answers to the tokens that count in a comparison."""

from __future__ import annotations

import re
import string
import unicodedata
from functools import lru_cache
from typing import get_args

import regex  # type: ignore[import-untyped]  # the library has no stubs

from ragtune_ray.answering.citations import UNSPACED_BLOCKS
from ragtune_ray.config import Language, Normalization
from ragtune_ray.evaluation.metrics.errors import MetricError
from ragtune_ray.index.words import visible
from ragtune_ray.ingest.chunking import UNSPACED_SCRIPTS

ARTICLES = frozenset({"a", "an", "the"})
DECIMAL_COMMA = frozenset(
    {
        "cs",
        "da",
        "de",
        "el",
        "es",
        "fi",
        "fr",
        "hu",
        "id",
        "it",
        "nl",
        "no",
        "pl",
        "pt",
        "ro",
        "ru",
        "sv",
        "tr",
        "uk",
        "vi",
    }
)
"""Languages that write 4,5 and 1.000 for the English 4.5 and 1,000."""

WITHOUT_SPACES = frozenset({"zh", "ja", "km", "lo", "my", "th"})
"""Languages without spaces between words, whose tokens are characters."""

_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ENGLISH_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE_PUNCTUATION = re.compile(
    "[\u00b7\u2010-\u2027\u2030-\u205e"  # general punctuation
    "\u3001-\u3004\u3008-\u3020\u3030\u30fb"  # CJK punctuation, without 々 (U+3005) and 〇 (U+3007), which are characters
    "\ufe10-\ufe1f\ufe30-\ufe6f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe5]"  # full-width forms
)
_CHINESE_TOKEN = re.compile(r"[0-9a-zß-öø-ɏ]+|\S")
# Words, but single characters in a script without spaces between words.
_TOKEN = regex.compile(rf"[{UNSPACED_SCRIPTS}]\p{{M}}*|[^\s{UNSPACED_SCRIPTS}]+")

# Full-width forms, and typographic marks that ASCII also has. A long dash separates words, so it is a space.
_AS_ASCII = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63", "-")
    | dict.fromkeys("‘’‚‛′ʼ`´", "'")
    | dict.fromkeys("“”„‟″«»", '"')
    | {"…": "...", "\u2014": " ", "\u2015": " ", "٪": "%", "٫": ".", "٬": ",", "￥": " "}
)
_LONG_DASH_IN_NUMBER = re.compile(r"(?<=\d)[\u2014\u2015](?=\d)")
_DOUBLE_HYPHEN = re.compile(r"(?<=\w)--+(?=\w)")
_FOREIGN_DIGIT = regex.compile(r"[^\P{Nd}0-9]")
# Arabic and Hebrew leave vowel signs out where readers do not need them; the tatweel only stretches a word.
_VOWEL_SIGNS = regex.compile(r"(?<=[\p{Hebrew}\p{Arabic}])\p{Mn}+|ـ")
_OTHER_PUNCTUATION = regex.compile(r"[^\P{P}\x00-\x7f‰]")

_NARROW_SPACE = "\u00a0\u2009\u202f"
_THOUSANDS = re.compile(
    # Possessive: with fewer groups, digits would follow, and a long row of numbers would be tried in all ways.
    rf"(?<![\d.,'])\d{{1,3}}(?:(?:,\d{{3}})++|(?:'\d{{3}})++|(?:[{_NARROW_SPACE}]\d{{3}})++)(?![\d,']*\d)"
)
_THOUSANDS_BEFORE_POINT = re.compile(r"(?<![\d.,'])\d{1,3}(?:,\d{3})+(?=\.\d)")
_THOUSANDS_BY_POINT = re.compile(
    rf"(?<![\d.,'])\d{{1,3}}(?:(?:\.\d{{3}})++|(?:'\d{{3}})++|(?:[ {_NARROW_SPACE}]\d{{3}})++)(?![\d.']*\d)"
)
_DECIMAL_COMMA = re.compile(r"(?<![\d,.])(\d+),(?=\d+(?![\d,.]*\d))")
_SEPARATORS = re.compile(rf"[.,' {_NARROW_SPACE}]")

_PERCENT = re.compile(
    r"(?<=\d)\s*(?:%|(?:per ?cent|prozent|procent|pour cent|por ciento|por cento|per cento|процент\w*)\b)"
)
_TURKISH_CAPITALS = str.maketrans("İI", "iı")
_BARE_FRACTION = re.compile(r"(?<![\w.])\.(?=\d)")
_ASCII_SIGN = f"[{re.escape(string.punctuation)}]"
_COUNTED_SIGN = re.compile(
    rf"(?<=\d){_ASCII_SIGN}{{1,2}}(?=\d)"  # 4.5, 1/2, 10:30, 1914-18, 10^-6
    rf"|(?:(?<!\w)|(?<={UNSPACED_BLOCKS.pattern}))-(?=[$£€¥]?\d)"  # -10, but not B-52
    r"|[<>]=?(?=\s*[$£€¥]?-?\d)"
    r"|(?<=\d)%"
    r"|(?<=\w)[+#]+(?!\w)"  # C++, C#, 18+
)
_KEPT_OR_REMOVED = re.compile(rf"({_COUNTED_SIGN.pattern})|{_ASCII_SIGN}")


@lru_cache(maxsize=4096)  # every metric of an answer asks for the same few texts
def normalize_answer(text: str, language: Language, normalization: Normalization = "strict") -> str:
    """Reduce an answer to the tokens that count in a comparison, separated by single spaces.

    A token is a word without punctuation in lower case; in scripts without spaces between words (Chinese, Japanese, Thai, Lao,
    Khmer, Burmese) it is a character. In English, articles are left out.

    `squad` does this as the evaluation scripts of SQuAD v1.1 and CMRC 2018 do, so 4.5 equals 45. `strict` keeps what changes a
    number: its sign, decimal point, percent sign, < or >, and any other sign between two digits; also the signs of C++ and C#.
    Separators of thousands are removed, "percent" equals %, and the decimal comma equals the point in languages that use it
    (`DECIMAL_COMMA`). Ways to write the same mark are equal: full-width characters, digits of other scripts, curly quotes,
    dashes, ellipses, non-breaking spaces. Invisible characters such as soft hyphens and the vowel signs of Arabic and Hebrew are
    left out, and accents may be spelled in one character or two. An article that ends the text stays, as in "hepatitis A".
    In both, a text of articles alone stays as it is, so "A" is not equal to "".

    Raises:
        MetricError: the language or the normalization is unknown.

    >>> normalize_answer("The U.S.  Navy!", "en")
    'us navy'
    >>> normalize_answer("-4.50 percent of $1,000.", "en"), normalize_answer("-4.50%", "en", "squad")
    ('-4.50% of 1000', '450')
    >>> normalize_answer("„Rund 1.000“ – also 4,5 Prozent", "de"), normalize_answer("東京タワーは333m", "ja")
    ('rund 1000 also 4.5%', '東 京 タ ワ ー は 333m')
    >>> normalize_answer("“阿波罗 11号”，1969年。", "zh")
    '阿 波 罗 11 号 1969 年'
    """
    if language not in get_args(Language):
        raise MetricError(f"evaluate.language is {language!r}; known are {', '.join(get_args(Language))}")
    match normalization:
        case "strict":
            tokens = _strict_tokens(text, language)
            return " ".join(_without_articles(tokens) if language == "en" else tokens)
        case "squad":
            return " ".join(_squad_tokens(text.lower().translate(_ASCII_PUNCTUATION), language))
    raise MetricError(f"evaluate.normalization is {normalization!r}; known are 'squad' and 'strict'")


def _squad_tokens(plain: str, language: Language) -> list[str]:
    """The tokens of a text in lower case without ASCII punctuation."""
    match language:
        case "en":
            return _ENGLISH_ARTICLES.sub(" ", plain).split() or plain.split()
        case "zh":
            return _CHINESE_TOKEN.findall(_CHINESE_PUNCTUATION.sub("", plain))
    tokens: list[str] = _TOKEN.findall(plain)
    return tokens


def _strict_tokens(text: str, language: Language) -> list[str]:
    """The tokens of `strict`, articles included."""
    text = plain_marks(text)
    if language == "tr":
        text = text.translate(_TURKISH_CAPITALS)
    text = _PERCENT.sub("%", plain_numbers(text.casefold(), language))
    text = _BARE_FRACTION.sub("0.", text)
    plain = _KEPT_OR_REMOVED.sub(lambda found: found[1] or "", _DOUBLE_HYPHEN.sub(" ", text))
    plain = plain if plain.strip() else text  # an answer such as "+" is its punctuation
    tokens: list[str] = _TOKEN.findall(_OTHER_PUNCTUATION.sub(" ", plain))
    return tokens


def plain_marks(text: str) -> str:
    r"""The text with marks and digits as ASCII has them, without invisible characters and optional vowel signs.

    >>> plain_marks("‘1914–18’…\u00adЁ ٣")
    "'1914-18'...Ё 3"
    """
    if text.isascii():
        return text
    text = _LONG_DASH_IN_NUMBER.sub("-", unicodedata.normalize("NFC", visible(text)))
    text = _VOWEL_SIGNS.sub("", text.translate(_AS_ASCII))
    # Python may know fewer digits than `regex`, whose Unicode is newer.
    plain: str = _FOREIGN_DIGIT.sub(lambda found: str(unicodedata.digit(found[0], found[0])), text)
    return plain


def plain_numbers(text: str, language: Language) -> str:
    """The text with numbers as a program reads them: no separator of thousands, a point before decimals.

    >>> plain_numbers("1,000.5 or 3,4", "en"), plain_numbers("1.000,5 oder 3,4", "de")
    ('1000.5 or 3,4', '1000.5 oder 3.4')
    """

    def joined(found: re.Match[str]) -> str:
        return _SEPARATORS.sub("", found[0])

    if language not in DECIMAL_COMMA:
        return _THOUSANDS.sub(joined, text)
    text = _THOUSANDS_BEFORE_POINT.sub(joined, text)
    return _DECIMAL_COMMA.sub(r"\1.", _THOUSANDS_BY_POINT.sub(joined, text))


def _without_articles(tokens: list[str]) -> list[str]:
    """English tokens without articles, except one at the end: there it is a name, as in "vitamin A" or "A"."""
    return [token for token in tokens[:-1] if token not in ARTICLES] + tokens[-1:]
