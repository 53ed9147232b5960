"""The return value of a verb: the path of the artifact that it wrote, with access to its facts and its main table."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray.storage import artifacts

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Result:
    """A finished artifact. Use it wherever a path is expected: `str(result)`, `Path(result)`, `f"{result}/file"`.

    >>> result = Result("workspace/runs/answer-rag-0123")
    >>> f"{result}/answers.parquet"
    'workspace/runs/answer-rag-0123/answers.parquet'
    """

    path: str
    """A local directory, or a URL such as s3://bucket/workspace/runs/answer-rag-0123."""
    table: ClassVar[str | None] = None
    """Name of the Parquet file with the main table; subclasses set it."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The facts in the artifact's manifest.json, read each time.

        Raises:
            ArtifactError: the artifact was removed or damaged.
        """
        return artifacts.read_manifest(self.path)

    def to_arrow(self) -> pa.Table:
        """The main table, checked against the manifest.

        Raises:
            ArtifactError: this kind of artifact has no table, or the artifact was removed or damaged.
        """
        if self.table is None:
            raise artifacts.ArtifactError(f"{self.path}: a {type(self).__name__} has no table; see its manifest")
        return pq.read_table(artifacts.open_artifact(self.path, names=[self.table]).path / self.table)

    def to_pandas(self) -> pd.DataFrame:
        """`to_arrow` as a pandas data frame.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_pandas needs pandas; run `pip install pandas`, or use to_arrow") from error
        return self.to_arrow().to_pandas()

    def __str__(self) -> str:
        return self.path

    def __fspath__(self) -> str:
        return self.path
