"""Verbs of the Python API that work on many questions return results with tables."""

from pathlib import Path

import pytest

import ragtune_ray as rt

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]


def test_verbs_on_many_questions_return_results_with_tables(settings_for, tmp_path: Path) -> None:
    config = settings_for(tmp_path).with_values({"queries.limit": 6})
    rt.build_index(config)
    hits, answers, evaluation = rt.retrieve(config), rt.answer(config), rt.evaluate(config)
    assert set(hits.to_arrow()["query_id"].to_pylist()) == set(answers.to_arrow()["query_id"].to_pylist())
    assert answers.to_arrow().num_rows == 6
    assert set(evaluation.to_arrow()["arm"].to_pylist()) == {"base", "rag", "rag - base"}
    assert str(rt.answer(config)) == answers.path, "a finished run is not repeated"
