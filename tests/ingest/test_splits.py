"""Splits share no document, do not change when a corpus grows, and have the requested sizes."""

import dataclasses
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray import config
from ragtune_ray.ingest.queries import read_queries
from ragtune_ray.ingest.splits import (
    SPLITS,
    LeakError,
    assign_splits,
    check_leaks,
    group_of,
    positives,
    selected_queries,
)
from ragtune_ray.schema import Query, Reject
from tests.support.corpora import squad, write

By = Literal["document", "folder"]
SHARES = (4.0, 1.0, 1.0)


def query(name: str, *relevant: str, irrelevant: tuple[str, ...] = ()) -> Query:
    documents = (*relevant, *irrelevant)
    relevances = (1.0,) * len(relevant) + (0.0,) * len(irrelevant)
    return Query(name, f"{name}?", None, documents, relevances, "all")


@pytest.mark.parametrize(
    ("document_id", "folder"),
    [
        ("moon/3", "moon"),
        ("AC/DC/0", "AC/DC"),
        ("a/b/notes.md", "a/b"),
        ("notes.md", "notes.md"),
        ("/notes.md", "/notes.md"),
    ],
)
def test_folder_of_a_document_is_the_part_before_the_last_slash(document_id: str, folder: str) -> None:
    assert group_of(document_id, "folder") == folder
    assert group_of(document_id, "document") == document_id


def test_only_documents_with_positive_relevance_are_positives() -> None:
    judged = Query("q", "?", None, ("a", "b", "c", "d"), (1.0, 0.0, -1.0, 0.25), "all")
    assert positives(judged) == ("a", "d")
    assert positives(query("q", irrelevant=("a",))) == ()


def components(queries: list[Query], by: By) -> list[set[str]]:
    """Sets of groups that queries link, found by merging sets that overlap until none do."""
    sets = [{group_of(name, by) for name in positives(row)} for row in queries if positives(row)]
    merged = True
    while merged:
        merged = False
        for one, other in itertools.combinations(sets, 2):
            if one & other:
                sets.remove(other)
                one.update(other)
                merged = True
                break
    return sets


DOCUMENTS = [f"{folder}/{number}" for folder in "abcdefgh" for number in range(4)]
QUERIES = st.lists(st.lists(st.sampled_from(DOCUMENTS), max_size=3, unique=True), max_size=14).map(
    lambda rows: [query(f"q{number}", *documents) for number, documents in enumerate(rows)]
)
BY = st.sampled_from(["document", "folder"])
SOME_SHARES = st.tuples(*[st.integers(0, 5)] * 3).filter(any)


@given(QUERIES, BY, SOME_SHARES, st.integers(0, 10**6))
def test_no_document_or_folder_is_in_two_splits(queries: list[Query], by: By, shares: Any, seed: int) -> None:
    splits = assign_splits(queries, by, shares, seed)
    assert list(splits) == [row.query_id for row in queries]
    seen: dict[str, set[str]] = {}
    for row in queries:
        for name in positives(row):
            seen.setdefault(group_of(name, by), set()).add(splits[row.query_id])
    assert all(len(found) == 1 for found in seen.values())
    for linked in components(queries, by):
        assert len(set.union(*(seen[group] for group in linked))) == 1, "groups that a query links stay together"
    check_leaks({split: [row for row in queries if splits[row.query_id] == split] for split in SPLITS})
    shuffled = random.Random(seed).sample(queries, len(queries))
    assert assign_splits(shuffled, by, shares, seed) == splits, "the order of the queries does not matter"


@given(QUERIES, st.lists(st.sampled_from([*DOCUMENTS, "new/1", "new/2", "other"])), BY, st.integers(0, 10**6))
def test_group_keeps_its_split_when_queries_are_added(
    queries: list[Query], documents: list[str], by: By, seed: int
) -> None:
    before = assign_splits(queries, by, SHARES, seed)
    # Queries with one relevant document, which link no groups, and queries without any.
    added = [query(f"new{number}", name) for number, name in enumerate(documents)] + [query("unjudged")]
    after = assign_splits([*added, *queries], by, SHARES, seed)
    assert {name: after[name] for name in before} == before
    for row in queries:
        for other, name in zip(added, documents, strict=False):
            if group_of(name, by) in {group_of(relevant, by) for relevant in positives(row)}:
                assert after[other.query_id] == before[row.query_id]


def test_groups_linked_by_a_new_query_keep_one_of_their_splits() -> None:
    alone = [query(f"q{number}", f"d{number}") for number in range(60)]
    before = assign_splits(alone, "document", (1, 1, 1), 0)
    moved = 0
    for one, other in itertools.pairwise(range(60)):
        after = assign_splits([*alone, query("link", f"d{one}", f"d{other}")], "document", (1, 1, 1), 0)
        assert after[f"q{one}"] == after[f"q{other}"] == after["link"]
        assert after["link"] in {before[f"q{one}"], before[f"q{other}"]}
        changed = {name for name in before if after[name] != before[name]}
        assert changed <= {f"q{one}", f"q{other}"}
        moved += len(changed)
    assert moved > 10


