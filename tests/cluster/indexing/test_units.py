"""The files of a finished unit: damage is noticed, and the documents are where their hash says."""

import json
from pathlib import Path

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.cluster.indexing import reading, streaming, units
from ragtune_ray.index import contents, segments
from ragtune_ray.ingest.input_units import plan_units
from tests.support.corpora import write_corpus


def committed(tmp_path: Path, partitions: int = 1, share: float = 0.0) -> tuple[str, units.UnitFacts, config.Config]:
    tmp_path.mkdir(exist_ok=True)
    write_corpus(tmp_path / "corpus.jsonl", 20)
    settings = config.Config().using(
        f"workspace={tmp_path}", f"corpus.path={tmp_path / 'corpus.jsonl'}", "encoder.model=hashing-32"
    )
    build = str(tmp_path / "build")
    (unit,) = plan_units(settings.corpus.path).units
    job = streaming.Job(settings, build, "", partitions)
    (facts,) = streaming.in_process(job, [streaming.Work("00ff" * 4, unit, False, share)])
    return build, facts, settings


def test_a_flipped_bit_of_a_passage_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    build, facts, _ = committed(tmp_path)
    assert facts["rows"] == 20
    (part,) = (tmp_path / "build" / "units").glob("*passages.parquet")
    assert units.read_passages(build, facts["key"], 0, 20).num_rows == 20
    sound = part.read_bytes()
    place = sound.index(b"vessel")
    part.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
    with pytest.raises(OSError, match="CRC"):
        units.read_passages(build, facts["key"], 0, 20)


@pytest.mark.parametrize("partitions", [1, 4, 64])
def test_each_document_is_in_the_partition_of_its_hash(tmp_path: Path, partitions: int) -> None:
    build, facts, settings = committed(tmp_path, partitions)
    ids = {json.loads(line)["document_id"] for line in Path(settings.corpus.path).read_text().splitlines()}
    found = []
    for number in range(partitions):
        table = units.read_documents(build, [facts["key"]], number, ["key", "document_id", "first", "count"])
        for row in table.to_pylist():
            assert row["key"] == segments.document_keys([row["document_id"]])[0]
            assert row["key"] * partitions >> 64 == number
            passages = units.read_passages(build, facts["key"], row["first"], row["first"] + row["count"])
            assert set(passages["document_id"].to_pylist()) == {row["document_id"]}
            found.append(row["document_id"])
    assert sorted(found) == sorted(ids)


def test_a_sample_is_a_random_part_of_the_vectors(tmp_path: Path) -> None:
    build, facts, _ = committed(tmp_path, share=0.5)
    rows, vectors = units.read_sample(build, facts["key"])
    assert facts["sampled"] == len(rows) == len(set(rows.tolist())) == 10
    np.testing.assert_array_equal(vectors, units.read_vectors(build, facts["key"], 0, 20)[rows])
    whole, found, _ = committed(tmp_path / "whole", share=1.0)
    rows, vectors = units.read_sample(whole, found["key"])
    assert (facts["sampled"], found["sampled"], rows.tolist()) == (10, 20, list(range(20)))


def test_a_unit_without_a_file_is_not_finished(tmp_path: Path) -> None:
    build, facts, _ = committed(tmp_path)
    assert [each["key"] for each in units.finished(build, [facts["key"], "other"])] == [facts["key"]]
    (tmp_path / "build" / "units" / f"{facts['key']}.vectors.npy").unlink()
    assert list(units.finished(build, [facts["key"]])) == []


def test_a_damaged_marker_is_not_finished(tmp_path: Path) -> None:
    build, facts, _ = committed(tmp_path)
    (tmp_path / "build" / "units" / f"{facts['key']}.json").write_text('{"key": ')
    assert list(units.finished(build, [facts["key"]])) == []


def test_known_documents_have_no_passages(tmp_path: Path) -> None:
    _, _, settings = committed(tmp_path)

    class All(contents.KnownDocuments):
        def contain(self, ids: list[str], fingerprints: list[bytes]) -> list[bool]:
            return [True] * len(ids)

    (unit,) = plan_units(settings.corpus.path).units
    read = reading.read_unit(unit, settings, All("", None))
    assert (read.passages.num_rows, read.documents.num_rows, read.facts["known"]) == (0, 20, 20)
