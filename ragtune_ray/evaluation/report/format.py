"""The shape of `comparison.json`: four arms side by side, and which of them is recommended.

In: the JSON, as `decision` writes it. Out: a frozen `Comparison`, every number finite; what a measurement lacks is None or
empty. This module knows nothing of how anything was measured or is shown.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ragtune_ray import RagtuneError
from ragtune_ray.config import Arm

__all__ = [
    "Adaptive",
    "ArmFacts",
    "BreakEven",
    "Ceilings",
    "Comparison",
    "ComparisonError",
    "Cost",
    "Difference",
    "Example",
    "ExampleAnswer",
    "Forgetting",
    "Freshness",
    "Interval",
    "Latency",
    "Percentiles",
    "Questions",
    "Round",
    "Source",
    "Throughput",
    "Verdict",
    "Weighed",
    "read",
]

FORMAT = 1
ARMS: tuple[str, ...] = typing.get_args(Arm)
"""In the order in which they are shown."""

# Control characters and lone surrogates: they would steer a terminal, and HTML and UTF-8 have no place for them.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

Metrics = dict[str, "Interval | None"]


class ComparisonError(RagtuneError, ValueError):
    """Not a comparison that this version can show; the message names the field, the value and the rule."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Interval(_Part):
    """A mean over n questions and its confidence interval."""

    value: float
    low: float
    high: float
    n: int


class Percentiles(_Part):
    """How long half, and 95 % of the questions took at most."""

    p50_seconds: float
    p95_seconds: float


class Latency(_Part):
    """How long one question takes, by stage."""

    retrieval: Percentiles | None = None
    generation: Percentiles | None = None
    total: Percentiles
    n: int
    """Questions that were timed."""


class Throughput(_Part):
    """How many questions are answered in bulk."""

    answers_per_second: float


class Cost(_Part):
    """What an arm costs, in `unit`."""

    index: float
    """Once: to index the corpus."""
    training: float
    """Once: to tune the model."""
    one_off: float
    """Both."""
    per_1000: float
    """Of a thousand answers."""
    answers: int
    """For how many answers `total` stands."""
    total: float
    """One-off and answers."""
    unit: str
    """A currency, or `core-seconds` where no prices are set."""


class Freshness(_Part):
    """How an arm follows a changed document."""

    visible_seconds: float | None = None
    """From the change to the first answer that can know it."""
    changed: Interval | None = None
    """Share of the answers that tell the new fact."""
    stale_share: Interval | None = None
    """Share of the answers that still tell the old fact."""


class Forgetting(_Part):
    """What tuning did to questions from outside the corpus."""

    before: Interval | None = None
    after: Interval | None = None
    difference: Interval | None = None


class Adaptive(_Part):
    """What answering without retrieval brings, where the generator is sure enough (`ragtune calibrate`)."""

    threshold: float
    """Least confidence, found on the validation questions."""
    share: Interval
    """Of the questions, those that are answered without retrieval."""
    difference: Interval
    """Scores of all questions with this, less those with retrieval always."""
    saved_seconds: float
    """Of the median answer, as the share and the medians of both ways have it; below 0 it takes longer."""


class Round(_Part):
    """What a round of `tune` made of one component, and whether it was taken over."""

    round: int
    component: str
    accepted: bool
    reason: str
    num_examples: int
    metric: str = ""
    before: float | None = None
    """Mean over the validation questions; None where nothing was tried."""
    after: float | None = None
    low: float | None = None
    """Ends of the interval of the gain."""
    high: float | None = None


class ArmFacts(_Part):
    """All that was measured of one arm."""

    model: str = ""
    model_fingerprint: str = ""
    index_version: str = ""
    statuses: dict[str, int] = {}
    """status of `Answer` -> how many."""
    quality: Metrics = {}
    explainability: Metrics = {}
    latency: Latency | None = None
    throughput: Throughput | None = None
    cost: Cost | None = None
    freshness: Freshness | None = None
    forgetting: Forgetting | None = None
    adaptive: Adaptive | None = None
    losses: dict[str, int] = {}
    """What became of each answerable question -> how many."""
    violations: tuple[str, ...] = ()
    """Limits of the config that the arm breaks."""
    rounds: tuple[Round, ...] = ()
    """Of an arm that `tune` made."""


