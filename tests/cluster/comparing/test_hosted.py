"""Hosted models as arms, beside the config's own generator, against a stub server."""

from pathlib import Path

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.cluster import staged_queries
from ragtune_ray.cluster.answering import evaluate
from ragtune_ray.cluster.comparing.compare import compare, read_comparison
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.storage import artifacts

pytestmark = [pytest.mark.timeout(900), pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]


def test_a_hosted_model_answers_beside_the_own_generator_at_its_price(
    settings_for, openai_stub, tmp_path: Path
) -> None:
    hosted = {
        "model": "gpt-x",
        "base_url": openai_stub.url,
        "million_prompt_tokens": 5.0,
        "million_completion_tokens": 40.0,
    }
    settings = config.load_config(
        settings_for(
            tmp_path / "workspace",
            "queries.limit=6",
            "retrieval.top_k=2",
            "compare.arms=[base, rag]",
            "compare.latency_queries=1",
            "compare.answers=1",
            "compare.metric=semantic",
            "prices.core_hour=0.36",
            "cluster.generator_workers=1",
        ).model_dump(mode="json"),
        {"compare.hosted": {"gpt": hosted}},
    )
    build_index(settings)
    run = compare(settings)
    found = read_comparison(run)
    assert list(run.comparison.names()) == ["base", "rag", "base@gpt", "rag@gpt"]
    answered = artifacts.read_manifest(run.manifest["evaluated"])["runs"]
    rows = {arm: evaluate.read_answers(url) for arm, url in answered.items()}
    for arm, each in rows.items():
        by_server = "@" in arm
        assert {row.model == f"{openai_stub.url}#gpt-x" for row in each} == {by_server}
        assert {row.answer == "forty-two" for row in each} == {by_server}
        assert {len(row.passage_ids) for row in each} == {2 if "rag" in arm else 0}
        cost, busy = found["arms"][arm]["cost"], artifacts.read_manifest(answered[arm])["busy_seconds"]
        # The stub reports 9 and 3 tokens for each answer.
        charged = (9 * 5.0 + 3 * 40.0) / 1e6 if by_server else 0.0
        hardware = (busy["retrieval"] + busy["generation"]) / 6 * 0.36 / 3600
        assert cost["per_1000"] == pytest.approx(1000 * (hardware + charged))
        assert cost["unit"] == "USD"
        assert found["arms"][arm]["model"] == ("gpt-x" if by_server else settings.generator.model)
    # The deciding metric is in the scores of the evaluation, from which the comparison takes it.
    gold = {row.query_id: row.answers for row in staged_queries.selected_queries(settings)}
    encode = HashingEncoder("hashing-64").encode_passages
    for arm, each in rows.items():
        expected = {
            row.query_id: max(0.0, *(encode([row.answer]) @ encode(list(gold[row.query_id])).T)[0])
            if row.answer
            else 0.0
            for row in each
        }
        scores = evaluate.read_scores(run.manifest["evaluated"], arm)
        assert {name: values["semantic"] for name, values in scores.items()} == pytest.approx(expected, abs=1e-6)
        assert found["arms"][arm]["quality"]["semantic"]["value"] == pytest.approx(np.mean([*expected.values()]))
    assert found["metric"] == "semantic"
    others = {difference["arm"] for difference in found["differences"]}
    assert others == {"base", "rag", "base@gpt", "rag@gpt"} - {found["verdict"]["arm"]}
    assert "gpt" in found["ceilings"]
    assert not any("server answers" in line for line in found["verdict"]["warnings"])
    report = (Path(run) / "report.html").read_text()
    assert "rag@gpt" in report
