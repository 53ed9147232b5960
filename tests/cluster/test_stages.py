"""What a stage says when the work of a unit fails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.data

from ragtune_ray import storage
from ragtune_ray.cluster.stages import StageError, run_stage

pytestmark = pytest.mark.cluster


def _fail(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    try:
        int("inner")
    except ValueError as error:
        raise storage.ArtifactError("shelf/seven: is torn; build it again") from error


def test_a_failed_unit_says_in_its_own_words_why_without_rays_wrapping(tmp_path: Path, shared_ray: None) -> None:
    def transform(units: ray.data.Dataset) -> ray.data.Dataset:
        return units.map_batches(_fail, batch_size=1)

    with pytest.raises(StageError) as raised:
        run_stage("shelve", str(tmp_path), [{"unit": 0}], transform)
    assert str(raised.value) == "shelve: ArtifactError: shelf/seven: is torn; build it again"
