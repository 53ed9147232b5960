"""Which passages are drawn: over documents, subjects, lengths and places, and the same for the same seed."""

import numpy as np
import pytest

from ragtune_ray.evaluation.questions.writing.drawing import DrawingError, clusters_of, counts_of, seeds_of, spread
from ragtune_ray.schema import Passage

TEXT = "word " * 30


def corpus(*sizes: int) -> list[Passage]:
    """Documents with so many passages each."""
    return [
        Passage(f"d{document}#{number}", f"d{document}", TEXT, "", "{}", number * 150, number * 150 + 150)
        for document, size in enumerate(sizes)
        for number in range(size)
    ]


def test_every_document_is_drawn_before_any_is_drawn_twice() -> None:
    passages = corpus(*[40, 1, 2] * 10)
    order = spread(passages, np.zeros(len(passages), dtype=int), seed=0)
    assert sorted(order) == list(range(len(passages)))
    first = [passages[place].document_id for place in order[:30]]
    assert len(set(first)) == 30
    assert len({passages[place].document_id for place in order[30:50]}) == 20


def test_first_draws_cover_clusters_lengths_and_places_in_documents() -> None:
    passages = corpus(*[30] * 8, *[10] * 8, *[2] * 8)
    clusters = np.array([int(passage.document_id[1:]) % 4 for passage in passages])
    order = spread(passages, clusters, seed=3)[:12]
    assert {int(clusters[place]) for place in order} == {0, 1, 2, 3}
    drawn = [int(passages[place].document_id[1:]) // 8 for place in order]
    assert [drawn.count(kind) for kind in range(3)] == [4, 4, 4], "short, medium and long documents take turns"
    starts = [
        passages[place].start
        for place in spread(passages, clusters, seed=3)[:24]
        if passages[place].document_id in {f"d{n}" for n in range(8)}
    ]
    assert len(set(starts)) > 3
    assert max(starts) > 15 * 150, "not only the first pages"


def test_a_document_alone_is_drawn_over_its_subjects() -> None:
    passages = corpus(20)
    clusters = np.repeat(np.arange(5), 4)
    order = spread(passages, clusters, seed=1)
    assert sorted(clusters[order[:5]].tolist()) == [0, 1, 2, 3, 4]


def test_the_seed_decides_the_order() -> None:
    passages = corpus(*[3] * 20)
    clusters = np.zeros(60, dtype=int)
    assert spread(passages, clusters, 1) == spread(passages, clusters, 1) != spread(passages, clusters, 2)


def test_clusters_separate_subjects_and_repeat() -> None:
    source = np.random.default_rng(0)
    centres = np.eye(8, dtype=np.float32)[[0, 1, 2]]
    vectors = np.concatenate([centre + 0.01 * source.normal(size=(6, 8)) for centre in centres]).astype(np.float32)
    found = clusters_of(vectors, 0)
    groups = [set(found[start : start + 6].tolist()) for start in (0, 6, 12)]
    assert all(len(group) == 1 for group in groups)
    assert len(set.union(*groups)) == 3
    assert found.tolist() == clusters_of(vectors, 0).tolist()
    assert clusters_of(vectors[:1], 0).tolist() == [0]


def test_kinds_share_the_passages_and_comparisons_have_two() -> None:
    counts = counts_of(10, {"fact": 0.5, "comparison": 0.3, "unanswerable": 0.2})
    assert counts == {"fact": 5, "comparison": 3, "unanswerable": 2}
    passages = corpus(*[1] * 12)
    other = {f"d{number}#0": f"d{number ^ 1}#0" for number in range(12)}
    drawn = seeds_of(passages, counts, 2, lambda asked: [other[each.passage_id] for each in asked])
    assert [len(drawn[kind]) for kind in counts] == [10, 6, 4]
    pairs = [frozenset(seed.passage_ids) for seed in drawn["comparison"] if seed.turn == 0]
    assert len(pairs) == len(set(pairs)) == 4, "a pair is taken in one order"
    assert drawn["fact"][0].passage_ids != drawn["unanswerable"][0].passage_ids


def test_a_small_corpus_is_drawn_again_and_an_empty_one_is_an_error() -> None:
    drawn = seeds_of(corpus(2), {"fact": 4}, 2, lambda asked: ["" for _ in asked])
    assert [(seed.passage_ids[0], seed.turn) for seed in drawn["fact"]] == [
        ("d0#0", 0), ("d0#1", 0), ("d0#0", 1), ("d0#1", 1), ("d0#0", 2), ("d0#1", 2),
    ]  # fmt: skip
    with pytest.raises(DrawingError, match="no passage of 80 characters"):
        seeds_of([], {"fact": 1}, 1, lambda _: [])
