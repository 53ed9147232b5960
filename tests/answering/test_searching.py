"""Searching with one or several texts per question, over a small index of real files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray import config, schema
from ragtune_ray.answering import rewriting, searching
from ragtune_ray.index.retriever import Retriever, fuse_ranks, open_retriever
from ragtune_ray.models.encoder import HashingEncoder

SAID = (schema.Message("user", "Who built the Hubble telescope?"), schema.Message("assistant", "NASA and ESA."))
FOLLOW_UP = schema.Query("q", "And when was it launched?", None, ("hubble",), (1.0,), "all", SAID)
TEXTS = {
    "hubble": "The Hubble telescope was carried into orbit by a shuttle in 1990.",
    "kepler": "The Kepler telescope rose on a rocket in 2009.",
    "danube": "The Danube flows through ten countries.",
    "moons": "Phobos and Deimos are the moons of Mars.",
}


@pytest.fixture
def retriever(tmp_path: Path, write_index: Callable[..., str]) -> Callable[..., Retriever]:
    rows = [schema.Passage(f"{name}#0", name, text, "", "{}", 0, len(text)) for name, text in TEXTS.items()]
    write_index(tmp_path, rows, HashingEncoder("hashing-64"))

    def opened(*overrides: str) -> Retriever:
        return open_retriever(config.Config().using(f"workspace={tmp_path}", "encoder.model=hashing-64", *overrides))

    return opened


def found(retriever: Retriever, texts: searching.Texts, retrieval: config.Retrieval, top_k: int = 3) -> list[str]:
    ((passages, scores),) = searching.search_passages(retriever, [texts], retrieval, top_k)
    (hits,) = searching.search_hits(retriever, ["q"], [texts], retrieval, top_k)
    assert [hit.passage_id for hit in hits] == [passage.passage_id for passage in passages]
    assert [hit.score for hit in hits] == pytest.approx(scores)
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    return [passage.document_id for passage in passages]


def test_a_follow_up_finds_nothing_alone_and_its_document_with_the_last_turn(
    retriever: Callable[..., Retriever],
) -> None:
    opened = retriever("retrieval.mode=lexical")
    alone, turns = (config.Retrieval(mode="lexical", rewrite=rewrite) for rewrite in ("none", "last_turns"))
    assert found(opened, rewriting.begun(FOLLOW_UP, alone).texts, alone) == []
    assert found(opened, rewriting.begun(FOLLOW_UP, turns).texts, turns)[0] == "hubble"


def test_the_hits_of_sub_questions_are_fused_by_hand_computed_scores(retriever: Callable[..., Retriever]) -> None:
    split = config.Retrieval(mode="lexical", decompose=True, fusion_constant=1.0)
    opened = retriever("retrieval.mode=lexical")
    texts = ("Danube or Deimos?", "Danube", "Deimos")
    ((passages, scores),) = searching.search_passages(opened, [texts], split, 4)
    first = opened.retrieve_passages(["Danube or Deimos?"], 4)[0][0]
    place = {passage.document_id: rank for rank, passage in enumerate(first)}
    expected = {name: 1 / (1 + 1 + place[name]) + 1 / (1 + 1) for name in ("danube", "moons")}
    assert dict(zip([passage.document_id for passage in passages], scores, strict=True)) == pytest.approx(expected)


def test_searches_that_are_fused_go_deeper_than_the_hits_that_are_kept(retriever: Callable[..., Retriever]) -> None:
    """Second in both searches, 2 / (k + 2), beats first in one, 1 / (k + 1), though only one hit is kept."""
    opened, split = retriever("retrieval.mode=lexical"), config.Retrieval(mode="lexical", fusion_constant=5.0)
    texts = ("Hubble telescope shuttle orbit", "Danube countries rocket")
    firsts = [[hit.document_id for hit in hits] for hits in opened.retrieve(["a", "b"], list(texts), 2)]
    assert firsts == [["hubble", "kepler"], ["danube", "kepler"]]
    assert found(opened, texts, split, 1) == ["kepler"]


def test_a_question_with_one_text_keeps_its_hits_and_scores_beside_one_that_is_split(
    retriever: Callable[..., Retriever],
) -> None:
    opened, split = retriever(), config.Retrieval(decompose=True)
    plain = opened.retrieve(["a"], ["Which moons has Mars?"], 2)
    texts = [("Which moons has Mars?",), ("Hubble or Danube?", "Hubble telescope", "Danube")]
    one, several = searching.search_hits(opened, ["a", "b"], texts, split, 2)
    assert [one] == plain
    assert {hit.document_id for hit in several} == {"hubble", "danube"}
    assert {hit.query_id for hit in several} == {"b"}


def test_own_documents_are_left_out_of_every_search(retriever: Callable[..., Retriever]) -> None:
    opened, split = retriever(), config.Retrieval(decompose=True)
    texts = [("Hubble or Danube?", "Hubble telescope", "Danube")]
    (hits,) = searching.search_hits(opened, ["hubble"], texts, split, 3, leave_out_own=True)
    assert "hubble" not in {hit.document_id for hit in hits}
    ((passages, _),) = searching.search_passages(opened, texts, split, 3, ["hubble"])
    assert [passage.passage_id for passage in passages] == [hit.passage_id for hit in hits]


RANKING = st.lists(st.integers(0, 9), unique=True, max_size=6)


@given(st.lists(RANKING, min_size=2, max_size=4), st.floats(0, 60), st.integers(1, 12))
def test_fusion_equals_that_of_dense_and_lexical_lists(lists: list[list[int]], constant: float, top_k: int) -> None:
    """An independent implementation, over arrays, fuses the lists of hybrid retrieval."""
    padded = [np.array([[*each, *[-1] * (6 - len(each))]]) for each in lists]
    scores, ordinals = fuse_ranks(padded, constant, top_k)
    fused = searching.fused([[str(each) for each in ranking] for ranking in lists], constant, top_k)
    assert [score for *_, score in fused] == pytest.approx(scores[0][ordinals[0] >= 0].tolist(), rel=1e-5)
    assert all(0 <= place < len(lists[number]) for number, place, _ in fused)
