"""Which index and models the fit of retrieval uses; nothing is searched here, and no Ray started."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.cluster.comparing import calibrate
from ragtune_ray.models.arms import Pair
from ragtune_ray.storage import artifacts


class SearchedError(Exception):
    """Raised instead of searching."""


@pytest.mark.parametrize("arm", ["rag", "staged"])
def test_retrieval_is_fitted_on_the_index_and_encoder_of_the_arm(
    settings_for: Callable[..., config.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    settings = settings_for(tmp_path / "workspace", f"answer.arm={arm}", "retrieval.reranker=x")
    pair = Pair(f"{tmp_path}/tuned", "tuned-encoder", "", settings.generator.model).facts()
    folder = f"{settings.workspace}/models/staged"
    artifacts.publish(artifacts.stage(f"{folder}/first"), f"{folder}/first", "tuned", pair=pair)
    artifacts.make_current(folder, "first")
    opened, searched = [], []

    def retrieve(given: config.Config) -> None:
        searched.append(given)
        raise SearchedError

    def index_version(given: config.Config) -> tuple[str, dict[str, str]]:
        opened.append(given.workspace)
        return "", {}

    monkeypatch.setattr(calibrate, "MIN_QUESTIONS", 0)
    monkeypatch.setattr(calibrate.staged_queries, "selected_queries", lambda _: [])
    monkeypatch.setattr(calibrate.runs, "index_version", index_version)
    monkeypatch.setattr(calibrate, "retrieve", retrieve)
    with contextlib.suppress(SearchedError):
        calibrate._fit(settings)
    expected = settings.workspace if arm == "rag" else f"{tmp_path}/tuned"
    assert opened == [expected]
    (given,) = searched
    assert given.workspace == expected
    assert given.encoder.model == (settings.encoder.model if arm == "rag" else "tuned-encoder")
    assert given.retrieval.reranker == ""
