"""BM25 against hand computation and bm25s itself, and its independence of segments, shards and deleted passages."""

import filecmp
import itertools
import math
import random
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragtune_ray.index import bm25
from ragtune_ray.index.bm25 import LexicalIndex, Postings, Statistics, add_statistics, build_segment
from ragtune_ray.index.words import tokens

WORDS = st.sampled_from(
    ["the", "to", "moon", "moons", "mars", "rover", "orbit", "8", "火箭", "发射火箭", "Ärger", "don't"]
)
PASSAGES = st.lists(st.lists(WORDS, max_size=8).map(" ".join), min_size=1, max_size=12)
QUERY = st.lists(WORDS, min_size=1, max_size=5).map(" ".join)
CUTS = st.sets(st.integers(1, 11))
NUMBERS = st.sets(st.integers(0, 11))


def all_terms(text: str, language: str) -> list[str]:
    """Return a passage's terms with stop words: each word is a query of its own, because a lone stop word is kept."""
    return [term for word in text.split() for term in tokens([word], language)[0]]


def cut(values, cuts: set[int]) -> list:
    bounds = [0, *sorted(at for at in cuts if at < len(values)), len(values)]
    return [values[a:b] for a, b in itertools.pairwise(bounds)]


def mask_without(numbers: set[int], length: int) -> np.ndarray:
    return np.array([number not in numbers for number in range(length)], dtype=bool)


def naive_segment(passages: list[str], language: str) -> Postings:
    counters = [Counter(all_terms(passage, language)) for passage in passages]
    vocabulary = sorted(set().union(*counters))
    postings = [(i, counter[token]) for token in vocabulary for i, counter in enumerate(counters) if counter[token]]
    frequencies = [sum(token in counter for counter in counters) for token in vocabulary]
    return Postings(
        tuple(vocabulary),
        np.array([0, *itertools.accumulate(frequencies)], dtype=np.int64),
        np.array([passage for passage, _ in postings], dtype=np.int32),
        np.array([count for _, count in postings], dtype=np.int32),
        np.array([counter.total() for counter in counters], dtype=np.int32),
    )


def assert_same_hits(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> None:
    """Compare bit by bit."""
    np.testing.assert_array_equal(one[1], other[1])
    assert one[0].tobytes() == other[0].tobytes()


@pytest.mark.parametrize("language", ["en", "none"])
@settings(max_examples=60, deadline=None)
@given(passages=PASSAGES, batch=st.sampled_from([1, 2, 5, 2000]))
def test_counting_in_batches_equals_a_naive_count(language: str, passages: list[str], batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bm25, "_BATCH_PASSAGES", batch)
        built = build_segment(iter(passages), language)
    expected = naive_segment(passages, language)
    assert built.vocabulary == expected.vocabulary
    for name in ("indptr", "passages", "counts", "lengths"):
        one, other = getattr(built, name), getattr(expected, name)
        assert (name, one.dtype, one.tolist()) == (name, other.dtype, other.tolist())


def test_at_most_one_batch_of_texts_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "_BATCH_PASSAGES", 10)
    ahead = []
    counted = bm25._count
    monkeypatch.setattr(bm25, "_count", lambda words, numbers: ahead.append(len(words)) or counted(words, numbers))
    assert len(build_segment((f"moon {number}" for number in range(25)), "en").lengths) == 25
    assert ahead == [10, 10, 5]


