"""Random interleavings of upsert, delete, compaction and rollback against a plain dictionary: the same contents, the same hits.

Everything runs in this process, without Ray, through the functions behind the commands.
"""

import json
import shutil
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ragtune_ray import config, schema
from ragtune_ray.cluster.indexing import compact as compact_module
from ragtune_ray.cluster.indexing import update
from ragtune_ray.index import bm25, snapshot, versions
from ragtune_ray.ingest.chunking import chunk_all
from ragtune_ray.models.encoder import HashingEncoder, load_token_counter

WORDS = ["moon", "mars", "rover", "orbit", "crater", "probe", "dust", "ice", "lander", "comet"]
IDS = [f"d{number}" for number in range(8)]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join)
QUERIES = ["moon rover", "ice", "comet dust orbit", "nothing of this"]


class LivingIndex(RuleBasedStateMachine):
    """The index on one side; on the other, a dictionary of documents and one of these per version."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ragtune-test-"))
        self.settings = config.Config().using(
            f"workspace={self.folder / 'workspace'}",
            "encoder.model=hashing-32",
            "chunking.size_tokens=8",
            "chunking.overlap_tokens=2",
            "index.compact_segments=3",
        )
        self.documents: dict[str, str] = {}
        self.history: dict[str, dict[str, str]] = {}
        self.encoder = HashingEncoder("hashing-32")

    def _name(self) -> str:
        return versions.current_version(self.settings.workspace)

    def _note(self) -> None:
        """Every version between the last noted and the current one (a compaction may follow) holds the same."""
        for name in versions.list_versions(self.settings.workspace):
            self.history.setdefault(name, dict(self.documents))

    @initialize(texts=st.dictionaries(st.sampled_from(IDS), TEXTS, min_size=1, max_size=5))
    def begin(self, texts: dict[str, str]) -> None:
        self.upsert(texts)

    @rule(texts=st.dictionaries(st.sampled_from(IDS), TEXTS, min_size=1, max_size=4))
    def upsert(self, texts: dict[str, str]) -> None:
        path = self.folder / "upsert.jsonl"
        path.write_text("".join(json.dumps({"document_id": i, "text": t}) + "\n" for i, t in texts.items()))
        update.upsert_documents(self.settings, str(path))
        self.documents = {**self.documents, **texts}
        self._note()

    @precondition(lambda self: len(self.documents) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        most = len(self.documents) - 1
        ids = data.draw(st.lists(st.sampled_from(sorted(self.documents)), min_size=1, max_size=most, unique=True))
        update.delete_documents(self.settings, [*ids, "never there"])
        self.documents = {name: text for name, text in self.documents.items() if name not in ids}
        self._note()

    @rule()
    def compact(self) -> None:
        compact_module.compact(self.settings, in_process=True)
        self._note()

    @precondition(lambda self: len(self.history) > 1)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        target = data.draw(st.sampled_from(sorted(self.history)))
        versions.roll_back(self.settings.workspace, target)
        self.documents = dict(self.history[target])
        self._note()

    @invariant()
    def contents_and_hits_are_those_of_the_dictionary(self) -> None:
        if not self.documents:
            return
        opened = snapshot.open_index(self.settings.workspace)
        found = {passage.passage_id: passage for passage in schema.from_table(opened.live_passages(), schema.Passage)}
        expected = {passage.passage_id: passage for passage in self._passages()}
        assert found == expected
        assert opened.manifest["num_documents"] == len(self.documents)
        assert opened.manifest["num_passages"] == opened.num_passages == len(expected)
        self._same_hits(opened, list(expected.values()))

    def _passages(self) -> list[schema.Passage]:
        counter = load_token_counter(self.settings.encoder)
        documents = [schema.Document(name, text, "", "{}", "") for name, text in self.documents.items()]
        cut = chunk_all(documents, counter.token_spans, 8 - counter.num_added_tokens, 2)
        return [passage for passages in cut for passage in passages]

    def _same_hits(self, opened: snapshot.Index, passages: list[schema.Passage]) -> None:
        top_k = min(5, len(passages))
        ids = opened.passages["passage_id"].to_pylist()
        names = [passage.passage_id for passage in passages]
        queries = self.encoder.encode_queries(QUERIES)
        cosines = queries @ self.encoder.encode_passages([passage.text for passage in passages]).T
        scores, ordinals = opened.vectors.search(queries, top_k, opened.alive)
        best = -np.sort(-cosines, axis=1)[:, :top_k]
        np.testing.assert_allclose(scores, best, atol=1e-5)
        for query, row in enumerate(ordinals):
            assert len({*row.tolist()}) == top_k, "full, and nothing twice"
            for place, ordinal in enumerate(row.tolist()):
                own = cosines[query, names.index(ids[ordinal])]
                np.testing.assert_allclose(scores[query, place], own, atol=1e-5)
        whole = bm25.LexicalIndex([bm25.build_segment([p.text for p in passages], "en")], "en")
        wanted, _ = whole.search(QUERIES, top_k)
        words, ordinals = opened.lexical.search(QUERIES, top_k, opened.alive)
        np.testing.assert_allclose(words, wanted, rtol=1e-5)
        assert {ids[ordinal] for ordinal in ordinals[ordinals >= 0].tolist()} <= set(names)

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


LivingIndex.TestCase.settings = hypothesis.settings(max_examples=50, stateful_step_count=8, deadline=None)
TestLivingIndex = pytest.mark.slow(LivingIndex.TestCase)
