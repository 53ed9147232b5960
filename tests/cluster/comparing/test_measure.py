"""What an arm costs, and what its cost lacks, from its rows; nothing is answered here and no Ray started."""

from typing import Any

import pytest

from ragtune_ray import config, schema
from ragtune_ray.cluster.comparing import measure

PRICED = {
    "prices.core_hour": 0.36,
    "compare.hosted": {"gpt": {"model": "gpt-x", "million_prompt_tokens": 0.5, "million_completion_tokens": 2.0}},
}


def row(**changed: Any) -> schema.Answer:
    values: dict[str, Any] = {
        "query_id": "q",
        "query": "Who?",
        "answer": "me",
        "citations": (),
        "passage_ids": (),
        "scores": (),
        "abstained": False,
        "seconds": 0.1,
        "prompt_tokens": 300,
        "completion_tokens": 20,
        "status": "ok",
        "error": "",
        "index_version": "",
        "model": "m",
    }
    return schema.Answer(**(values | changed))


def of_arm(values: dict[str, Any], arm: str) -> config.Config:
    return measure.arms.with_tuned_models(config.load_config(values, {"answer.arm": arm}))


def test_tokens_that_a_server_charges_are_part_of_the_cost_of_its_arms_only() -> None:
    rows = [row(), row(prompt_tokens=500, completion_tokens=40), row(status="failed", answer="", prompt_tokens=9000)]
    busy = {"retrieval": 1.0, "generation": 5.0}
    found = {
        arm: measure._cost(of_arm(PRICED, arm), [{"total": 10.0, "workers": 2.0}], busy, None, rows)
        for arm in ("rag", "rag@gpt")
    }
    hardware, charged = 6.0 / 3 * 0.36 / 3600, (800 * 0.5 + 60 * 2.0) / 1e6 / 3
    assert found["rag"].per_1000 == pytest.approx(1000 * hardware)
    assert found["rag@gpt"].per_1000 == pytest.approx(1000 * (hardware + charged))
    assert [cost.index for cost in found.values()] == pytest.approx([20 * 0.36 / 3600] * 2)
    assert found["rag@gpt"].total == pytest.approx(0.002 + 10_000 * (hardware + charged))


def test_requests_to_a_server_keep_no_gpu() -> None:
    values = PRICED | {"cluster.gpus_per_worker": 1, "prices.gpu_hour": 3.6}
    busy = {"retrieval": 0.0, "generation": 5.0}
    found = [measure._cost(of_arm(values, arm), [], busy, None, [row(prompt_tokens=0)]) for arm in ("base", "base@gpt")]
    assert found[0].per_1000 == pytest.approx(1000 * (5 * 0.0001 + 5 * 0.001))
    assert found[1].per_1000 == pytest.approx(1000 * (5 * 0.0001 + 20 * 2.0 / 1e6))


@pytest.mark.parametrize(
    ("values", "row_of_gpt", "said"),
    [
        ({"compare.hosted": {"gpt": {"model": "gpt-x"}}}, row(), ["base@gpt and rag@gpt", "million_prompt_tokens"]),
        (PRICED, row(), []),
        (PRICED, row(completion_tokens=0), ["base@gpt and rag@gpt", "does not report the tokens"]),
        (PRICED, row(completion_tokens=0, answer=""), []),
        ({"generator.engine": "openai"}, None, ["A server answers base and rag: their cost covers the requests"]),
    ],
)
def test_a_cost_without_the_work_of_a_server_is_said(
    values: dict[str, Any], row_of_gpt: schema.Answer | None, said: list[str]
) -> None:
    arms = ["base", "rag", *(["base@gpt", "rag@gpt"] if row_of_gpt else [])]
    rows = {arm: {"q": row_of_gpt if "@" in arm and row_of_gpt else row(completion_tokens=0)} for arm in arms}
    measured = {arm: Costed(of_arm(values, arm), rows[arm]) for arm in arms}
    lines = measure.cost_warnings(measured)
    assert len(lines) == bool(said)
    assert all(part in lines[0] for part in said)


class Costed:
    """The part of `measure.Measured` that a warning is about."""

    def __init__(self, settings: config.Config, rows: dict[str, schema.Answer]) -> None:
        self.settings, self.rows = settings, rows
