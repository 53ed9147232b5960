"""The files between reading and embedding: a damaged one is noticed, not embedded."""

from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.cluster.indexing import reading
from ragtune_ray.ingest.input_units import plan_units
from tests.support.corpora import write_corpus


def test_a_flipped_bit_of_a_passage_is_noticed_when_its_part_is_read(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 20)
    settings = config.Config().using(
        f"workspace={tmp_path}", f"corpus.path={tmp_path / 'corpus.jsonl'}", "encoder.model=hashing-32"
    )
    build = str(tmp_path / "build")
    plan = plan_units(settings.corpus.path, settings.corpus.unit_bytes)
    assert reading.read_stage(settings, plan, build, "", in_process=True).num_passages == 20
    (part,) = (tmp_path / "build" / "read").glob("*passages.parquet")
    assert reading.read_row_group(build, 0, 0).num_rows == 20
    sound = part.read_bytes()
    place = sound.index(b"vessel")
    part.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
    with pytest.raises(OSError, match="CRC"):
        reading.read_row_group(build, 0, 0)
