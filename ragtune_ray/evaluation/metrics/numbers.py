"""Compares the numbers in an answer with a gold answer that is a number.

A text is a number if it has nothing but digits (or in English words below a thousand), words such as about and million, a
unit, and at most two other words: "about 4.5 million", "-3 °C", "12 players". A range, a bound ("more than 5"), an ordinal and a
date are not.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import regex  # type: ignore[import-untyped]  # the library has no stubs

from ragtune_ray.config import Language, Normalization
from ragtune_ray.evaluation.metrics.answers import exact_match
from ragtune_ray.evaluation.metrics.errors import MetricError
from ragtune_ray.evaluation.metrics.normalization import plain_marks, plain_numbers
from ragtune_ray.evaluation.metrics.units import CURRENCY, Unit, currency_unit, multiplier, parse_unit
from ragtune_ray.ingest.chunking import UNSPACED_SCRIPTS

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL, _TENS = _WORDS.split(), _TENS_WORDS.split()
_WORD_VALUES = {word: float(value) for value, word in enumerate(_SMALL)}
_WORD_VALUES |= {word: 10.0 * value for value, word in enumerate(_TENS, start=2)}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_POWER_OF_TEN = regex.compile(r"\s*[x×*·]\s*10(?:\^\s*(-?\d+)|(⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+))|[eE]([+-]?\d+)(?!\w)")
# Not in a name (B-52, COVID-19, v2, 1.2.3, #5), and no decade (1970s). A sign counts where it stands directly before the number:
# "- 12" is an item of a list, or follows a dash.
_NUMBER = regex.compile(
    rf"(?<![^\W{UNSPACED_SCRIPTS}]|[.,/#])(?<![^\W\d_]-)(?P<sign>(?<!\d\s?)[-+](?!\s)|\b(?:minus|negative)\s+)?\s?(?P<currency>(?i:{CURRENCY})\s?)?(?P<inner>-)?"
    r"(?P<digits>\d+(?:\.\d+)?|\.\d+)(?:/(?P<divisor>[1-9]\d*)(?![\d/]))?(?!\.?\d|,\d|(?<=[12]\d\d0)s\b)"
)
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_SMALL[1:10])}))?|{'|'.join(_SMALL[::-1])})"
_NUMBER_WORD = regex.compile(
    r"(?<!no )(?<!-)\b(?:(?P<minus>minus|negative) )?"
    rf"(?P<words>(?:{_BELOW_100}|a) hundred(?:(?: and)? {_BELOW_100})?|{_BELOW_100}|a(?= (?:thousand|[mbtr]+illion)))\b"
    r"(?!-)(?! (?:of|another|day)\b)",
    regex.IGNORECASE,
)
_NEXT_WORD = regex.compile(r"[\s-]?(?P<word>万亿|百万|千万|十亿|[千万亿萬億兆]|[^\W\d_]+\.?(?![\w²³]))")
_SPACE = regex.compile(r"[\s-]?")
_LETTERS = regex.compile(rf"[^\W{UNSPACED_SCRIPTS}]")
_APPROXIMATE = regex.compile(
    r"(?:(?:about|approximately|approx\.?|around|roughly|nearly|almost|some|circa|ca?\.|ungefähr|etwa|rund|circa|environ|unos|"
    r"aproximadamente|cerca d[ei]|~|≈|约|大约)\s*)*",
    regex.IGNORECASE,
)
_FEW_WORDS = regex.compile(r"(?:[\s-]*[^\W\d_]+){0,2}[\s.!]*")
_RANGE_BETWEEN = regex.compile(r"\s*(?:-{1,2}|~|to|or|and|bis|oder|und|à|ou|et|o|y|a|至|到|或)\s*")
_LIST_WORDS = frozenset({"and", "und", "et", "y"})
_BETWEEN = regex.compile(r"\b(?:between|from|zwischen|von|entre|de|tra|da)\s+\S{0,3}$", regex.IGNORECASE)

_MONTHS = (
    "Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|"
    "Dec(?:ember)?|[Jj]anuar|[Ff]ebruar|März|Mai|Juni|Juli|Oktober|Dezember|janvier|février|mars|avril|mai|juin|juillet|août|"
    "septembre|octobre|novembre|décembre|enero|febrero|marzo|abril|mayo|junio|julio|agosto|septiembre|octubre|noviembre|"
    "diciembre|gennaio|febbraio|aprile|maggio|giugno|luglio|settembre|ottobre|dicembre|janeiro|fevereiro|março|maio|junho|julho|"
    "setembro|outubro|novembro|dezembro|januari|februari|maart|mei|augustus"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th|er|º|\.)?"
# A day or a time is no number; the year of a date stays, since it may be the answer.
_DATE = regex.compile(
    rf"\b{_DAY}\s+(?:of\s+|de\s+)?(?:{_MONTHS})\b\.?,?(?:\s+de)?|\b(?:{_MONTHS})\.?\s+{_DAY}\b,?(?!\s*(?i:%|million))"
    r"|(?<=\b\d{4})-\d{1,2}-\d{1,2}\b|\b\d{1,2}([./-])\d{1,2}\1(?=\d{4}\b|\d{2}\b)"
    r"|(?<=\d{4}年)\d{1,2}月(?:\d{1,2}[日号])?|\b\d{1,2}月\d{1,2}[日号]|\b\d{1,2}:\d{2}(?::\d{2})?(?:\s?[ap]\.?m\b)?|\b\d{1,2}\s?[ap]\.?m\b"
)
_YEAR = re.compile(r"\D*(?:1\d{3}|20\d{2}|2100)[^\w%]*")
_ROUNDING = 1e-9  # 0.1 + 0.2 is 0.3
_LONGEST_UNIT = 60  # characters


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number in a text."""

    value: float
    unit: Unit | None
    """None: none that is known."""
    start: int
    end: int


