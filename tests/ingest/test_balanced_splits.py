"""Splits with a record keep to their shares, are alike, and no document changes its split when others are added."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragtune_ray import config
from ragtune_ray.ingest import balanced_splits, splits
from ragtune_ray.ingest.inputs import InputError
from ragtune_ray.schema import Query, Reject
from tests.support.corpora import write

SHARES = {"train": 4.0, "validation": 1.0, "test": 1.0}
SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def totals(sizes: dict[str, int], found: dict[str, str]) -> dict[str, int]:
    return {split: sum(size for name, size in sizes.items() if found[name] == split) for split in SHARES}


def distance(sizes: dict[str, int], found: dict[str, str]) -> float:
    whole = sum(sizes.values())
    return max(abs(number / (whole * SHARES[split] / 6) - 1) for split, number in totals(sizes, found).items())


def filled(sizes: dict[str, int], kept: dict[str, str] | None = None) -> dict[str, str]:
    return balanced_splits.fill({name: {"questions": size} for name, size in sizes.items()}, kept or {}, SHARES)


def nearest(sizes: list[int]) -> float:
    """The least distance that any of the 3^n assignments has, by the sums that validation and test can have."""
    whole, sums = sum(sizes), {(0, 0)}
    for size in sizes:
        sums |= {(one + size, two) for one, two in sums} | {(one, two + size) for one, two in sums}
    return min(
        max(abs(number / (whole * share / 6) - 1) for number, share in ((whole - a - b, 4), (a, 1), (b, 1)))
        for a, b in sums
    )


@settings(max_examples=50)
@given(SIZES)
def test_every_split_is_within_ten_percent_of_its_share_where_no_document_is_large(sizes: list[int]) -> None:
    sizes = [*sizes, *[1] * 30, *sizes, *[2] * 10]
    named = {f"d{number}": size for number, size in enumerate(sizes)}
    if max(sizes) <= sum(sizes) / 6:
        # A split of T questions can miss it by half a question, which is more than 10 % where T is below 5.
        assert distance(named, filled(named)) <= max(0.1, 0.5 / (sum(sizes) / 6))


@settings(max_examples=50)
@given(st.lists(st.integers(1, 12), min_size=10, max_size=16))
def test_few_documents_are_divided_about_as_well_as_they_can_be(sizes: list[int]) -> None:
    best = nearest(sizes)
    named = {f"d{number}": size for number, size in enumerate(sizes)}
    found = distance(named, filled(named))
    assert found >= best - 1e-9
    smallest = sum(sizes) / 6
    assert found <= max(0.1, best + min(sizes) / smallest + 0.1), "the search stops at a local optimum"


@settings(max_examples=25)
@given(SIZES, SIZES)
def test_documents_keep_their_split_and_new_ones_fill_what_is_missing(old: list[int], new: list[int]) -> None:
    before = {f"d{number}": size for number, size in enumerate(old)}
    added = {f"new{number}": size for number, size in enumerate([*new, *[1] * (5 * sum(old))])}
    first = filled(before)
    found = filled({**added, **before}, first)
    assert {name: found[name] for name in before} == first
    assert distance({**before, **added}, found) <= max(0.1, 1 / (sum(old) + sum(new) / 6))


def test_a_split_that_is_too_full_gets_nothing_more() -> None:
    sizes = {"old": 30} | {f"d{number}": 1 for number in range(30)}
    found = filled(sizes, {"old": "test"})
    assert totals(sizes, found) == {"train": 24, "validation": 6, "test": 30}  # 30 : 4 + 1


def test_large_documents_and_unanswerable_questions_are_in_every_split() -> None:
    groups = {
        f"large{number}": {"questions": 20, "answerable": 10, "unanswerable": 10, "large": 20} for number in range(12)
    } | {f"small{number}": {"questions": 1, "answerable": 1, "small": 1} for number in range(240)}
    found = balanced_splits.fill(groups, {}, SHARES)
    for split, count in {"train": 8, "validation": 2, "test": 2}.items():
        assert sum(found[f"large{number}"] == split for number in range(12)) == count
        assert sum(found[f"small{number}"] == split for number in range(240)) == 20 * count


def test_a_split_without_a_share_stays_empty() -> None:
    groups = {f"d{number}": {"questions": 1} for number in range(10)}
    found = balanced_splits.fill(groups, {}, {"train": 1, "validation": 0, "test": 1})
    assert Counter(found.values()) == {"train": 5, "test": 5}


# --- Questions and the file


def question(name: str, *documents: str, answers: tuple[str, ...] | None = ("x",)) -> Query:
    return Query(name, f"{name}?", answers, documents, (1.0,) * len(documents), "all")


def draws(folder: Path, **changes: Any) -> config.Queries:
    values = {"path": "questions.jsonl", "split_by": "document", "split_record": str(folder / "splits.json")}
    return config.Queries.model_validate(values | changes)


def corpus(seed: int, num_documents: int) -> list[Query]:
    """Documents with 1 to 12 questions, a quarter of which have no answer."""
    source = random.Random(seed)
    return [
        question(f"d{number}-{place}", f"d{number}", answers=() if source.random() < 0.25 else ("x",))
        for number in range(num_documents)
        for place in range(source.randint(1, 12))
    ]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(20, 80), st.integers(0, 60))
def test_growth_keeps_every_document_in_its_split(
    tmp_path_factory: pytest.TempPathFactory, seed: int, before: int, added: int
) -> None:
    settings = draws(tmp_path_factory.mktemp("growth"))
    queries = corpus(seed, before + added)
    old = [query for query in queries if int(query.document_ids[0][1:]) < before]
    first = splits.record_splits(old, settings)
    random.Random(seed).shuffle(queries)
    found = splits.record_splits(queries, settings)
    assert {name: found[name] for name in first} == first
    for documents in (first, found):
        split_of: dict[str, set[str]] = {}
        for name, split in documents.items():
            split_of.setdefault(name.partition("-")[0], set()).add(split)
        assert all(len(each) == 1 for each in split_of.values())
    assert splits.record_splits(old, settings) == first, "also where documents are left out again"
    for asked, result in ((old, first), (queries, found)):
        for kind in ("answerable", "unanswerable", ""):
            ids = [query.query_id for query in asked if not kind or splits.answer_kind(query) == kind]
            for split, share in SHARES.items():
                wanted = len(ids) * share / 6
                slack = 0.1 * wanted + 1 if not kind else 0.25 * wanted + 3
                slack += 12 * (asked is queries)  # what was drawn stays, and a document has up to 12 questions
                assert abs(sum(result[name] == split for name in ids) - wanted) <= slack


def test_another_seed_draws_other_splits_and_the_order_of_questions_does_not_matter(tmp_path: Path) -> None:
    queries = corpus(1, 100)
    found = [
        splits.record_splits(queries, draws(tmp_path, split_record=f"{tmp_path}/{n}", split_seed=n)) for n in (0, 1)
    ]
    same = sum(found[0][query.query_id] == found[1][query.query_id] for query in queries)
    assert 0.3 < same / len(queries) < 0.7  # (4/6)^2 + 2 (1/6)^2 = 0.5
    assert splits.record_splits(queries[::-1], draws(tmp_path, split_record=f"{tmp_path}/2")) == found[0]


def test_linked_documents_stay_together_and_a_question_on_two_splits_is_left_out(tmp_path: Path) -> None:
    settings = draws(tmp_path)
    alone = [question(f"q{number}", f"d{number}") for number in range(60)]
    first = splits.record_splits(alone, settings)
    one = next(name for name in first if first[name] == "train").replace("q", "d")
    other = next(name for name in first if first[name] == "test").replace("q", "d")
    linking = [question("both", one, other), question("also", other, "new"), question("three", "new", "newer")]
    found = splits.record_splits([*alone, *linking], settings)
    assert {name: found[name] for name in first} == first
    assert found["both"] == ""
    assert found["three"] in {"train", "test"}
    kept = json.loads((tmp_path / "splits.json").read_text())["groups"]
    assert [split for split in kept if "new" in kept[split]] == [split for split in kept if "newer" in kept[split]]


def test_a_question_that_fits_in_no_split_is_a_reject(tmp_path: Path) -> None:
    rows = [{"id": f"q{n}", "text": f"{n}?", "answers": ["x"], "document_id": f"d{n}"} for n in range(12)]
    path = write(tmp_path / "q.jsonl", *rows)
    settings = draws(tmp_path, path=str(path))
    first = {row.query_id: row.split for row in splits.selected_queries(settings) if isinstance(row, Query)}
    assert Counter(first.values()) == {"train": 8, "validation": 2, "test": 2}
    ends = [next(name for name in first if first[name] == split).replace("q", "d") for split in ("train", "test")]
    write(path, *rows, {"id": "both", "text": "both?", "document_ids": ends})
    found = list(splits.selected_queries(settings))
    (reject,) = [row for row in found if isinstance(row, Reject)]
    assert "query 'both'" in reject.place
    assert "splits.json" in reject.reason
    assert {row.query_id: row.split for row in found if isinstance(row, Query)} == first


def test_looking_writes_nothing_and_finds_what_is_drawn_later(tmp_path: Path) -> None:
    queries, settings = corpus(2, 30), draws(tmp_path)
    looked = splits.record_splits(queries, settings, write=False)
    assert not (tmp_path / "splits.json").exists()
    assert splits.record_id(settings) == ""
    assert splits.record_splits(queries, settings) == looked
    first = splits.record_id(settings)
    splits.record_splits(corpus(2, 40), settings)
    assert splits.record_id(settings) == first != ""
    assert splits.record_id(draws(tmp_path, split_by="given")) == ""


def test_a_record_of_another_draw_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    queries, record = corpus(3, 10), tmp_path / "splits.json"
    splits.record_splits(queries, draws(tmp_path))
    with pytest.raises(InputError, match=r"split_by=document and split_seed=0, but this config has folder and 0"):
        splits.record_splits(queries, draws(tmp_path, split_by="folder"))
    with pytest.raises(InputError, match=r"but this config has document and 4"):
        splits.record_splits(queries, draws(tmp_path, split_seed=4))
    sound = json.loads(record.read_text())
    twice = {**sound["groups"], "test": [*sound["groups"]["test"], sound["groups"]["train"][0]]}
    for broken, reason in (
        ("{", "not a record of splits"),
        ("[]", "not a record of splits"),
        (json.dumps({**sound, "format": 2}), "format 2 is unknown"),
        (json.dumps({**sound, "groups": twice}), "is in two splits"),
        (json.dumps({**sound, "groups": {"dev": ["a"]}}), "'dev' is no split"),
    ):
        record.write_text(broken)
        with pytest.raises(InputError, match=reason):
            splits.record_splits(queries, draws(tmp_path))


def test_drawn_splits_with_a_record_are_pinned(tmp_path: Path) -> None:
    # Otherwise an upgrade would draw other splits from the same questions.
    queries = [question(f"q{n}-{place}", f"d{n}") for n in range(12) for place in range(1 + n % 3)]
    found = splits.record_splits(queries, draws(tmp_path))
    by_split = {split: sorted({name.partition("-")[0] for name in found if found[name] == split}) for split in SHARES}
    assert by_split == {
        "train": ["q10", "q11", "q2", "q3", "q5", "q6", "q8"],
        "validation": ["q0", "q1", "q9"],
        "test": ["q4", "q7"],
    }
