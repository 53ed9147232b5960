"""Units of measurement after a number, and words such as million that multiply a number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import regex  # type: ignore[import-untyped]  # the library has no stubs

from ragtune_ray.config import Language
from ragtune_ray.index.words import without_accents


@dataclass(frozen=True, slots=True)
class Unit:
    """What a number counts. Units of the same dimension can be converted into each other."""

    dimension: str
    """A sign or word with several meanings has them all, separated by "|": the pound is money or weight."""
    factor: float = 1.0
    """Size of the unit in the unit for which the dimension is named."""

    def may_equal(self, other: Unit) -> bool:
        """Whether both may be of one dimension.

        >>> Unit("sterling|pound").may_equal(Unit("pound")), Unit("sterling").may_equal(Unit("pound"))
        (True, False)
        """
        return not set(self.dimension.split("|")).isdisjoint(other.dimension.split("|"))


_PREFIXED_SYMBOLS = {
    "m": "metre", "g": "gram", "s": "second", "l": "litre", "L": "litre", "W": "watt", "V": "volt", "A": "ampere", "Hz": "hertz",
    "Pa": "pascal", "J": "joule", "N": "newton", "B": "byte", "Wh": "watt-hour", "cal": "calorie", "bit": "bit", "Ω": "ohm",
    "K": "kelvin",
}  # fmt: skip
_PREFIXES = {
    "": 1.0,
    "n": 1e-9,
    "µ": 1e-6,
    "μ": 1e-6,
    "m": 1e-3,
    "c": 0.01,
    "d": 0.1,
    "h": 100.0,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
}
_PREFIXES |= {"T": 1e12}
_ONLY_LARGE = frozenset({"B", "bit", "Wh", "cal"})
_PREFIXED_NAMES = """
metre metre metres meter meters metern metro metros metri
gram gram grams gramme grammes gramm gramos grammi gramas
litre litre litres liter liters litern litro litros litri
watt watt watts
volt volt volts
ampere ampere amperes amp amps
hertz hertz
pascal pascal pascals
joule joule joules
newton newton newtons
byte byte bytes
calorie calorie calories
"""
_PREFIX_NAMES = {
    "": 1.0, "nano": 1e-9, "micro": 1e-6, "mikro": 1e-6, "milli": 1e-3, "mili": 1e-3, "centi": 0.01, "zenti": 0.01, "kilo": 1e3,
    "chilo": 1e3, "quilo": 1e3, "mega": 1e6, "giga": 1e9, "tera": 1e12,
}  # fmt: skip
_OTHERS = """
second 1 sec secs second seconds sekunde sekunden seconde secondes segundo segundos secondi 秒
second 60 min mins minute minutes minuten minuto minutos minuti 分钟
second 3600 h hr hrs hour hours stunde stunden heure heures hora horas ora ore uur 小时
second 86400 day days tag tage tagen jour jours dia dias giorno giorni dag dagen 天
second 604800 week weeks woche wochen semaine semaines semana semanas settimana settimane weken 周
month 1 month months monat monate monaten mois mes meses mese mesi maand maanden 个月
year 1 year years yr yrs jahr jahre jahren an ans annee annees ano anos anno anni jaar лет
gram 1000000 t tonne tonnes tonnen 吨
gram 1000 kilo kilos кг 公斤 千克
metre 1000 км 公里 千米
metre 1 米
hectare 1 ha hectare hectares hektar
acre 1 acre acres
mile 1 mi mile miles
foot 1 ft foot feet
inch 1 inch inches
yard 1 yd yard yards
sterling 1 £ gbp 英镑
pound 1 lb lbs
sterling|pound 1 pound pounds
ounce 1 oz ounce ounces
gallon 1 gallon gallons
mile/second 0.0002777777777777778 mph
metre/second 0.2777777777777778 kmh kph
knot 1 knot knots
percent 1 % percent prozent procent 百分
percent 0.1 ‰
kelvin 1 kelvin kelvins
celsius 1 °c ℃ celsius
fahrenheit 1 °f ℉ fahrenheit
degree 1 ° degree degrees
decibel 1 db decibel decibels
byte 1024 kib
byte 1048576 mib
byte 1073741824 gib
dollar 1 us$ usd 美元
dollar-au 1 a$ aud
dollar-ca 1 c$ cad
dollar|dollar-au|dollar-ca 1 $ dollar dollars
euro 1 € eur euro euros 欧元
yen 1 jpy yen 日元 円
yuan 1 cny rmb yuan 元 人民币
yen|yuan 1 ¥
rupee 1 ₹ inr rupee rupees
franc 1 chf franc francs franken
rouble 1 ₽ rub rouble roubles ruble rubles рублей
"""
_PER_CENT = regex.compile(r"per ?cent\b|pour cent\b|por ciento\b|por cento\b")
_NATION = regex.compile(r"(?:US|U\.S\.) (?=dollars?\b)")
CURRENCY = r"(?:\b(?:us|c|a)?\$|[$€£¥₹₽]|\b(?:usd|aud|cad|eur|gbp|jpy|cny|rmb|chf)\b)"
"""A currency before a number; ignore its case."""

_MULTIPLIERS = """
100 hundred
1000 k thousand tausend mille mil mila duizend тыс тысяч тысячи 千
10000 万 萬
100000 lakh
1000000 million millions millionen mio millon millones milione milioni milhao milhoes miljoen mln млн миллион миллиона
1000000 миллионов 百万
10000000 crore 千万
100000000 亿 億
1000000000 bn billion billions milliard milliards milliarde milliarden mrd miliardo miliardi miljard mld млрд миллиард миллиарда
1000000000 миллиардов bilhao bilhoes 十亿
1000000000000 trillion trillions tn billionen billones biljoen 万亿 兆
"""
LONG_SCALE = frozenset({"da", "de", "fr", "no"})
"""Languages in which the word billion means 1e12."""

_ATOM = regex.compile(
    r"(?P<power>(?i:square|cubic|sq\.?|cu\.?) )?(?P<word>°?[^\W\d_]+|[°%‰€$£¥₹₽℃℉Ω])(?P<raised>\^?[23²³](?!\d))?"
)
_PER = regex.compile(r" ?/ ?| per | pro | par | por ")
_POWERS = {"s": 2, "2": 2, "²": 2, "c": 3, "3": 3, "³": 3}
_HAN = regex.compile(r"\p{Han}+")
_LONGEST_HAN = 3


def parse_unit(text: str) -> tuple[Unit, int] | None:
    """The unit at the start of a text and the number of its characters; None if there is none.

    >>> parse_unit("km wide"), parse_unit("mph"), parse_unit("m² of glass"), parse_unit("apples")
    ((Unit(dimension='metre', factor=1000.0), 2), (Unit(dimension='mile/second', factor=0.0002777777777777778), 3), \
(Unit(dimension='metre2', factor=1.0), 2), None)
    """
    if percent := _PER_CENT.match(text.lower()):
        return Unit("percent"), percent.end()
    nation = _NATION.match(text)
    if (found := _atom(text, nation.end() if nation else 0)) is None:
        return None
    unit, end = found
    per = _PER.match(text, end)
    if per and (divisor := _atom(text, per.end())):
        dimension = "|".join(f"{each}/{divisor[0].dimension}" for each in unit.dimension.split("|"))
        return Unit(dimension, unit.factor / divisor[0].factor), divisor[1]
    return unit, end


def currency_unit(text: str) -> Unit:
    """The unit of a match of `CURRENCY`.

    >>> currency_unit("US$ ")
    Unit(dimension='dollar', factor=1.0)
    """
    return _units()[text.strip().lower()]


def _atom(text: str, start: int) -> tuple[Unit, int] | None:
    found = _ATOM.match(text, start)
    if not found:
        return None
    word, end = found["word"], found.end()
    if han := _HAN.match(word):  # no space separates a unit from the next word
        lengths = range(min(_LONGEST_HAN, len(han[0])), 0, -1)
        word = next((word[:length] for length in lengths if word[:length] in _units()), word)
        end = found.start("word") + len(word)
    unit = _units().get(word) or _units().get(without_accents(word.casefold()))
    if unit is None:
        return None
    power = _POWERS.get((found["raised"] or found["power"] or "").strip("^")[:1].lower(), 1)
    return (Unit(f"{unit.dimension}{power}", unit.factor**power) if power > 1 else unit), end


def multiplier(word: str, language: Language) -> float | None:
    """What a word or sign after a number multiplies it by.

    >>> multiplier("Mio.", "de"), multiplier("billion", "en"), multiplier("billion", "de"), multiplier("K", "en")
    (1000000.0, 1000000000.0, 1000000000000.0, 1000.0)
    """
    plain = without_accents(word.casefold().rstrip("."))
    if plain == "billion" and language in LONG_SCALE:
        return 1e12
    return _multipliers().get(plain)


@cache
def _units() -> dict[str, Unit]:
    """Each spelling of a unit: symbols with their case, all others in lower case without accents."""
    found: dict[str, Unit] = {}
    for dimension, *names in map(str.split, _PREFIXED_NAMES.strip().splitlines()):
        for prefix, factor in _PREFIX_NAMES.items():
            found |= {prefix + name: Unit(dimension, factor) for name in names}
    for dimension, size, *names in map(str.split, _OTHERS.strip().splitlines()):
        found |= {name: Unit(dimension, float(size)) for name in names}
    for symbol, dimension in _PREFIXED_SYMBOLS.items():
        usual = _PREFIXES if symbol not in _ONLY_LARGE else {"", "k", "M", "G", "T"}  # dB is no tenth of a byte
        found |= {prefix + symbol: Unit(dimension, _PREFIXES[prefix]) for prefix in usual}
    return found


@cache
def _multipliers() -> dict[str, float]:
    return {name: float(size) for size, *names in map(str.split, _MULTIPLIERS.strip().splitlines()) for name in names}
