"""The content of `comparison.json`: what was measured for each arm, and which arm is recommended.

`read` checks a file's content, `Comparison.content` returns it. Every number is finite; what was not measured is None or empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ragtune_ray import RagtuneError
from ragtune_ray.config import ARMS
from ragtune_ray.evaluation.costs import Cost
from ragtune_ray.evaluation.intervals import Interval
from ragtune_ray.evaluation.labelling.agreement import Agreement
from ragtune_ray.evaluation.verdict import Difference, Verdict

FORMAT: Literal[1] = 1
"""Version of the file format."""

# Control characters and lone surrogates: a terminal would obey them, and neither HTML nor UTF-8 allows them.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

Metrics = dict[str, Interval | None]
"""Metric -> its mean with an interval."""


class ComparisonError(RagtuneError, ValueError):
    """The content is not a comparison that this version can show; the message names the fields and the rules."""


class _Part(BaseModel):
    # This config also applies to the dataclasses of other modules that a part contains.
    model_config = ConfigDict(
        frozen=True, allow_inf_nan=False, revalidate_instances="always", use_attribute_docstrings=True
    )


class Percentiles(_Part):
    """Median and 95th percentile of a duration."""

    p50_seconds: float
    p95_seconds: float


class Latency(_Part):
    """How long one question takes when questions are asked one at a time."""

    retrieval: Percentiles | None = None
    generation: Percentiles | None = None
    total: Percentiles
    n: int
    """Number of questions timed."""


class Throughput(_Part):
    """Speed of bulk answering."""

    answers_per_second: float


class Freshness(_Part):
    """How an arm follows a changed document."""

    visible_seconds: float | None = None
    """Seconds from the change until answers can use it; None: never."""
    changed: Interval | None = None
    """Share of answers that state the new fact."""
    stale_share: Interval | None = None
    """Share of answers that still state the old fact."""


class Forgetting(_Part):
    """Score on questions from outside the corpus, before and after tuning."""

    before: Interval | None = None
    after: Interval | None = None
    difference: Interval | None = None


class Adaptive(_Part):
    """The effect of skipping retrieval if the generator is confident enough (`ragtune calibrate`)."""

    threshold: float
    """Confidence from which retrieval is skipped, found on the validation questions."""
    share: Interval
    """Share of questions answered without retrieval."""
    difference: Interval
    """Score with skipping minus score with retrieval for every question."""
    saved_seconds: float
    """Time saved on the median answer; negative: it takes longer."""


class Round(_Part):
    """What one round of `tune` did to one component. The fields are in the order of the model's manifest."""

    accepted: bool
    after: float | None = None
    """Mean score on the validation questions; None: nothing was trained."""
    before: float | None = None
    component: str
    high: float | None = None
    """Upper end of the interval of the gain."""
    low: float | None = None
    metric: str = ""
    num_examples: int
    reason: str
    round: int


class ArmResult(_Part):
    """All measurements of one arm."""

    model: str = ""
    model_fingerprint: str = ""
    index_version: str = ""
    statuses: dict[str, int] = {}
    """`Answer.status` -> number of answers."""
    cut: int = 0
    """Number of answers that ended at `generator.max_new_tokens`."""
    quality: Metrics = {}
    explainability: Metrics = {}
    latency: Latency | None = None
    throughput: Throughput | None = None
    cost: Cost | None = None
    freshness: Freshness | None = None
    forgetting: Forgetting | None = None
    adaptive: Adaptive | None = None
    losses: dict[str, int] = {}
    """`failures.Outcome` -> number of answerable questions."""
    violations: tuple[str, ...] = ()
    """Constraints of the config that the arm breaks."""
    rounds: tuple[Round, ...] = ()
    """Of an arm that `tune` made."""


class Ceilings(_Part):
    """Score of one generator without passages, with retrieved passages, and with the passage that contains the answer."""

    closed_book: Interval | None = None
    retrieved: Interval | None = None
    gold_passage: Interval | None = None


