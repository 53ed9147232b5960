"""Questions about documents that are not in the index are left out, in every command alike, and refused under strict."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import staged_queries
from ragtune_ray.cluster.tuning import judging
from ragtune_ray.index import contents, versions
from ragtune_ray.ingest.inputs import InputError
from tests.support import index_changes as indexes

QUESTIONS: dict[str, dict[str, Any]] = {
    "kept": {"document_ids": ["moon"]},
    "gone": {"document_ids": ["pluto", "eris"]},
    "deleted": {"document_ids": ["sun"]},
    "partly": {"document_ids": ["pluto", "mars", "eris"], "relevances": [1, 2, 1]},
    "irrelevant": {"document_ids": ["pluto"], "relevances": [0]},
    "unjudged": {},
}


@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    """Three documents in the index: moon, mars, rover; the sun was deleted from it."""
    indexes.build_standing(tmp_path)
    rows = [
        {"query_id": name, "text": f"{name}?", "answers": ["x"], "split": "train", **q} for name, q in QUESTIONS.items()
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return indexes.settings_of(tmp_path).using(f"queries.path={tmp_path / 'q.jsonl'}")


def names(rows: Sequence[Any]) -> list[str]:
    return [row.query_id for row in rows]


def test_documents_of_an_index_are_found_by_id(settings: config.Config) -> None:
    version = versions.read_version(settings.workspace, versions.current_version(settings.workspace))
    found = contents.present(settings.workspace, version, ["moon", "sun", "mars", "rover", "pluto"])
    assert found == {"moon", "mars", "rover"}
    assert contents.present(settings.workspace, version, []) == set()


def test_questions_whose_documents_are_missing_are_left_out_and_said(
    settings: config.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with staged_queries.staged_queries(settings) as staged:
        rows = staged_queries.read_queries(staged.url, 0, staged.num_queries)
    assert names(rows) == ["kept", "partly", "irrelevant", "unjudged"]
    partly = rows[1]
    assert (partly.document_ids, partly.relevances) == (("mars",), (2.0,))
    assert [reject.place.rpartition("query ")[2] for reject in staged.rejects] == ["'gone'", "'deleted'"]
    assert "'pluto' and 1 more are not in the index" in staged.rejects[0].reason
    assert "queries: 2 rejected" in capsys.readouterr().err
    assert names(judging.queries_of(settings, "train")) == names(rows)
    assert names(staged_queries.judged_queries(settings.using("queries.limit=2"))) == ["kept", "partly"]


def test_all_questions_are_kept_where_the_config_says_so_or_there_is_no_index(
    settings: config.Config, tmp_path: Path
) -> None:
    kept = staged_queries.selected_queries(settings.using("queries.unindexed=keep"))
    assert names(kept) == list(QUESTIONS)
    assert staged_queries.selected_queries(settings.using(f"workspace={tmp_path / 'empty'}")) == kept
    other = staged_queries.with_all_queries_of(settings, settings.queries.path)
    assert staged_queries.selected_queries(other) == kept


def test_under_strict_the_first_such_question_is_an_error(settings: config.Config) -> None:
    with pytest.raises(
        InputError, match=r"q\.jsonl: query 'gone': relevant document 'pluto' and 1 more are not in the index"
    ):
        staged_queries.selected_queries(settings.using("corpus.strict=true"))