def test_links_are_transitive_over_queries() -> None:
    chain = [query(f"q{number}", f"d{number}", f"d{number + 1}") for number in range(200)]
    for seed in range(5):
        for order in (chain, chain[::-1], random.Random(seed).sample(chain, 200)):
            assert len(set(assign_splits(order, "document", (1, 1, 1), seed).values())) == 1


def test_two_query_files_on_the_same_documents_agree() -> None:
    first = [query(f"q{number}", f"d{number}") for number in range(300)]
    second = [query(f"other{number}", f"d{number}", irrelevant=("d0", "d1")) for number in reversed(range(300))]
    one, other = (assign_splits(rows, "document", SHARES, 3) for rows in (first, second))
    assert [one[f"q{number}"] for number in range(300)] == [other[f"other{number}"] for number in range(300)]


def test_drawn_splits_are_pinned() -> None:
    # Otherwise an upgrade would move documents between training and test.
    splits = assign_splits([query(f"q{number}", f"d{number}") for number in range(12)], "document", SHARES, 0)
    assert {name: split for name, split in splits.items() if split != "train"} == {
        "q7": "validation",
        "q10": "test",
    }


@pytest.mark.parametrize("shares", [(4, 1, 1), (1, 1, 1), (0.5, 0.25, 0.25), (90, 0, 10), (0, 1, 0), (3, 1, 0)])
@pytest.mark.parametrize("groups", ["documents", "folders", "unjudged queries"])
def test_each_split_receives_its_share_of_groups(shares: tuple[float, float, float], groups: str) -> None:
    by: By = "folder" if groups == "folders" else "document"
    relevant = [(f"{number}/0", f"{number}/1") if groups != "unjudged queries" else () for number in range(2000)]
    queries = [query(f"q{number}", *names) for number, names in enumerate(relevant)]
    counts = Counter(assign_splits(queries, by, shares, 11).values())
    for split, share in zip(SPLITS, shares, strict=True):
        chance = share / sum(shares)
        deviation = (2000 * chance * (1 - chance)) ** 0.5
        assert abs(counts[split] - 2000 * chance) <= 3.5 * deviation


def test_another_seed_draws_other_splits() -> None:
    queries = [query(f"q{number}", f"d{number}") for number in range(2000)]
    draws = [list(assign_splits(queries, "document", SHARES, seed).values()) for seed in (0, 1)]
    same = sum(one == other for one, other in zip(*draws, strict=True))
    # Independent draws agree with chance 4/6 squared plus twice 1/6 squared: one half.
    assert abs(same - 1000) < 3.5 * 500**0.5


# --- Leaks


def test_leak_error_names_the_documents_and_both_splits() -> None:
    splits = {
        "train": [query("a", "d1", "d2"), query("b", "d3")],
        "validation": [query("c", "d4")],
        "test": [query("d", "d5", "d2"), query("e", "d2")],
    }
    with pytest.raises(LeakError) as error:
        check_leaks(splits)
    message = str(error.value)
    assert message.startswith("1 document(s) are relevant to queries of both train and test ('d2'): ")
    assert "queries.split_by=document" in message
    assert "validation" not in message


def test_leak_error_names_three_of_many_documents() -> None:
    names = [f"d{number}" for number in range(8)]
    with pytest.raises(LeakError, match=r"^5 document.* both validation and test \('d3', 'd4', 'd5', \.\.\.\): "):
        check_leaks({"train": [], "validation": [query("q", *names[3:])], "test": [query("r", *names)]})
    with pytest.raises(LeakError, match=r"^3 document.* both train and validation \('d0', 'd1', 'd2'\): "):
        check_leaks({"train": [query("q", *names[:3])], "validation": (query(name, name) for name in names)})


def test_irrelevant_or_same_split_documents_are_no_leak() -> None:
    check_leaks(
        {
            "train": [query("a", "d1", irrelevant=("d3",)), query("b", "d1", "d2")],
            "validation": [query("c", "d3", irrelevant=("d1", "d2")), query("unjudged")],
            "test": [query("d", irrelevant=("d1", "d3"))],
        }
    )
    check_leaks({})


@given(QUERIES, st.lists(st.sampled_from(SPLITS), min_size=14, max_size=14))
def test_leak_is_raised_only_for_documents_in_two_splits(queries: list[Query], names: list[str]) -> None:
    splits = {split: [row for row, name in zip(queries, names, strict=False) if name == split] for split in SPLITS}
    seen = [{name for row in rows for name in positives(row)} for rows in splits.values()]
    if any(one & other for one, other in itertools.combinations(seen, 2)):
        with pytest.raises(LeakError):
            check_leaks(splits)
    else:
        check_leaks(splits)