class Questions(_Part):
    """The questions that all arms answered."""

    total: int
    answerable: int
    unanswerable: int
    needed: int | None = None
    """Questions that would probably decide, if the arms differ as they do so far; None: these questions decide."""

    def kinds(self) -> str:
        """How many are answerable, as far as that is known.

        >>> Questions(total=3, answerable=2, unanswerable=1).kinds(), Questions(total=9, answerable=0, unanswerable=0).kinds()
        ('2 answerable and 1 not', '9 without gold answers')
        """
        unknown = self.total - self.answerable - self.unanswerable
        known = [f"{self.answerable:,} answerable and {self.unanswerable:,} not"] if self.total > unknown else []
        return ", ".join([*known, *([f"{unknown:,} without gold answers"] if unknown else [])])


class Looks(_Part):
    """How many questions were asked where asking stopped with the verdict (`compare.until: decided`)."""

    available: int
    """Questions that could have been asked."""
    looks: int
    """Times that the arms were weighed."""
    asked: dict[str, int]
    """Arm -> questions that it was asked."""
    dropped: tuple[str, ...] = ()
    """Arms that could not win any more, in the order in which they were dropped."""

    def sentence(self) -> str:
        """How many questions and answers were needed, in a sentence."""
        share = sum(self.asked.values()) / (self.available * len(self.asked))
        batches = "1 batch" if self.looks == 1 else f"{self.looks} batches"
        early = "".join(f"; {arm} was dropped after {self.asked[arm]:,}" for arm in self.dropped)
        asked = f"{max(self.asked.values()):,} of {self.available:,} questions were asked, in {batches}"
        return f"{asked}{early}: {share:.0%} of all answers."


class CheckedArm(_Part):
    """One arm in `Checked`."""

    agreement: Agreement
    """Of the metric with people, over the arm's labelled answers."""
    alone: Interval | None = None
    """Mean of the metric over all questions, not corrected."""
    people: Interval | None = None
    """Mean of people's grades over the labelled questions."""


class Checked(_Part):
    """What people's labels (`ragtune label`) say about a metric."""

    metric: str
    """The metric that the labels check: judge if there is one, otherwise the one that decides."""
    path: str
    """The file of the labels."""
    answers: int
    """Different answers of this comparison that have a label."""
    questions: int
    """Questions for which every arm's answer has a label."""
    partly: int = 0
    """Questions for which some arms' answers have a label, or answers of an earlier run, and some arm's has none."""
    needed: int = 0
    """Questions to label until the metric is corrected; 0: there are enough."""
    corrected: bool = False
    """Whether means, differences and verdict are corrected by the labels."""
    overall: Agreement
    """Of the metric with people, over the labelled answers of all arms."""
    arms: dict[str, CheckedArm]
    between: Agreement | None = None
    """Of people with each other; None: no answer has labels of two."""
    others: int = 0
    """Labelled answers that no arm of this comparison gave, such as those of another run."""
    rejects: tuple[str, ...] = ()
    """Lines of the file that are no labels."""


class BreakEven(_Part):
    """Number of answers from which `arm` is cheaper than `against`; None: never."""

    arm: str
    against: str
    answers: int | float | None = None


class Source(_Part):
    """A passage that the prompt contained."""

    number: int
    """Its number in the prompt, from 1."""
    title: str = ""
    document_id: str
    start: int
    end: int
    text: str
    cited: bool = False


class ExampleAnswer(_Part):
    """One arm's answer to an example question."""

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
    gold: tuple[str, ...] | None = ()
    """Gold answers; empty: unanswerable. None: unknown."""
    answers: dict[str, ExampleAnswer] = {}


class ContestedAnswer(_Part):
    """One arm's answer to a question on which two metrics differ."""

    text: str
    score: float
    """By the metric that decides."""
    other: float
    """By the other metric."""


