"""No pickle is loaded: neither from an index or a model, nor from a corpus with files that would run code."""

import io
import json
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragtune_ray import config
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.index.bm25 import Postings
from ragtune_ray.index.retriever import open_retriever
from ragtune_ray.models.encoder import load_encoder
from ragtune_ray.models.reranker import Reranker
from tests.support.models import Touching, prompt_of

_unpickled: list[Any] = []
_watching: list[bool] = []


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "pickle.find_class":
        _unpickled.append(arguments)


@contextmanager
def watched() -> Iterator[list[Any]]:
    """The classes that are looked up by unpickling in this process meanwhile."""
    _unpickled.clear()
    _watching.append(True)  # a hook cannot be removed
    try:
        yield _unpickled
    finally:
        _watching.clear()


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    sys.addaudithook(_record)


def test_the_hook_notices_a_pickle() -> None:
    with watched() as found:
        pickle.loads(pickle.dumps(Path("x")))  # noqa: S301 - its own
    assert found


def test_loading_an_index_and_models_unpickles_nothing(
    workspace: str, encoder_directory: Path, generator_directory: Path, tmp_path: Path
) -> None:
    from ragtune_ray.training import trainable

    reranking = config.Config().using("training.objective=reranker")
    trainable.load_objective(reranking, encoder_directory, {})  # imports
    trainable.save_model(reranking, encoder_directory, {}, tmp_path / "reranker")
    settings = config.Config().using(f"workspace={workspace}", "encoder.model=hashing-64")
    with watched() as found:
        (hits,) = open_retriever(settings).retrieve(["q"], ["moon"], 2)
        load_encoder(config.Encoder(model=str(encoder_directory)), "cpu").encode_queries(["moon"])
        Reranker(str(tmp_path / "reranker"), "cpu").score([("moon", "mars")])
        generator = TransformersGenerator(generator_directory, precision="float32", batch_tokens=500)
        generator.generate([prompt_of("abc")], max_new_tokens=2)
    assert hits
    assert found == []


def test_files_with_code_in_a_corpus_are_refused(tmp_path: Path) -> None:
    corpus, canary = tmp_path / "corpus", tmp_path / "canary"
    corpus.mkdir()
    evil = pickle.dumps(Touching(canary))
    (corpus / "good.md").write_text("The moon orbits the earth.")
    for name in ("a.pkl", "b.bin", "c.pt"):
        (corpus / name).write_bytes(evil)
    stream = io.BytesIO()
    np.save(stream, np.array([Touching(canary)], dtype=object), allow_pickle=True)
    (corpus / "d.npy").write_bytes(stream.getvalue())
    # As Ray Data stores Python objects; reading such a column unpickled it once.
    marks = {b"ARROW:extension:name": b"ray.data.arrow_pickled_object", b"ARROW:extension:metadata": b""}
    fields = [pa.field("id", pa.string()), pa.field("text", pa.string()), pa.field("code", pa.binary(), metadata=marks)]
    pq.write_table(pa.table([["e"], ["Mars is red."], [evil]], schema=pa.schema(fields)), corpus / "e.parquet")
    disguised = [pa.field("id", pa.string()), pa.field("text", pa.binary(), metadata=marks)]
    pq.write_table(pa.table([["f"], [evil]], schema=pa.schema(disguised)), corpus / "f.parquet")
    settings = config.Config().using(
        f"workspace={tmp_path / 'workspace'}", f"corpus.path={corpus}", "encoder.model=hashing-64"
    )
    with watched() as found:
        built = build_index(settings)
    assert found == []
    assert not canary.exists()
    rejects = [json.loads(line) for line in (Path(str(built)) / "rejects.jsonl").read_text().splitlines()]
    refused = {Path(reject["place"].partition(":")[0]).name for reject in rejects}
    assert {"a.pkl", "b.bin", "c.pt", "d.npy", "f.parquet"} <= refused


def test_pickled_arrays_in_an_index_are_not_loaded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    counts = np.ones(1, dtype=np.int32)
    Postings(("moon",), np.array([0, 1]), np.zeros(1, dtype=np.int32), counts, counts).save(tmp_path / "bm25")
    np.save(tmp_path / "bm25" / "counts.npy", np.array([Touching(canary)], dtype=object), allow_pickle=True)
    with watched() as found, pytest.raises(ValueError, match="allow_pickle=False"):
        Postings.load(tmp_path / "bm25", mmap=False)
    assert found == []
    assert not canary.exists()