# --- Files


def squad_file(path: Path, num_articles: int) -> Path:
    """Articles of two documents each; the first has two questions, one of them without answers, the other has one."""
    articles: list[dict[str, Any]] = []
    for number in range(num_articles):
        questions = [
            {"id": f"{number}-{kind}", "question": f"{kind} {number}?", "answers": answers}
            for kind, answers in (("what", [{"text": "x", "answer_start": 0}]), ("why", []))
        ]
        (article,) = squad(*questions)["data"]
        article["title"] = f"Article_{number}"
        article["paragraphs"][1]["qas"] = [{"id": f"{number}-other", "question": "Z?", "answers": []}]
        articles.append(article)
    articles[0]["paragraphs"].append({"context": "Broken.", "qas": [{"id": "broken"}]})
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return path


def chosen(path: Path, split: str, by: str, **changed: Any) -> tuple[list[Query], list[Reject]]:
    settings = config.Queries.model_validate({"path": str(path), "split": split, "split_by": by} | changed)
    rows = list(selected_queries(settings))
    return [row for row in rows if isinstance(row, Query)], [row for row in rows if isinstance(row, Reject)]


def test_split_by_folder_keeps_questions_of_an_article_together(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "squad.json", 40)
    every, rejects = chosen(path, "all", "folder")
    assert [row.query_id for row in every[:4]] == ["0-what", "0-why", "0-other", "1-what"]
    assert len(every) == 120
    assert len(rejects) == 1
    assert dict(Counter(row.split for row in every)).keys() == set(SPLITS)
    articles: dict[str, set[str]] = {}
    for row in every:
        (document_id,) = row.document_ids
        assert document_id.startswith(f"Article_{row.query_id.partition('-')[0]}/")
        articles.setdefault(document_id.partition("/")[0], set()).add(row.split)
    assert len(articles) == 40
    assert all(len(splits) == 1 for splits in articles.values())
    for split in SPLITS:
        rows, found = chosen(path, split, "folder")
        assert rows == [row for row in every if row.split == split]
        assert found == rejects, "each split yields the rejects"


def test_split_by_document_keeps_questions_of_a_paragraph_together(tmp_path: Path) -> None:
    every, _ = chosen(squad_file(tmp_path / "squad.json", 40), "all", "document")
    split_of = {row.query_id: row.split for row in every}
    assert all(split_of[f"{number}-what"] == split_of[f"{number}-why"] for number in range(40))
    assert any(split_of[f"{number}-what"] != split_of[f"{number}-other"] for number in range(40))


def test_drawn_splits_follow_shares_and_split_seed(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "squad.json", 40)
    assert len(chosen(path, "test", "folder", split_shares=(0, 0, 2))[0]) == 120
    assert chosen(path, "train", "folder", split_shares=(0, 0, 2))[0] == []
    draws = [[row.split for row in chosen(path, "all", "folder", split_seed=seed)[0]] for seed in (0, 1)]
    assert draws[0] != draws[1]


def test_given_splits_are_used_unless_splits_are_drawn(tmp_path: Path) -> None:
    rows = [
        {"id": number, "text": f"{number}?", "document_id": "same", "split": split}
        for number, split in enumerate(["train", "dev", "test", "train"])
    ]
    path = write(tmp_path / "q.jsonl", *rows, "broken")
    given_rows, rejects = chosen(path, "train", "given")
    assert [row.query_id for row in given_rows] == ["0", "3"]
    assert [*given_rows, *rejects] == list(read_queries(str(path), "train"))
    drawn, _ = chosen(path, "all", "document")
    assert len({row.split for row in drawn}) == 1, "all queries are about one document"
    assert [dataclasses.replace(row, split="") for row in drawn] == [
        dataclasses.replace(row, split="") for row in read_queries(str(path)) if isinstance(row, Query)
    ]


def test_queries_that_change_while_they_are_read_are_of_one_version(tmp_path: Path) -> None:
    def lines(word: str) -> list[dict[str, Any]]:
        return [{"id": n, "text": f"{word} {n}?", "document_id": f"{word}{n}"} for n in range(20)]

    path = write(tmp_path / "queries.jsonl", *lines("amber"))
    rows = selected_queries(config.Queries(path=str(path), split_by="document"))
    first = next(rows)
    write(path, *lines("basalt"))  # splits of these documents were not drawn
    found = [first, *rows]
    assert [row.text for row in found if isinstance(row, Query)] == [f"amber {n}?" for n in range(20)]