def numeric_match(
    answer: str,
    answers: Sequence[str],
    language: Language,
    normalization: Normalization = "strict",
    tolerance: float = 0.0,
) -> float:
    """1 if the answer has the number of a gold answer that is a number, else 0.

    A number is the same if it differs by no more than `tolerance` times the gold number, and has the gold answer's unit, if that
    has one, or a unit that can be converted into it, such as km into m. An answer with several numbers is right if one of them
    is, but a number in a range or an alternative ("3 or 4") does not count. An answer that equals a gold answer is right.

    Args:
        answer: the generated text.
        answers: gold answers, any one suffices.
        language: of the answers; it decides what 1.000 and billion mean.
        normalization: `evaluate.normalization`, with which answers are equal.
        tolerance: `evaluate.numeric_tolerance`; a number that may be a year must be equal.

    Raises:
        MetricError: no gold answer is a number.

    >>> numeric_match("about 4.5 million people", ["4,500,000"], "en"), numeric_match("3 °C", ["-3 °C"], "en")
    (1.0, 0.0)
    >>> numeric_match("It has twelve.", ["12"], "en"), numeric_match("on 12 March", ["12"], "en")
    (1.0, 0.0)
    """
    golds = [
        (gold, 0.0 if _may_be_year(text) else tolerance) for text in answers if (gold := as_number(text, language))
    ]
    if not golds:
        raise MetricError(f"no gold answer of {list(answers)} is a number; numeric_match is not defined")
    found = list(numbers(answer, language))
    same = any(_is_same(each, gold, allowed) for each in found for gold, allowed in golds)
    return float(same or exact_match(answer, answers, language, normalization))


def is_numeric(answers: Sequence[str], language: Language) -> bool:
    """Whether a gold answer is a number, so that `numeric_match` is defined."""
    return any(as_number(text, language) for text in answers)


@lru_cache(maxsize=4096)  # asked for twice per answer
def as_number(text: str, language: Language) -> Quantity | None:
    """The number that a whole text is; None if it is none.

    >>> as_number("about $4.5 million", "en").value, as_number("7 May 1945", "en"), as_number("3 to 5", "en")
    (4500000.0, None, None)
    """
    plain = _plain(text, language)
    found = list(_quantities(plain, language))
    if len(found) != 1:
        return None
    before, after = plain[: found[0].start], plain[found[0].end :]
    if not _APPROXIMATE.fullmatch(before.strip()) or not _FEW_WORDS.fullmatch(after):
        return None
    # "50 Cent" and "Three Mile Island" are names.
    is_name = language == "en" and any(word[0].isupper() for word in re.findall(r"\w+", after))
    return None if is_name or _DATE.search(plain) else found[0]


def numbers(text: str, language: Language) -> Iterator[Quantity]:
    """The numbers in a text, without days, times of day, and the ends of ranges and alternatives."""
    plain = _DATE.sub(lambda found: " " * len(found[0]), _plain(text, language))
    found = list(_quantities(plain, language))
    in_range = [
        _is_range(plain[max(0, one.start - 20) : one.start], plain[one.end : other.start])
        for one, other in itertools.pairwise(found)
    ]
    for place, each in enumerate(found):
        if not any(in_range[max(0, place - 1) : place + 1]):
            yield each


