"""Judge and groundedness against `transformers serve` with the embedded model, which is a bad judge: that is the point."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from ragtune_ray import config, schema
from ragtune_ray.cluster.grading import grade
from ragtune_ray.evaluation.grading import asking
from ragtune_ray.models import weights
from ragtune_ray.schema import Query
from tests.support.answered import grade_in_this_process, publish_answers
from tests.support.comparisons import answer_row
from tests.support.openai_server import transformers_server


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_server_grades_and_what_it_cannot_is_a_counted_failed_row(
    workspace: str, passages: Sequence[schema.Passage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = weights.resolve("SmolLM2-135M-Instruct").directory
    assert directory is not None
    sizes = grade_in_this_process(monkeypatch)
    moon = next(passage.passage_id for passage in passages if "1969" in passage.text)
    queries = [
        Query("gold", "When did Apollo 11 land on the Moon?", ("1969",), (), (), "test"),
        Query("none", "Which planet is red?", None, (), (), "test"),
    ]
    rows = [
        answer_row("gold", "It landed in 1969.", (moon,), index_version="000001"),
        answer_row("none", "Mars is the red planet.", (moon,), index_version="000001"),
    ]
    runs = {"rag": publish_answers(workspace, "rag", rows, index_version="000001")}
    with transformers_server(directory, tmp_path / "server.log") as url:
        settings = config.load_config(
            {
                "workspace": workspace,
                "evaluate.metrics": ["judge", "groundedness"],
                "evaluate.judge": {
                    "model": str(directory), "base_url": url, "api_key_env": "RAGTUNE_NO_KEY", "max_new_tokens": 16,
                },
                "evaluate.max_failed_grades": 1.0,
            }
        )  # fmt: skip
        found = grade.grade(settings, queries, runs)
        assert len(sizes) == 2
        for metric in ("judge", "groundedness"):
            facts = found.facts[metric]
            assert facts["answers"] == 2
            assert 2 <= facts["requests"] <= 2 * asking.MAX_ASKED
            assert facts["prompt_tokens"] > 200
            assert facts["completion_tokens"] > 0
            status = {name: each[f"{metric}_status"] for name, each in found.columns["rag"].items()}
            assert list(status.values()).count("failed") == facts["failed"]
            for query_id, values in found.values["rag"].items():
                assert (metric in values) == (status[query_id] == "graded")
                assert 0 <= values.get(metric, 0) <= 1
        again = grade.grade(settings.with_values({"evaluate.metrics": ["judge"]}), queries, runs)
        graded = 2 - found.facts["judge"]["failed"]
        assert again.facts["judge"]["known"] == graded, "what was graded is not asked for again"
