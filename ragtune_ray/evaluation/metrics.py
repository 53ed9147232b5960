"""Retrieval, answer and citation metrics of one query: numbers from 0 to 1, larger is better."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from ragtune_ray import RagtuneError
from ragtune_ray.answering.abstention import is_abstention
from ragtune_ray.answering.citations import UNSPACED_BLOCKS
from ragtune_ray.index.words import visible
from ragtune_ray.schema import Citation, Hit

Language = Literal["en", "zh"]
Normalization = Literal["squad", "strict"]


class MetricError(RagtuneError, ValueError):
    """Records or values that cannot be scored; the message names them and the rule."""


def documents_of(hits: Sequence[Hit]) -> list[str]:
    """Distinct documents of one query's hits (in any order), each at the rank of its best passage.

    Raises:
        MetricError: a rank is repeated, so hits of two queries or two runs are mixed.

    >>> documents_of([Hit("q", "b#1", "b", 2, 0.8), Hit("q", "a#0", "a", 1, 0.9), Hit("q", "a#4", "a", 3, 0.1)])
    ['a', 'b']
    """
    by_rank = {hit.rank: hit.document_id for hit in hits}
    if len(by_rank) < len(hits):
        (rank, count), *_ = Counter(hit.rank for hit in hits).most_common(1)
        raise MetricError(
            f"hits of query {hits[0].query_id!r}: rank {rank} occurs {count} times; pass the hits of one query from one run"
        )
    return list(dict.fromkeys(by_rank[rank] for rank in sorted(by_rank)))


def recall_at_k(qrels: Mapping[str, float], ranking: Sequence[str], k: int) -> float:
    """Share of the relevant ids that are among the first k.

    Args:
        qrels: id -> relevance; above 0 is relevant.
        ranking: distinct ids, best first; may be shorter than k.
        k: cutoff, at least 1.

    Raises:
        MetricError: k is below 1, an id is repeated, or nothing is relevant (such a query is not scored).

    >>> recall_at_k({"a": 1, "b": 1}, ["x", "a", "b"], 2)
    0.5
    """
    gains = _gains(qrels, ranking, k)
    return sum(gain > 0 for gain in gains) / len(relevant_only(qrels))


def mrr_at_k(qrels: Mapping[str, float], ranking: Sequence[str], k: int) -> float:
    """Reciprocal rank of the first relevant id among the first k, 0 if there is none; its mean over queries is MRR@k.

    Arguments, range and errors are those of `recall_at_k`.

    >>> mrr_at_k({"a": 1, "b": 1}, ["x", "a", "b"], 2)
    0.5
    """
    gains = _gains(qrels, ranking, k)
    return next((1 / rank for rank, gain in enumerate(gains, start=1) if gain > 0), 0.0)


def ndcg_at_k(qrels: Mapping[str, float], ranking: Sequence[str], k: int) -> float:
    """Normalised discounted cumulative gain of the first k, as in trec_eval: gain = relevance, discount = log2(rank + 1).

    Arguments, range and errors are those of `recall_at_k`.

    >>> round(ndcg_at_k({"a": 1, "b": 3}, ["a", "b"], 10), 4)  # (1/1 + 3/log2(3)) / (3/1 + 1/log2(3))
    0.7967
    """
    gains = _gains(qrels, ranking, k)
    ideal = sorted(relevant_only(qrels).values(), reverse=True)[:k]
    return _discounted(gains) / _discounted(ideal)


def relevant_only(qrels: Mapping[str, float]) -> dict[str, float]:
    """The qrels above 0."""
    return {name: relevance for name, relevance in qrels.items() if relevance > 0}


def _gains(qrels: Mapping[str, float], ranking: Sequence[str], k: int) -> list[float]:
    if k < 1:
        raise MetricError(f"cutoff k is {k}; it must be at least 1")
    first = ranking[:k]
    if len(set(first)) < len(first):
        name = Counter(first).most_common(1)[0][0]
        raise MetricError(f"id {name!r} occurs twice in the ranking; ids must be distinct")
    if not any(relevance > 0 for relevance in qrels.values()):
        raise MetricError(f"no relevance above 0 among {len(qrels)} qrels; a query without a relevant id is not scored")
    return [max(qrels.get(name, 0.0), 0.0) for name in first]


def _discounted(gains: Iterable[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ENGLISH_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE_PUNCTUATION = re.compile(
    "[\u00b7\u2010-\u2027\u2030-\u205e"  # general punctuation
    "\u3001-\u3004\u3008-\u3020\u3030\u30fb"  # CJK punctuation, without 々 (U+3005) and 〇 (U+3007), which are characters
    "\ufe10-\ufe1f\ufe30-\ufe6f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe5]"  # full-width forms
)
_CHINESE_TOKEN = re.compile(r"[0-9a-zß-öø-ɏ]+|\S")
_CHINESE_TOKEN_WITH_SIGNS = re.compile(r"[!-~ß-öø-ɏ]+|\S")

# Full-width forms as ASCII, and the minus sign as a hyphen.
_NARROW = str.maketrans({chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {"\u2212": "-"})
_RANGE_DASH = re.compile(r"(?<=\d)[\u2010-\u2013](?=\d)")
_THOUSANDS = re.compile(r"(?<![\d.,'])\d{1,3}(?:(,\d{3})+|('\d{3})+)(?![\d,']*\d)")
_PERCENT = re.compile(r"(?<=\d)\s*(?:%|per ?cent\b)")
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
_ARTICLES = frozenset({"a", "an", "the"})


def normalize_answer(text: str, language: Language, normalization: Normalization = "strict") -> str:
    """Reduce an answer to the tokens that count in a comparison, separated by single spaces.

    In English: lower case, no ASCII punctuation, no articles. In Chinese: lower case, no ASCII or Chinese punctuation, every
    character is a token, and so is a run of Latin letters and digits.

    `squad` does this as the evaluation scripts of SQuAD v1.1 and CMRC 2018 do, so 4.5 equals 45. `strict` keeps what changes a
    number: its sign, decimal point, percent sign, < or >, and any other sign between two digits; also the signs of C++ and C#.
    Commas between thousands are removed, "percent" equals %, full-width characters equal ASCII, invisible characters such as
    soft hyphens are left out, and accents may be spelled in one character or two. An article that ends the
    text stays, as in "hepatitis A". In both, a text of articles alone stays as it is, so "A" is not equal to "".

    Raises:
        MetricError: the language or the normalization is unknown.

    >>> normalize_answer("The U.S.  Navy!", "en")
    'us navy'
    >>> normalize_answer("-4.50 percent of $1,000.", "en"), normalize_answer("-4.50%", "en", "squad")
    ('-4.50% of 1000', '450')
    >>> normalize_answer("“阿波罗 11号”，1969年。", "zh")
    '阿 波 罗 11 号 1969 年'
    """
    if language not in ("en", "zh"):
        raise MetricError(f"evaluate.language is {language!r}; known are 'en' and 'zh'")
    match normalization:
        case "strict":
            return " ".join(_without_articles(_strict_tokens(text, language), language))
        case "squad" if language == "zh":
            plain = text.lower().translate(_ASCII_PUNCTUATION)
            return " ".join(_CHINESE_TOKEN.findall(_CHINESE_PUNCTUATION.sub("", plain)))
        case "squad":
            plain = text.lower().translate(_ASCII_PUNCTUATION)
            return " ".join(_ENGLISH_ARTICLES.sub(" ", plain).split() or plain.split())
    raise MetricError(f"evaluate.normalization is {normalization!r}; known are 'squad' and 'strict'")


def _strict_tokens(text: str, language: Language) -> list[str]:
    """The tokens of `strict`, articles included."""
    text = unicodedata.normalize("NFC", visible(text))
    text = _RANGE_DASH.sub("-", text.lower().translate(_NARROW))
    text = _THOUSANDS.sub(lambda found: re.sub("[,']", "", found[0]), text)
    text = _BARE_FRACTION.sub("0.", _PERCENT.sub("%", text))
    plain = _KEPT_OR_REMOVED.sub(lambda found: found[1] or "", text)
    plain = plain if plain.strip() else text  # an answer such as "+" is its punctuation
    if language == "zh":
        return _CHINESE_TOKEN_WITH_SIGNS.findall(_CHINESE_PUNCTUATION.sub(" ", plain))
    return plain.split()


def _without_articles(tokens: list[str], language: Language) -> list[str]:
    """English tokens without articles, except one at the end: there it is a name, as in "vitamin A" or "A"."""
    if language == "zh":
        return tokens
    return [token for token in tokens[:-1] if token not in _ARTICLES] + tokens[-1:]


def exact_match(
    answer: str, answers: Sequence[str], language: Language, normalization: Normalization = "strict"
) -> float:
    """1 if the answer equals a gold answer after `normalize_answer`, else 0.

    Args:
        answer: the generated text.
        answers: gold answers, any one suffices; empty for an unanswerable query, which scores 1 if the answer abstains.
        language: of the answers.
        normalization: `evaluate.normalization`.

    >>> exact_match("the Moon.", ["moon", "Luna"], "en"), exact_match("I don't know.", [], "en")
    (1.0, 1.0)
    >>> exact_match("4.5", ["45"], "en"), exact_match("4.5", ["45"], "en", "squad")
    (0.0, 1.0)
    """
    if not answers:
        return float(is_abstention(answer))
    found = normalize_answer(answer, language, normalization)
    return float(any(found == normalize_answer(gold, language, normalization) for gold in answers))


def token_f1(answer: str, answers: Sequence[str], language: Language, normalization: Normalization = "strict") -> float:
    """Harmonic mean of token precision and recall, over bags of tokens, against the closest gold answer.

    If the answer or a gold answer has no token after `normalize_answer`, F1 is 1 if neither has, else 0, as in SQuAD v2.
    Chinese uses bags of characters (the CMRC script uses the longest common substring instead). Arguments as for `exact_match`.

    >>> token_f1("on the far side of the Moon", ["the far side"], "en")  # 2 of 5 tokens, 2 of 2
    0.5714285714285715
    """
    if not answers:
        return float(is_abstention(answer))
    found = normalize_answer(answer, language, normalization).split()
    return max(_f1(found, normalize_answer(gold, language, normalization).split()) for gold in answers)


def _f1(found: list[str], gold: list[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    common = sum((Counter(found) & Counter(gold)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def contains_answer(
    answer: str, answers: Sequence[str], language: Language, normalization: Normalization = "strict"
) -> float:
    """1 if the answer contains the tokens of a gold answer in sequence after `normalize_answer`, else 0.

    A gold answer without tokens never counts. One that ends with an article, such as "hepatitis A", is looked for with all
    articles; one that is an article, such as "A", also with its case. Arguments as for `exact_match`; an unanswerable query
    scores 0 (`score_answers` leaves it out).

    >>> contains_answer("It was Neil Armstrong, in 1969.", ["Armstrong"], "en"), contains_answer("1969", ["196"], "en")
    (1.0, 0.0)
    >>> contains_answer("The answer is A.", ["A"], "en"), contains_answer("It is a riddle.", ["A"], "en")
    (1.0, 0.0)
    """
    found = normalize_answer(answer, language, normalization)
    for gold in answers:
        tokens = normalize_answer(gold, language, normalization)
        if language == "en" and tokens.rpartition(" ")[2] in _ARTICLES:
            keeps_case = tokens in _ARTICLES
            if _contains(_words(answer, keeps_case=keeps_case), _words(gold, keeps_case=keeps_case)):
                return 1.0
        elif _contains(found, tokens):
            return 1.0
    return 0.0


def _contains(text: str, part: str) -> bool:
    """Whether a text of tokens contains these tokens in sequence; never if there are none."""
    return bool(part) and f" {part} " in f" {text} "


def _words(text: str, *, keeps_case: bool) -> str:
    """The words of a text without the punctuation around them; articles stay."""
    text = visible(text)
    words = (word.strip(string.punctuation) for word in (text if keeps_case else text.lower()).split())
    return " ".join(filter(None, words))


def citation_precision(citations: Sequence[Citation], qrels: Mapping[str, float]) -> float:
    """Share of the documents cited by one answer that are relevant, which means a relevance above 0 in `qrels`.

    Raises:
        MetricError: nothing is cited or nothing is relevant, so the share is undefined.

    >>> citation_precision([Citation("a#0", "a", 0, 9), Citation("b#0", "b", 0, 9)], {"a": 1})
    0.5
    """
    cited = {citation.document_id for citation in citations}
    if not cited:
        raise MetricError("the answer cites nothing; its citation precision is undefined")
    return len(cited & _relevant_ids(qrels)) / len(cited)


def citation_recall(citations: Sequence[Citation], qrels: Mapping[str, float]) -> float:
    """Share of the relevant documents that are cited; 0 without citations. Arguments as for `citation_precision`.

    Raises:
        MetricError: nothing is relevant, so the share is undefined.

    >>> citation_recall([Citation("a#0", "a", 0, 9)], {"a": 1, "b": 2, "c": 0})
    0.5
    """
    relevant = _relevant_ids(qrels)
    return len(relevant & {citation.document_id for citation in citations}) / len(relevant)


def _relevant_ids(qrels: Mapping[str, float]) -> set[str]:
    relevant = set(relevant_only(qrels))
    if not relevant:
        raise MetricError(f"no relevance above 0 among {len(qrels)} qrels; citations of such a query are not scored")
    return relevant
