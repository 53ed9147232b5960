"""BM25 against hand computation and bm25s itself, and its independence of segments."""

import filecmp
import itertools
import math
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragtune_ray.lexical import LexicalIndex, Postings, build_segment, tokens

WORDS = st.sampled_from(
    ["the", "to", "moon", "moons", "mars", "rover", "orbit", "8", "火箭", "发射火箭", "Ärger", "don't"]
)
PASSAGES = st.lists(st.lists(WORDS, max_size=8).map(" ".join), min_size=1, max_size=12)


def all_terms(text: str, language: str) -> list[str]:
    """A passage's terms with its stop words: each word is asked for alone, since a lone stop word is kept."""
    return [term for word in text.split() for term in tokens([word], language)[0]]


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


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        pytest.param("The Running DOGS", "en", ["run", "dog"], id="english_stems_and_drops_stop_words"),
        pytest.param("The Running DOGS", "none", ["the", "running", "dogs"], id="none_does_neither"),
        pytest.param("To be, or not to be", "en", ["to", "be", "or", "not", "to", "be"], id="only_stop_words_stay"),
        pytest.param("Don’t ask Beyoncé's mum", "en", ["ask", "beyoncé", "mum"], id="apostrophes"),
        pytest.param("vitamin C, Apollo 8", "none", ["vitamin", "c", "apollo", "8"], id="single_characters_stay"),
        pytest.param("snake_case-word 3.14", "none", ["snake", "case", "word", "3", "14"], id="marks_separate"),
        pytest.param(
            "ＡＢＣ ﬁre STRASSE straße", "none", ["abc", "fire", "strasse", "strasse"], id="nfkc_and_casefold"
        ),
        pytest.param("cafe\u0301", "none", ["café"], id="decomposed_is_composed"),
        pytest.param("हिन्दी", "none", ["हिन्दी"], id="vowel_signs_stay_in_the_word"),
        pytest.param("2008年发射火箭。", "en", ["2008", "年发", "发射", "射火", "火箭"], id="chinese_pairs"),
        pytest.param("见 A火B", "none", ["见", "a", "火", "b"], id="a_lone_character_is_kept"),
        pytest.param("ไทย", "en", ["ไท", "ทย"], id="thai_pairs"),
        pytest.param(" ?! ", "en", [], id="no_word"),
    ],
)
def test_tokens_follow_the_language(text: str, language: str, expected: list[str]) -> None:
    assert tokens([text], language) == [expected]


def test_a_query_of_stop_words_finds_the_passage_that_holds_them_among_others() -> None:
    segment = build_segment(["Hamlet asks: to be or not to be, a question", "Macbeth kills sleep"], "en")
    _, ids = LexicalIndex([segment], "en").search(["To be or not to be?"], 2)
    assert ids.tolist() == [[0, -1]]


@pytest.mark.parametrize("segments", [[], [[]], [["", " ?"]], [[], ["moon"], []]])
def test_empty_segments_and_wordless_passages_are_searched_without_hits(segments: list[list[str]]) -> None:
    index = LexicalIndex([build_segment(texts, "en") for texts in segments], "en")
    scores, ids = index.search(["mars", "", "..."], 2)
    assert index.num_passages == sum(map(len, segments))
    assert ids.tolist() == [[-1, -1]] * 3
    assert np.isneginf(scores).all()


@pytest.mark.parametrize("mmap", [False, True])
def test_a_segment_loads_as_it_was_saved_and_its_files_are_the_same_bytes_each_time(tmp_path: Path, mmap: bool) -> None:
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
    with pytest.raises(ValueError, match="'fr'"):
        build_segment(["a"], "fr")
    with pytest.raises(ValueError, match="got 0"):
        LexicalIndex([], "en").search(["a"], 0)
