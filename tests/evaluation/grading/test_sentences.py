"""What of an answer is checked: whole sentences, with what each cites."""

import re
from collections.abc import Sequence

import numpy as np
import pytest

from ragtune_ray.answering.citations import citations_by_sentence, parse_citations
from ragtune_ray.evaluation.grading import graders, groundedness
from ragtune_ray.evaluation.grading.sentences import checked_sentences
from ragtune_ray.evaluation.grading.task import Task
from ragtune_ray.schema import Passage, Query
from tests.support.comparisons import answer_row

ONE, TWO = (Passage(f"m#{number}", "m", "", "", "{}", 0, 0) for number in (0, 1))


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ("1. It is red\n2. It is blue", ["1. It is red", "2. It is blue"]),
        ("a. It is red\n12) It is blue.", ["a. It is red", "12) It is blue."]),
        ("Dr. Smith saw Fig. 3. It is red.", ["Dr. Smith saw Fig. 3.", "It is red."]),
        ("The U.S. Army said so, e.g. in 1969. J. R. R. Tolkien did not.",
         ["The U.S. Army said so, e.g. in 1969.", "J. R. R. Tolkien did not."]),
        ("## Colours\n| a | b |\n|---|---|\n| red | blue |\n---\nDone.", ["| a | b |", "| red | blue |", "Done."]),
        ("In the year\n1969.\nIt was July.", ["In the year", "1969.", "It was July."]),
        ("```python\nprint(1)\n```", ["print(1)"]),
        ("1969.", ["1969."]),
        ("It was 5. So be it. 12.", ["It was 5.", "So be it.", "12."]),
        ("See Fig.", ["See Fig."]),
        ("---", ["---"]),
        ("# Red", ["# Red"]),
        ("红色。蓝色。", ["红色。", "蓝色。"]),
    ],
)  # fmt: skip
def test_fragments_are_no_sentences(answer: str, texts: list[str]) -> None:
    assert [text for text, _ in checked_sentences(answer, None, ())] == texts


def test_a_joined_sentence_cites_what_its_parts_cite() -> None:
    parts = (("m#0",), ("m#1", "m#0"), ("m#1",))
    assert checked_sentences("1. Dr. No is red.", parts, ("m#9",)) == [("1. Dr. No is red.", ("m#0", "m#1"))]
    assert checked_sentences("1. It is red.", parts, ("m#9",)) == [("1. It is red.", ("m#9",))]


@pytest.mark.parametrize(
    ("written", "cited"),
    [
        ("- It is red [1]\n- It is blue [2]", [("m#0",), ("m#1",)]),
        ("1. It is red [1]\n2. It is blue [2]", [("m#0",), ("m#1",)]),
        ("It is red [1]\nIt is blue [2]\n", [("m#0",), ("m#1",)]),
        ("It is red.\n[1]\nIt is blue.\n[2]", [("m#0",), ("m#1",)]),
        ("It is red:\n\n* a rose [1] [2]\n* a\n", [(), ("m#0", "m#1"), ()]),
    ],
)
def test_each_item_of_a_list_cites_its_own_passages(written: str, cited: list[tuple[str, ...]]) -> None:
    answer, _ = parse_citations(written, [ONE, TWO])
    found = checked_sentences(answer, citations_by_sentence(written, [ONE, TWO]), ("m#0", "m#1"))
    assert [names for _, names in found] == cited


class Letters:
    """Entails what has words, all of them in the premise; a number alone is entailed by nothing."""

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        words = [[set(re.findall("[a-z]+", text.lower())) for text in pair] for pair in pairs]
        return np.array([float(bool(b) and b <= a) for a, b in words])


def test_a_numbered_list_is_grounded_where_its_items_are() -> None:
    row = answer_row("q", "1. It is red\n2. It is blue", ("m#0",))
    task = graders.task_of(
        "groundedness", Query("q", "Which?", None, (), (), "test"), row, {"m#0": "It is red or blue"}, ()
    )
    assert isinstance(task, Task)
    (made,) = groundedness.NliGrader(Letters()).grade([task])
    assert made.values["groundedness"] == 1.0