def _plain(text: str, language: Language) -> str:
    return plain_numbers(plain_marks(text).replace("\u00a0", " "), language).strip()


def _is_range(before: str, between: str) -> bool:
    """Whether two numbers are a range or alternatives: "3 to 5", "3 or 4", "between 3 and 5"; "3 and 5" is a list."""
    if not _RANGE_BETWEEN.fullmatch(between):
        return False
    return between.strip().lower() not in _LIST_WORDS or bool(_BETWEEN.search(before))


def _quantities(plain: str, language: Language) -> Iterator[Quantity]:
    found = [(match.start(), match.end(), match) for match in _NUMBER.finditer(plain)]
    if language == "en":
        found += [(match.start(), match.end(), match) for match in _NUMBER_WORD.finditer(plain)]
    past = 0
    for start, end, match in sorted(found, key=lambda each: each[:2]):
        if start >= past and (quantity := _quantity(plain, start, end, match, language)):
            past = quantity.end
            yield quantity


def _quantity(plain: str, start: int, end: int, match: regex.Match[str], language: Language) -> Quantity | None:
    """The number of a match with what follows it: power of ten, million, unit; None if letters make it a name (3rd, 4x4)."""
    groups = match.groupdict()
    if "words" in groups:
        value, currency = _value_of(groups["words"]), None
        value = -value if groups["minus"] else value
    else:
        value, currency = float(groups["digits"]) / float(groups["divisor"] or 1), groups["currency"]
        value = -value if (groups["sign"] or "+").strip() != "+" or groups["inner"] else value
    if power := _POWER_OF_TEN.match(plain, end):
        exponent = (power[1] or power[2] or power[3]).translate(_SUPERSCRIPTS)
        value, end = value * float(f"1e{exponent}"), power.end()  # a huge exponent makes infinity, not an error
    while (word := _NEXT_WORD.match(plain, end)) and (factor := _multiplier(word, end, currency, language)):
        value, end = value * factor, word.end()
    gap = _SPACE.match(plain, end).end()
    if currency:
        return Quantity(value, currency_unit(currency), start, end)
    unit = parse_unit(plain[gap : gap + _LONGEST_UNIT])
    if unit:
        return Quantity(value, unit[0], start, gap + unit[1])
    return None if _LETTERS.match(plain, end) else Quantity(value, None, start, end)


def _value_of(words: str) -> float:
    """The number that English words below a thousand say.

    >>> _value_of("two hundred and twenty-five"), _value_of("a hundred")
    (225.0, 100.0)
    """
    total = 0.0
    for word in words.lower().replace("-", " ").split():
        total = max(total, 1.0) * 100 if word == "hundred" else total + _WORD_VALUES.get(word, 0.0)
    return total or float("zero" not in words.lower())


def _multiplier(word: regex.Match[str], end: int, currency: str | None, language: Language) -> float | None:
    """What the next word multiplies a number by; letters that may also be a unit need a currency or no space before them."""
    text, is_near = word["word"].rstrip("."), bool(currency) or word.start("word") == end
    match text:
        case "M":
            return 1e6
        case "m" | "b" | "B" if currency or (is_near and text == "B"):
            return 1e6 if text == "m" else 1e9
        case "k" | "K" if not is_near:  # 300 K is a temperature
            return None
        case "mil" if language == "en":
            return None
    return multiplier(text, language)


def _may_be_year(text: str) -> bool:
    """Whether a number may be a year: four digits from 1000 to 2100, with neither a separator nor a unit."""
    return bool(_YEAR.fullmatch(plain_marks(text).strip(" 年")))


def _is_same(found: Quantity, gold: Quantity, tolerance: float) -> bool:
    value, wanted = found.value, gold.value
    if gold.unit is not None:
        if found.unit is None:
            if gold.unit.dimension != "percent" or abs(value) > 1:
                return False
            value *= 100  # 0.5 is 50 %
        elif not found.unit.may_equal(gold.unit):
            return False
        else:
            value *= found.unit.factor / gold.unit.factor
    return math.isclose(value, wanted, rel_tol=_ROUNDING) or abs(value - wanted) <= tolerance * abs(wanted)
