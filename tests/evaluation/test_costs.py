"""Costs of an arm, against hand computation."""

import pytest

from ragtune_ray import config
from ragtune_ray.evaluation.costs import Compute, break_even, cost_of, tokens_price, unit_of


def test_costs_in_money_equal_hand_computed_values() -> None:
    prices = config.Prices(core_hour=0.04, gpu_hour=2.0, currency="EUR")
    unit = unit_of(prices, with_gpus=True)
    cost = cost_of(Compute(3600, 0), Compute(0, 1800), Compute(0.36, 0.72), answers=1000, prices=prices, unit=unit)
    assert (cost.index, cost.training, cost.one_off) == pytest.approx((0.04, 1.0, 1.04))
    assert cost.per_1000 == pytest.approx(360 / 3600 * 0.04 + 720 / 3600 * 2.0)
    assert cost.total == pytest.approx(1.04 + 0.004 + 0.4)
    assert cost.unit == "EUR"


def test_costs_without_prices_are_reserved_time() -> None:
    compute = Compute(10, 4)
    for with_gpus, unit, amount in ((False, "core-seconds", 10), (True, "GPU-seconds", 4)):
        assert unit_of(config.Prices(), with_gpus=with_gpus) == unit
        cost = cost_of(compute, Compute(), Compute(), answers=5, prices=config.Prices(), unit=unit)
        assert (cost.unit, cost.total) == (unit, amount)


def test_break_even_is_where_the_cheaper_arm_changes() -> None:
    prices = config.Prices()
    costs = [
        lambda answers: cost_of(
            Compute(), Compute(700), Compute(0.3), answers=answers, prices=prices, unit="core-seconds"
        ),
        lambda answers: cost_of(
            Compute(100), Compute(), Compute(1.1), answers=answers, prices=prices, unit="core-seconds"
        ),
    ]
    number = break_even(costs[0](1), costs[1](1))
    assert number == 750
    assert costs[0](number).total <= costs[1](number).total
    assert costs[0](number - 1).total > costs[1](number - 1).total
    assert break_even(costs[1](1), costs[0](1)) is None


def test_what_a_server_charges_is_part_of_each_answer() -> None:
    prices = config.Prices(core_hour=0.36, million_prompt_tokens=0.5, million_completion_tokens=2.0)
    # 3 answers: 1,200 and 90 tokens.
    charged = tokens_price(1200, 90, prices) / 3
    assert charged == pytest.approx((1200 * 0.5 + 90 * 2.0) / 1_000_000 / 3)
    cost = cost_of(Compute(100), Compute(), Compute(2.0), answers=10, prices=prices, unit="USD", charged=charged)
    assert cost.per_1000 == pytest.approx(1000 * (2 * 0.0001 + 0.00026))
    assert cost.total == pytest.approx(0.01 + 10 * 0.00046)
