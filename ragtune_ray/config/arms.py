"""The arms that are compared, and what each one uses."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator

Mode = Literal["staged", "joint", "iterative", "domain"]
ARMS = ("base", "rag", "ft", "rag+ft", *get_args(Mode))
"""The arms that use the config's own generator, in the order in which they are shown."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}"
"""Regular expression of the names in `compare.hosted` and `compare.variants`; they become names of directories."""


def _known(arm: str) -> str:
    if arm not in ARMS and not re.fullmatch(f"(base|rag)@{NAME}", arm):
        raise ValueError(f"must be {', '.join(ARMS)}, or base@NAME or rag@NAME for a NAME in compare.hosted")
    return arm


Arm = Annotated[str, AfterValidator(_known)]
"""One of `ARMS`, or `base` or `rag` with the generator of `compare.hosted.NAME`: `base@NAME`, `rag@NAME`."""


def retrieves(arm: Arm) -> bool:
    """Whether the generator is shown passages in an arm.

    >>> retrieves("ft"), retrieves("rag@gpt")
    (False, True)
    """
    return without_name(arm) not in ("base", "ft")


def is_mode(arm: Arm) -> bool:
    """Whether an arm answers with what `ragtune tune` made in the mode of that name."""
    return arm in get_args(Mode)


def is_tuned(arm: Arm) -> bool:
    """Whether an arm answers with fine-tuned models."""
    return arm in ("ft", "rag+ft") or is_mode(arm)


def num_parts(arm: Arm) -> int:
    """How many things an arm needs beside its model as it is: an index, tuning, a mode of tuning.

    >>> [num_parts(arm) for arm in ("base@gpt", "rag", "ft", "rag+ft", "joint")]
    [0, 1, 1, 2, 3]
    """
    return retrieves(arm) + is_tuned(arm) + is_mode(arm)


def hosted_name(arm: Arm) -> str:
    """The name in `compare.hosted` of the generator that an arm uses; empty if it is the config's own.

    >>> hosted_name("rag@gpt"), hosted_name("rag")
    ('gpt', '')
    """
    return arm.partition("@")[2]


def without_name(arm: Arm) -> Arm:
    """The arm with the config's own generator.

    >>> without_name("rag@gpt")
    'rag'
    """
    return arm.partition("@")[0]