def test_scores_equal_the_formula_computed_by_hand() -> None:
    index = LexicalIndex([build_segment(["red fox", "red red dog house", "cat"], "none")], "none")
    scores, ids = index.search(["red dog"], 3)
    # N = 3, average length 7/3; df(red) = 2, df(dog) = 1
    idf_red, idf_dog = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)
    norm_two, norm_four = 1.5 * (0.25 + 0.75 * 2 * 3 / 7), 1.5 * (0.25 + 0.75 * 4 * 3 / 7)
    expected = [idf_red * 2 / (2 + norm_four) + idf_dog / (1 + norm_four), idf_red / (1 + norm_two)]
    assert ids.tolist() == [[1, 0, -1]]
    np.testing.assert_allclose(scores[0, :2], expected, rtol=1e-6)
    assert scores[0, 2] == -np.inf
    assert (scores.dtype, ids.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("language", ["en", "none"])
@settings(max_examples=60, deadline=None)
@given(passages=PASSAGES, query=st.lists(WORDS, min_size=1, max_size=5).map(" ".join), cuts=st.sets(st.integers(0, 12)))
def test_any_segmentation_equals_plain_bm25s_and_one_segment_exactly(
    language: str, passages: list[str], query: str, cuts: set[int]
) -> None:
    bounds = [0, *sorted(cut for cut in cuts if cut < len(passages)), len(passages)]
    segments = [build_segment(passages[a:b], language) for a, b in itertools.pairwise(bounds)]
    whole = LexicalIndex([build_segment(passages, language)], language)
    parts = LexicalIndex(segments, language)
    for top_k in (1, 3, len(passages)):
        for one, other in zip(whole.search([query], top_k), parts.search([query], top_k), strict=True):
            np.testing.assert_array_equal(one, other)
    corpus = [all_terms(passage, language) for passage in passages]
    if not any(corpus):
        return
    peer = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    peer.index(corpus, show_progress=False)
    expected = peer.get_scores(tokens([query], language)[0])
    scores, ids = parts.search([query], len(passages))
    hits = ids[0] >= 0
    np.testing.assert_allclose(scores[0][hits], expected[ids[0][hits]], rtol=1e-5)
    assert sorted(ids[0][hits]) == np.flatnonzero(expected > 0).tolist()


@settings(max_examples=40, deadline=None)
@given(passages=PASSAGES, top_k=st.integers(1, 5))
def test_hits_are_ordered_by_score_then_id_and_are_the_best_ones(passages: list[str], top_k: int) -> None:
    index = LexicalIndex([build_segment(passages, "none")], "none")
    scores, ids = index.search(["moon rover 火箭"], top_k)
    every_score, every_id = index.search(["moon rover 火箭"], len(passages))
    ranking = [(-score, number) for score, number in zip(every_score[0], every_id[0], strict=True) if number >= 0]
    assert ranking == sorted(ranking)
    expected = [number for _, number in ranking[:top_k]]
    assert ids[0].tolist() == expected + [-1] * (top_k - len(expected))
    assert scores[0, : len(expected)].tolist() == [-score for score, _ in ranking[:top_k]]


def test_equal_scores_at_the_last_place_go_to_the_smaller_id_across_segments() -> None:
    segments = [build_segment(["mars"] * 3, "en"), build_segment(["mars"] * 3, "en")]
    _, ids = LexicalIndex(segments, "en").search(["mars", "MARS"], 4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2


def test_a_query_of_stop_words_finds_the_passage_that_contains_them() -> None:
    segment = build_segment(["Hamlet asks: to be or not to be, a question", "Macbeth kills sleep"], "en")
    _, ids = LexicalIndex([segment], "en").search(["To be or not to be?"], 2)
    assert ids.tolist() == [[0, -1]]


@pytest.mark.parametrize("segments", [[], [[]], [["", " ?"]], [[], ["moon"], []]])
def test_empty_segments_and_passages_without_words_have_no_hits(segments: list[list[str]]) -> None:
    index = LexicalIndex([build_segment(texts, "en") for texts in segments], "en")
    scores, ids = index.search(["mars", "", "..."], 2)
    assert index.num_passages == sum(map(len, segments))
    assert ids.tolist() == [[-1, -1]] * 3
    assert np.isneginf(scores).all()


@pytest.mark.parametrize("mmap", [False, True])
def test_a_saved_segment_loads_unchanged_and_its_bytes_are_reproducible(tmp_path: Path, mmap: bool) -> None:
    texts = ["Mars 火箭 rover's", "mars mars café", ""]
    for name in ("one", "two"):
        build_segment(texts, "en").save(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False) == (names, [], [])
    loaded, built = Postings.load(tmp_path / "one", mmap=mmap), build_segment(texts, "en")
    assert loaded.vocabulary == built.vocabulary == tuple(sorted(built.vocabulary))
    for name in ("indptr", "passages", "counts", "lengths"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(built, name))
    one, two = LexicalIndex([loaded], "en"), LexicalIndex([built], "en")
    np.testing.assert_array_equal(one.search(["mars"], 3)[0], two.search(["mars"], 3)[0])


def test_an_empty_segment_survives_saving(tmp_path: Path) -> None:
    build_segment([], "en").save(tmp_path)
    assert Postings.load(tmp_path, mmap=False).vocabulary == ()


def test_a_segment_whose_files_do_not_belong_together_is_refused(tmp_path: Path) -> None:
    build_segment(["mars rover"], "en").save(tmp_path)
    (tmp_path / "vocabulary.txt").write_text("mars")
    with pytest.raises(ValueError, match="do not belong together"):
        Postings.load(tmp_path, mmap=False)


def test_an_unknown_language_and_a_top_k_below_one_are_refused_with_their_values() -> None:
    with pytest.raises(ValueError, match="'xx'"):
        build_segment(["a"], "xx")
    with pytest.raises(ValueError, match="got 0"):
        LexicalIndex([], "en").search(["a"], 0)


@pytest.mark.parametrize("top_k", [1, 2, 12])
@settings(max_examples=60, deadline=None)
@given(passages=PASSAGES, query=QUERY, cuts=CUTS, dead=NUMBERS)
def test_an_index_with_deletions_equals_one_of_the_live_passages(
    top_k: int, passages: list[str], query: str, cuts: set[int], dead: set[int]
) -> None:
    alive = mask_without(dead, len(passages))
    live = np.flatnonzero(alive)
    segments = [build_segment(part, "en") for part in cut(passages, cuts)]
    masks = [None if mask.all() else mask for mask in cut(alive, cuts)]
    index = LexicalIndex(segments, "en", alive=masks)
    rebuilt = LexicalIndex([build_segment([passages[number] for number in live], "en")], "en")
    assert index.num_passages == rebuilt.num_passages == len(live)
    terms = tokens([query], "en")[0]
    assert index.statistics(terms) == rebuilt.statistics(terms)
    scores, ids = rebuilt.search([query], top_k)
    assert_same_hits(index.search([query], top_k), (scores, np.where(ids < 0, -1, np.append(live, -1)[ids])))


@settings(max_examples=60, deadline=None)
@given(passages=PASSAGES, query=QUERY, cuts=CUTS, dead=NUMBERS, refused=NUMBERS, top_k=st.integers(1, 5))
def test_a_filter_keeps_scores_and_later_passages_move_up(
    passages: list[str], query: str, cuts: set[int], dead: set[int], refused: set[int], top_k: int
) -> None:
    segments = [build_segment(part, "en") for part in cut(passages, cuts)]
    index = LexicalIndex(segments, "en", alive=cut(mask_without(dead, len(passages)), cuts))
    every_score, every_id = index.search([query], len(passages))
    kept = [place for place, number in enumerate(every_id[0]) if number >= 0 and number not in refused][:top_k]
    scores, ids = index.search([query], top_k, cut(mask_without(refused, len(passages)), cuts))
    missing = top_k - len(kept)
    assert ids[0].tolist() == every_id[0, kept].tolist() + [-1] * missing
    assert scores[0].tolist() == every_score[0, kept].tolist() + [-np.inf] * missing


@settings(max_examples=60, deadline=None)
@given(
    passages=PASSAGES, queries=st.lists(QUERY, min_size=1, max_size=3), cuts=CUTS, dead=NUMBERS, seed=st.integers(0, 9)
)
def test_given_passages_are_scored_as_search_scores_them(
    passages: list[str], queries: list[str], cuts: set[int], dead: set[int], seed: int
) -> None:
    segments = [build_segment(part, "en") for part in cut(passages, cuts)]
    index = LexicalIndex(segments, "en", alive=cut(mask_without(dead, len(passages)), cuts))
    found_scores, found = index.search(queries, len(passages))
    random = np.random.default_rng(seed)
    alive = np.flatnonzero(mask_without(dead, len(passages)))
    wanted = np.stack([random.permutation(np.append(alive, -1)) for _ in queries])
    scores = index.scores_of(queries, wanted)
    assert scores.dtype == np.float32
    for row in range(len(queries)):
        by_id = {int(i): score for i, score in zip(found[row], found_scores[row], strict=True) if i >= 0}
        expected = [-np.inf if i < 0 else by_id.get(int(i), 0.0) for i in wanted[row]]
        assert scores[row].tobytes() == np.array(expected, dtype=np.float32).tobytes()


@settings(max_examples=80, deadline=None)
@given(
    passages=PASSAGES,
    queries=st.lists(QUERY, min_size=1, max_size=3),
    cuts=CUTS,
    dead=NUMBERS,
    refused=NUMBERS,
    shards=st.integers(1, 4),
    top_k=st.integers(1, 5),
)
def test_shards_with_added_statistics_score_exactly_like_the_whole(
    passages: list[str],
    queries: list[str],
    cuts: set[int],
    dead: set[int],
    refused: set[int],
    shards: int,
    top_k: int,
) -> None:
    segments = [build_segment(part, "en") for part in cut(passages, cuts)]
    alive = cut(mask_without(dead, len(passages)), cuts)
    allowed = cut(mask_without(refused, len(passages)), cuts)
    whole = LexicalIndex(segments, "en", alive=alive)
    starts = np.cumsum([0, *(len(segment.lengths) for segment in segments)])
    owned = [list(range(shard, len(segments), shards)) for shard in range(shards)]
    terms = set(itertools.chain.from_iterable(tokens(queries, "en")))
    parts = [LexicalIndex([segments[i] for i in own], "en", alive=[alive[i] for i in own]) for own in owned]
    statistics = add_statistics([part.statistics(terms) for part in parts])
    assert statistics == whole.statistics(terms)
    merged: list[list[tuple[float, int]]] = [[] for _ in queries]
    for own in owned:
        shard = LexicalIndex([segments[i] for i in own], "en", alive=[alive[i] for i in own], statistics=statistics)
        ordinals = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in own] or [np.zeros(0, dtype=int)])
        scores, ids = shard.search(queries, top_k, [allowed[i] for i in own])
        for row, hits in enumerate(merged):
            hits += [(-s, int(ordinals[i])) for s, i in zip(scores[row].tolist(), ids[row], strict=True) if i >= 0]
    scores, ids = whole.search(queries, top_k, allowed)
    for row, hits in enumerate(merged):
        expected = [(-s, int(i)) for s, i in zip(scores[row].tolist(), ids[row], strict=True) if i >= 0]
        assert sorted(hits)[:top_k] == expected


