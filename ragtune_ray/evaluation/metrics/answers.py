"""Metrics of one answer against its gold answers, by the tokens of `normalization`."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence

from ragtune_ray.answering.abstention import is_abstention
from ragtune_ray.config import Language, Normalization
from ragtune_ray.evaluation.metrics.normalization import ARTICLES, normalize_answer, plain_marks


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
    golds = [normalize_answer(gold, language, normalization).split() for gold in answers]
    return max(_f_measure((Counter(found) & Counter(gold)).total(), found, gold) for gold in golds)


def rouge_l(answer: str, answers: Sequence[str], language: Language, normalization: Normalization = "strict") -> float:
    """ROUGE-L (Lin 2004) of the closest gold answer: F-measure of the longest common subsequence of tokens.

    As token F1, but the tokens must be in the same order. Of texts without tokens as in `token_f1`; arguments as for
    `exact_match`.

    >>> rouge_l("police killed the gunman", ["police ended the gunman"], "en")  # 2 of 3 tokens, 2 of 3
    0.6666666666666666
    """
    from rapidfuzz.distance import LCSseq

    if not answers:
        return float(is_abstention(answer))
    found = normalize_answer(answer, language, normalization).split()
    golds = [normalize_answer(gold, language, normalization).split() for gold in answers]
    return max(_f_measure(LCSseq.similarity(found, gold), found, gold) for gold in golds)


def _f_measure(common: int, found: list[str], gold: list[str]) -> float:
    """Harmonic mean of the shares of found and gold tokens that are common; 1 if neither has a token, 0 if only one has."""
    if not found or not gold:
        return float(found == gold)
    if not common:
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
        if language == "en" and tokens.rpartition(" ")[2] in ARTICLES:
            keeps_case = tokens in ARTICLES
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
    text = plain_marks(text)
    words = (word.strip(string.punctuation) for word in (text if keeps_case else text.lower()).split())
    return " ".join(filter(None, words))
