"""The parts of a run in order, in a workspace on a disk and in an object store."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragtune_ray import filesystem
from ragtune_ray.cluster import runs, stages


@pytest.mark.parametrize("store", ["local", "memory"])
def test_the_parts_of_a_run_that_is_done_again_are_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path / "cache"))
    directory = str(tmp_path / "work") if store == "local" else f"memory://{tmp_path}/work"
    for rows in (["failed", "failed"], ["ok", "ok"]):
        for number, row in enumerate(rows):
            local = tmp_path / "part.parquet"
            pq.write_table(pa.table({"number": [number], "status": [row]}), local)
            stages.commit_unit(directory, number, {"parquet": local})
        summaries = stages.finished_units(directory)
        tables = runs.merged(directory, [summaries[number] for number in (1, 0)], "parquet")
        assert [table.to_pylist() for table in tables] == [
            [{"number": number, "status": rows[number]}] for number in (1, 0)
        ]
        filesystem.remove(directory)