@pytest.mark.parametrize("num_segments", [1, 3, 20])
def test_any_top_k_is_a_prefix_of_the_full_ranking(num_segments: int) -> None:
    chance = random.Random(num_segments)
    words = [f"w{number}" for number in range(300)]
    weights = [1 / (1 + number) for number in range(300)]
    passages = [" ".join(chance.choices(words, weights, k=chance.randint(1, 40))) for _ in range(2000)]
    size = 2000 // num_segments
    segments = [build_segment(passages[at : at + size], "none") for at in range(0, 2000, size)]
    alive = [np.array([chance.random() < 0.8 for _ in segment.lengths]) for segment in segments]
    index = LexicalIndex(segments, "none", alive=alive)
    live = np.flatnonzero(np.concatenate(alive))
    peer = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    peer.index([passages[number].split() for number in live], show_progress=False)
    for query in [" ".join(chance.choices(words, weights, k=8)) for _ in range(20)]:
        every_score, every_id = index.search([query], 2000)
        for top_k in (1, 10, 100):
            assert_same_hits(index.search([query], top_k), (every_score[:, :top_k], every_id[:, :top_k]))
        expected = np.zeros(2000)
        expected[live] = peer.get_scores(query.split())
        hits = every_id[0] >= 0
        assert sorted(every_id[0][hits]) == np.flatnonzero(expected).tolist()
        np.testing.assert_allclose(every_score[0][hits], expected[every_id[0][hits]], rtol=1e-5)


