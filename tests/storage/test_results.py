"""What verbs return: a path that is also an object with its manifest and its table."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragtune_ray.storage import artifacts
from ragtune_ray.storage.results import Result

ROWS = pa.table({"query_id": ["q1", "q2"], "score": [0.5, 0.25]})


@dataclass(frozen=True)
class Scored(Result):
    """A result with a table."""

    table: ClassVar[str | None] = "scores.parquet"


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A published artifact with a table and a fact, on a local disk and in an object store."""
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path / "cache"))
    place = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run"
    staging = artifacts.stage(place)
    pq.write_table(ROWS, staging / "scores.parquet")
    artifacts.publish(staging, place, "scores", num_rows=2)
    return place


def test_a_result_serves_as_a_path_wherever_one_is_expected(tmp_path: Path) -> None:
    result = Result(str(tmp_path))
    assert str(result) == f"{result}" == str(Path(result)) == str(tmp_path)
    assert Path(result, "file") == tmp_path / "file"
    assert {result, Result(str(tmp_path))} == {result}


def test_manifest_and_table_are_read_from_a_local_or_remote_artifact(url: str) -> None:
    result = Scored(url)
    assert result.manifest["num_rows"] == 2
    assert result.to_arrow() == ROWS


def test_to_pandas_returns_the_same_table(url: str) -> None:
    pytest.importorskip("pandas")
    assert Scored(url).to_pandas().to_dict("list") == ROWS.to_pydict()


def test_to_pandas_names_the_missing_package_and_the_alternative(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install pandas.*to_arrow"):
        Scored(url).to_pandas()


def test_a_result_without_a_table_refuses_to_arrow_by_path(url: str) -> None:
    with pytest.raises(artifacts.ArtifactError, match=f"{url}: a Result has no table"):
        Result(url).to_arrow()


def test_a_removed_artifact_is_refused_when_its_manifest_is_read(tmp_path: Path) -> None:
    with pytest.raises(artifacts.ArtifactError, match="missing"):
        _ = Result(str(tmp_path / "gone")).manifest