class Ceilings(_Part):
    """How well a model answers with nothing, with what was retrieved, and with the passage that holds the answer."""

    closed_book: Interval | None = None
    retrieved: Interval | None = None
    gold_passage: Interval | None = None


class Weighed(_Part):
    """One step of the decision."""

    dimension: str
    rule: str
    result: str


class Verdict(_Part):
    """Which arm to use, and why."""

    outcome: Literal["recommended", "no_difference", "too_few_questions", "none_qualifies"]
    arm: str
    """Empty where none qualifies."""
    headline: str
    reason: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    weighed: tuple[Weighed, ...] = ()


class Questions(_Part):
    """How many questions the arms answered."""

    total: int
    answerable: int
    unanswerable: int
    needed: int | None = None
    """For a difference of the margin to be seen."""


class Difference(_Part):
    """`arm` minus `against`, over the same questions."""

    arm: str
    against: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    p_value: float | None = None
    p_adjusted: float | None = None
    needed: int | None = None


class BreakEven(_Part):
    """After how many answers `arm` has cost as much as `against`; None: never."""

    arm: str
    against: str
    answers: float | None = None


class Source(_Part):
    """A passage that an answer was shown."""

    number: int
    title: str = ""
    document_id: str
    start: int
    end: int
    text: str
    cited: bool = False


class ExampleAnswer(_Part):
    """What one arm answered to one question."""

    text: str
    score: float | None = None
    abstained: bool = False
    status: str = "ok"
    error: str = ""
    sources: tuple[Source, ...] = ()


class Example(_Part):
    """One question with the answers of all arms."""

    query_id: str
    query: str
    gold: tuple[str, ...] = ()
    """Empty: unanswerable."""
    answers: dict[str, ExampleAnswer] = {}


class Comparison(_Part):
    """The whole of `comparison.json`."""

    format: Literal[1]
    title: str
    verdict: Verdict
    metric: str
    """The metric of quality that decides, such as token_F1."""
    margin: float
    """Smaller differences of it do not matter."""
    confidence: float = Field(gt=0, lt=1)
    questions: Questions
    arms: dict[str, ArmFacts] = Field(min_length=1)
    ceilings: dict[str, Ceilings] = {}
    differences: tuple[Difference, ...] = ()
    retrieval: Metrics | None = None
    break_even: tuple[BreakEven, ...] = ()
    examples: tuple[Example, ...] = ()
    config: dict[str, Any] = {}
    command: str = ""
    versions: dict[str, str] = {}
    hardware: dict[str, Any] = {}
    created: str = ""
    seconds: dict[str, float] = {}

    def names(self) -> list[str]:
        """The arms as they are shown: base, rag, ft, rag+ft, then any other by name."""
        return sorted(self.arms, key=lambda name: (ARMS.index(name) if name in ARMS else len(ARMS), name))


def read(comparison: Mapping[str, Any]) -> Comparison:
    """A comparison from its JSON.

    Control characters in its texts are replaced by U+FFFD, and mappings are sorted by key, so that equal files look alike.

    Raises:
        ComparisonError: a field is missing, of the wrong type, or a number is not finite.
    """
    try:
        return Comparison.model_validate(_printable(comparison))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ComparisonError(
            f"not a comparison of format {FORMAT} ({'; '.join(wrong[:3])}); make it again with `ragtune compare`"
        ) from error


def _printable(value: Any) -> Any:
    match value:
        case str():
            return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
        case Mapping():
            return {_printable(key): _printable(value[key]) for key in sorted(value, key=str)}
        case list() | tuple():
            return [_printable(each) for each in value]
    return value