def test_opening_an_index_reads_no_postings() -> None:
    class Closed:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"{name} was read")

    LexicalIndex([Closed()] * 3, "en")  # type: ignore[list-item]


def test_statistics_cover_only_the_own_segments_and_missing_tokens_are_refused() -> None:
    segments, alive = [build_segment(["mars rover", "mars mars", "moon"], "none")], [np.array([True, True, False])]
    given_ones = Statistics(100, 300, {"mars": 50, "moon": 7})
    index = LexicalIndex(segments, "none", alive=alive, statistics=given_ones)
    assert index.statistics(["mars", "moon", "sun"]) == Statistics(2, 4, {"mars": 2, "moon": 0, "sun": 0})
    norm = 1.5 * (0.25 + 0.75 * 2 / 3)
    np.testing.assert_allclose(index.search(["mars"], 1)[0], [[math.log(1 + 50.5 / 50.5) * 2 / (2 + norm)]], rtol=1e-6)
    with pytest.raises(ValueError, match="no frequency of 'rover'"):
        index.search(["mars rover"], 1)
    wrong = LexicalIndex(segments, "none", statistics=Statistics(2, 4, {"mars": 3}))
    with pytest.raises(ValueError, match="3 of 2 passages with 'mars'"):
        wrong.search(["mars"], 1)


