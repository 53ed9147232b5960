"""The arms that are compared, and what each one uses."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["staged", "joint", "iterative", "domain"]
Arm = Literal["base", "rag", "ft", "rag+ft", "staged", "joint", "iterative", "domain"]


def retrieves(arm: Arm) -> bool:
    """Whether the generator is shown passages in an arm.

    >>> retrieves("ft")
    False
    """
    return arm not in ("base", "ft")


def is_mode(arm: Arm) -> bool:
    """Whether an arm answers with what `ragtune tune` made in the mode of that name."""
    return arm in get_args(Mode)


def is_tuned(arm: Arm) -> bool:
    """Whether an arm answers with fine-tuned models."""
    return arm in ("ft", "rag+ft") or is_mode(arm)