class ContestedQuestion(_Part):
    """A question on which two metrics see another arm ahead."""

    query_id: str
    query: str
    gold: tuple[str, ...] | None = ()
    """As in `Example`."""
    answers: dict[str, ContestedAnswer]
    """Of the two arms."""


class Contested(_Part):
    """A metric by which another arm is ahead of the arm that the verdict names."""

    metric: str
    arm: str
    """The arm that is ahead."""
    score: float
    against: str
    """The verdict's arm."""
    against_score: float
    low: float
    """Ends of the interval of the lead."""
    high: float
    n: int
    """Number of questions."""
    questions: tuple[ContestedQuestion, ...] = ()
    """Those on which this metric and the deciding one differ most about the two arms."""


class Variant(_Part):
    """One variant of retrieval, or the config itself."""

    settings: dict[str, Any] = {}
    """What differs from the config."""
    score: Interval
    """On the validation questions that it answered, in the arm `rag`."""
    workspace: str = ""
    """Of its own index; empty: that of the config."""


class VariantRound(_Part):
    """One round of the search."""

    questions: int
    """Validation questions that each of its variants has answered so far."""
    scores: dict[str, float]
    kept: tuple[str, ...]
    """The variants that went on, best first."""


class VariantSearch(_Part):
    """The search among `compare.variants` on the validation questions."""

    winner: str
    """The variant that all arms used; `config`: none."""
    questions: int
    """Number of validation questions available."""
    looks: int
    """How many scores were compared, over all rounds. The more, the more optimistic the winner's own score."""
    variants: dict[str, Variant]
    rounds: tuple[VariantRound, ...]

    def names(self) -> list[str]:
        """The variants from the best to those that were dropped first."""
        last = {name: place for place, each in enumerate(self.rounds) for name in each.scores}
        return sorted(
            self.variants,
            key=lambda name: (name != self.winner, -last.get(name, -1), -self.variants[name].score.value, name),
        )


class Comparison(_Part):
    """The content of `comparison.json`."""

    format: Literal[1]
    title: str
    verdict: Verdict
    metric: str
    """The metric that decides, such as token_F1."""
    margin: float
    """Differences smaller than this do not matter."""
    confidence: float = Field(gt=0, lt=1)
    questions: Questions
    arms: dict[str, ArmResult] = Field(min_length=1)
    ceilings: dict[str, Ceilings] = {}
    differences: tuple[Difference, ...] = ()
    retrieval: Metrics | None = None
    variants: VariantSearch | None = None
    break_even: tuple[BreakEven, ...] = ()
    looks: Looks | None = None
    checked: Checked | None = None
    examples: tuple[Example, ...] = ()
    contested: tuple[Contested, ...] = ()
    """The metrics that see another arm ahead, largest lead first."""
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    hardware: dict[str, Any] = {}
    created: str = ""
    command: str = ""
    seconds: dict[str, float] = {}

    def names(self) -> list[str]:
        """The arms in the order in which they are shown: base, rag, ft, rag+ft, then all others by name."""
        return sorted(self.arms, key=lambda name: (ARMS.index(name) if name in ARMS else len(ARMS), name))

    def content(self) -> dict[str, Any]:
        """The JSON content, without fields that were never set."""
        return self.model_dump(mode="json", exclude_unset=True)


def read(content: Mapping[str, Any]) -> Comparison:
    """Check the content of `comparison.json`; control characters become U+FFFD and mappings are sorted by key.

    Raises:
        ComparisonError: a field is missing or has the wrong type, or a number is not finite.
    """
    try:
        return Comparison.model_validate(printable(content))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ComparisonError(
            f"not a comparison of format {FORMAT} ({'; '.join(problems[:3])}); make it again with `ragtune compare`"
        ) from error


def printable(value: Any) -> Any:
    """A text, or the texts in a JSON value, without control characters, which become U+FFFD."""
    match value:
        case str():
            return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
        case Mapping():
            return {printable(key): printable(value[key]) for key in sorted(value, key=str)}
        case list() | tuple():
            return [printable(each) for each in value]
    return value