def test_statistics_of_different_tokens_are_not_added() -> None:
    assert add_statistics([]) == Statistics(0, 0, {})
    with pytest.raises(ValueError, match="'moon'"):
        add_statistics([Statistics(1, 1, {"mars": 1}), Statistics(1, 2, {"mars": 1, "moon": 1})])


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        pytest.param([], "0 masks for 1 segments", id="too_few"),
        pytest.param([np.ones(3, dtype=bool)], r"\[0\] is bool of shape \(3,\)", id="too_long"),
        pytest.param([np.ones(2, dtype=int)], "is int64 of shape", id="numbers"),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_name(masks: list[np.ndarray], message: str) -> None:
    segments = [build_segment(["mars", "moon"], "en")]
    with pytest.raises(ValueError, match=f"alive.*{message}"):
        LexicalIndex(segments, "en", alive=masks)
    with pytest.raises(ValueError, match=f"allowed.*{message}"):
        LexicalIndex(segments, "en").search(["mars"], 1, masks)


def test_in_german_a_contract_is_found_by_its_plural_with_the_rules_of_the_index() -> None:
    passages = ["Mit den Verträgen endet die Frist.", "Der Vertrag verlängert sich.", "Das Haus wurde verkauft."]

    def found(rules: str, query: str) -> set[int]:
        _, ids = LexicalIndex([build_segment(passages, rules)], rules).search([query], 3)
        return set(ids[0].tolist()) - {-1}

    assert found("de-folded", "Vertrag") == found("de-folded", "Verträge") == {0, 1}
    assert found("en-folded", "Vertrag") == {1}
    assert found("de-folded", "die Häuser") == {2}, "an article finds nothing"
    assert found("en-folded", "die Häuser") == {0}
