"""Computes what an arm costs: once, per thousand answers, and in total; in money where prices are known, else in seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ragtune_ray import config


@dataclass(frozen=True, slots=True)
class Compute:
    """Time for which hardware was reserved."""

    core_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: Compute) -> Compute:
        return Compute(self.core_seconds + other.core_seconds, self.gpu_seconds + other.gpu_seconds)

    def times(self, factor: float) -> Compute:
        """The time multiplied by a factor.

        >>> Compute(2.0, 1.0).times(3)
        Compute(core_seconds=6.0, gpu_seconds=3.0)
        """
        return Compute(self.core_seconds * factor, self.gpu_seconds * factor)


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of an arm, in `unit`."""

    index: float
    training: float
    one_off: float
    """Index plus training."""
    per_1000: float
    """Of a thousand answers."""
    answers: int
    """Number of answers in `total`."""
    total: float
    """One-off cost plus all answers."""
    unit: str
    """A currency, `core-seconds` or `GPU-seconds`."""


def unit_of(prices: config.Prices, *, with_gpus: bool) -> str:
    """The unit of costs: a currency if the price of the hardware is set, else seconds of reserved hardware.

    >>> unit_of(config.Prices(), with_gpus=False), unit_of(config.Prices(core_hour=0.05), with_gpus=False)
    ('core-seconds', 'USD')
    """
    if with_gpus:
        return prices.currency if prices.gpu_hour else "GPU-seconds"
    return prices.currency if prices.core_hour else "core-seconds"


def amount(compute: Compute, prices: config.Prices, unit: str) -> float:
    """The cost of reserving this hardware, in the unit."""
    match unit:
        case "core-seconds":
            return compute.core_seconds
        case "GPU-seconds":
            return compute.gpu_seconds
        case _:
            return (compute.core_seconds * prices.core_hour + compute.gpu_seconds * prices.gpu_hour) / 3600


def tokens_price(prompt_tokens: float, completion_tokens: float, prices: config.Prices) -> float:
    """What a server charges for these tokens, in money.

    >>> tokens_price(1000, 100, config.Prices(million_prompt_tokens=2.0, million_completion_tokens=8.0))
    0.0028
    """
    return (prompt_tokens * prices.million_prompt_tokens + completion_tokens * prices.million_completion_tokens) / 1e6


def cost_of(
    index: Compute,
    training: Compute,
    per_answer: Compute,
    *,
    answers: int,
    prices: config.Prices,
    unit: str,
    charged: float = 0.0,
) -> Cost:
    """The cost of an arm over a number of answers; `charged` is what a server charges for each, in money.

    >>> cost_of(Compute(60), Compute(), Compute(2.0), answers=10, prices=config.Prices(), unit="core-seconds").total
    80.0
    """
    once = [amount(part, prices, unit) for part in (index, training)]
    each = amount(per_answer, prices, unit) + charged
    return Cost(
        index=once[0],
        training=once[1],
        one_off=sum(once),
        per_1000=each * 1000,
        answers=answers,
        total=sum(once) + each * answers,
        unit=unit,
    )


def break_even(arm: Cost, against: Cost) -> int | None:
    """Number of answers from which an arm that costs more to set up is cheaper in total; None: never, or from the start.

    >>> tuned = Cost(0, 90, 90, 10, 1000, 100, "USD")
    >>> base = Cost(0, 0, 0, 100, 1000, 100, "USD")
    >>> break_even(tuned, base), break_even(base, tuned)
    (1000, None)
    """
    saved = (against.per_1000 - arm.per_1000) / 1000
    more = arm.one_off - against.one_off
    return math.ceil(more / saved) if saved > 0 and more > 0 else None
