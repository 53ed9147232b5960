"""Settings of `evaluation`: scores, the comparison of arms, prices."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ragtune_ray.config.arms import NAME, Arm, hosted_name
from ragtune_ray.config.generation import Engine, Generator
from ragtune_ray.config.section import Section

DecidingMetric = Literal[
    "EM", "token_F1", "contains_answer", "ROUGE_L", "numeric_match", "semantic", "groundedness", "judge"
]
"""A metric that can decide a comparison."""
GradedMetric = Literal["semantic", "groundedness", "judge"]
"""A metric that a model computes, where `evaluate.metrics` names it."""
Language = Literal[
    "en", "zh", "ar", "cs", "da", "de", "el", "es", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "km", "ko", "lo", "my", "nl",
    "no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "other",
]  # fmt: skip
"""Language of answers, by its ISO 639-1 code; `other`: any that is not named."""
Normalization = Literal["squad", "strict"]
"""What a comparison of answers ignores."""
WITHOUT_GOLD = frozenset[str]({"groundedness", "judge"})
"""Metrics that also score questions without gold answers."""


class Hosted(Section):
    """A generator for the arms `base@NAME` and `rag@NAME`; settings that are not named here are those of `generator`."""

    model: str = Field(min_length=1)
    """As `generator.model`."""
    engine: Engine = "openai"
    """As `generator.engine`."""
    base_url: str = Generator().base_url
    """As `generator.base_url`."""
    api_key_env: str = Generator().api_key_env
    """As `generator.api_key_env`."""
    max_new_tokens: int = Field(0, ge=0)
    """As `generator.max_new_tokens`, in tokens; a model that thinks before it answers needs more. 0: the same."""
    million_prompt_tokens: float = Field(0.0, ge=0)
    """As `prices.million_prompt_tokens`."""
    million_completion_tokens: float = Field(0.0, ge=0)
    """As `prices.million_completion_tokens`."""


class Judge(Hosted):
    """The language model that grades answers for the metric `judge`, and for `groundedness` without `evaluate.nli_model`."""

    model: str = ""
    """As `generator.model`; better another model than those that answer. Empty: none."""
    max_new_tokens: int = Field(512, gt=0)
    """Longest reply, in tokens; a model that thinks before it replies needs more."""
    concurrency: int = Generator().concurrency
    """As `generator.concurrency`."""
    timeout_seconds: float = Field(Generator().timeout_seconds, gt=0)
    """As `generator.timeout_seconds`."""
    max_attempts: int = Field(3, gt=0)
    """As `generator.max_attempts`."""


class Evaluate(Section):
    """How hits and answers are scored."""

    arms: tuple[Arm, ...] = Field(("base", "rag"), min_length=1)
    """Arms that answer the queries. Each is compared with the first."""
    cutoffs: tuple[int, ...] = Field((1, 3, 5, 10), min_length=1)
    """Values of k for recall@k, MRR@k and nDCG@k."""
    depth: int = Field(20, gt=0)
    """Hits per query that `ragtune retrieve` writes: at least `retrieval.top_k`, and more if they are from too few documents for
    the metrics. Answers always use `retrieval.top_k`."""
    resamples: int = Field(10_000, ge=100)
    """Bootstrap resamples per confidence interval."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Confidence level of the intervals."""
    language: Language = "en"
    """Language of the gold answers. Metrics compare words, but characters in Chinese, Japanese, Thai, Lao, Khmer and Burmese.
    Only English articles are ignored. Most languages of Europe write 4,5 and 1.000 for the English 4.5 and 1,000."""
    normalization: Normalization = "strict"
    """What EM, token F1, contains-answer and ROUGE-L ignore. `strict`: case, articles and punctuation, but not what changes a
    number, such as a decimal point, a minus or a percent sign. `squad`: all punctuation, as SQuAD's script does, so 4.5
    equals 45; for scores that are compared with published ones."""
    metrics: tuple[GradedMetric, ...] = ()
    """Metrics to compute besides those that need no model (EM, token_F1, contains_answer, ROUGE_L, and numeric_match where
    gold answers are numbers): `semantic` (cosine of answer and gold answer by the encoder), `groundedness` (share of the
    answer's sentences that its passages support), `judge` (a language model grades the answer). The last two also score
    questions without gold answers. `ragtune compare` computes `compare.metric` in any case."""
    judge: Judge = Judge()
    nli_model: str = ""
    """Cross-encoder for natural language inference, a directory or a hub name, that decides for `groundedness` whether passages
    support a sentence. Empty: `evaluate.judge` decides."""
    max_failed_grades: float = Field(0.05, ge=0, le=1)
    """The command fails if more than this share of the grades of a metric fails. A question with a failed grade is left out of
    that metric in all arms."""
    numeric_tolerance: float = Field(0.0, ge=0, lt=1)
    """How far a number may be from the gold number to be right in numeric_match, as a share of the gold number: 0.01 accepts
    4.46 for 4.5. Whole numbers from 1000 to 2100 without a unit may be years, and must be equal. 0: all must be equal."""
    labels_path: str = ""
    """File of people's grades, written by `ragtune label`: JSON lines that can be versioned. Empty: labels.jsonl in the
    workspace."""

    @field_validator("metrics")
    @classmethod
    def _metrics_are_a_set(cls, metrics: tuple[GradedMetric, ...]) -> tuple[GradedMetric, ...]:
        return tuple(sorted(set(metrics)))

    @property
    def scores_without_gold(self) -> bool:
        """Whether questions without gold answers are scored."""
        return not WITHOUT_GOLD.isdisjoint(self.metrics)

    def can_score(self, answers: tuple[str, ...] | None) -> bool:
        """Whether a question with these gold answers (None: unknown) is scored."""
        return answers is not None or self.scores_without_gold

    def identity(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """What scores depend on, as JSON values. Settings that are newer than format 1 are left out at their old values.

        The models that grade are left out: `evaluation.grading.graders.identities` has what their grades depend on.
        """
        old = {"normalization": "squad", "metrics": (), "numeric_tolerance": 0.0}
        unset = {name for name, value in old.items() if getattr(self, name) == value}
        no_score = {"judge", "labels_path", "max_failed_grades", "nli_model"}
        return self.model_dump(mode="json", exclude={*no_score, *(exclude or ()), *unset})


Name = Annotated[str, Field(pattern=f"^{NAME}$")]
AS_CONFIGURED = "config"
"""Name of the config itself among `compare.variants`."""


class Compare(Section):
    """Choosing an arm by measurement.

    Arms answer the questions of `queries`: those of the test split, if an arm is tuned and `queries.split` is `all`.
    """

    hosted: dict[Name, Hosted] = Field(default_factory=dict)
    """Other generators, which answer in the arms `base@NAME` and `rag@NAME`. Each NAME has a `model` and, where needed, `engine`
    (default `openai`), `base_url`, `api_key_env`, `max_new_tokens`, `million_prompt_tokens` and `million_completion_tokens`.
    Empty: none."""
    arms: tuple[Arm, ...] = Field(("base", "rag", "ft", "rag+ft"), min_length=1)
    """Arms to compare; a mode of `ragtune tune` is an arm, too. A tuned arm that has no model yet is trained first. A model
    of `compare.hosted` that no arm names takes part in both of its arms."""
    variants: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """Other settings of retrieval, tried in the arm `rag` on validation questions before the arms are compared; the best,
    or the config itself, is then used by all arms. Each NAME has settings of `chunking`, `encoder`, `index`, `retrieval` or
    `prompt`, such as `{long: {retrieval.top_k: 10, chunking.size_tokens: 400}}`. Empty: none."""
    metric: DecidingMetric = "token_F1"
    """Quality metric."""
    margin: float = Field(0.02, ge=0, lt=1)
    """Differences in `compare.metric` up to this size do not matter: an arm may be recommended although a dearer one is better
    by up to this much. 0: every difference matters."""
    cost_margin: float = Field(0.1, ge=0, lt=1)
    """Total costs that differ by up to this share count as equal, since the same work takes another time in every run. Of
    arms that are equal in quality and cost, the one with the fewest parts is recommended (an index and tuning are parts).
    0: every difference matters."""
    until: Literal["all", "decided"] = "all"
    """How many questions are asked. `all`: every one. `decided`: batches of about 100 in random order, until the verdict
    stands; arms that can no longer be recommended are dropped. The intervals are wider, because they must hold after every
    batch."""
    answers: int = Field(10_000, gt=0)
    """Number of answers over which the costs of indexing and training are spread."""
    latency_queries: int = Field(20, gt=0)
    """Queries that each arm answers one at a time to measure latency."""
    gold_passages: bool = True
    """Also answer from the passage that contains the answer, to measure the generators without retrieval."""
    max_p95_seconds: float = Field(0.0, ge=0)
    """Constraint: 95 of 100 answers take at most this many seconds. 0: no limit."""
    max_cost_per_1000: float = Field(0.0, ge=0)
    """Constraint: cost of 1,000 answers, including their part of indexing and training, in `prices.currency` (in
    seconds if prices are unknown). 0: no limit."""
    max_visible_seconds: float = Field(0.0, ge=0)
    """Constraint: seconds until a changed document shows in answers, including any training this takes. 0: no limit."""
    min_cited_share: float = Field(0.0, ge=0, le=1)
    """Constraint: share of the answers that cite a passage. 0: no limit."""
    changes_path: str = ""
    """Changed documents (formats as for corpus.path). They are upserted into a copy of the index to measure how quickly
    and how well each arm reflects changes. Empty: not measured."""
    deleted: tuple[str, ...] = ()
    """Ids of documents that the change deletes. Empty: none."""
    changed_queries_path: str = ""
    """Questions about the changes, with the new answers. Required if there are changes, otherwise empty."""
    probe_path: str = ""
    """Questions with answers, on topics outside the corpus and never used in training, to measure what a tuned generator
    forgets. Empty: not measured."""
    num_examples: int = Field(8, ge=0)
    """Number of questions for which the report shows the answers of all arms next to each other. 0: none."""

    @field_validator("arms")
    @classmethod
    def _hosted_models_take_part(cls, arms: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        unnamed = [name for name in info.data.get("hosted", {}) if name not in map(hosted_name, arms)]
        return (*arms, *(f"{kind}@{name}" for name in unnamed for kind in ("base", "rag")))

    @model_validator(mode="after")
    def _changes_have_questions(self) -> Self:
        if bool(self.changes_path or self.deleted) != bool(self.changed_queries_path):
            raise ValueError(
                "compare.changed_queries_path and the changes (compare.changes_path or compare.deleted) need each other; "
                "set both or neither"
            )
        if AS_CONFIGURED in self.variants:
            raise ValueError(f"compare.variants: {AS_CONFIGURED} is the name of the config itself; use another name")
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"compare.arms: {', '.join(self.arms)}: each arm may be named only once")
        return self


class Prices(Section):
    """Prices of computing, for `ragtune plan` and `ragtune compare`. Without them, `plan` gives hours and `compare` seconds."""

    core_hour: float = Field(0.0, ge=0)
    """Price of one CPU core for one hour. 0: unknown."""
    gpu_hour: float = Field(0.0, ge=0)
    """Price of one GPU for one hour. 0: unknown."""
    million_prompt_tokens: float = Field(0.0, ge=0)
    """Engine `openai`: what the server charges for one million tokens of prompts. 0: unknown."""
    million_completion_tokens: float = Field(0.0, ge=0)
    """Engine `openai`: what the server charges for one million tokens of answers. 0: unknown."""
    gibibyte_month: float = Field(0.0, ge=0)
    """Price of storing one GiB for one month. 0: unknown."""
    currency: str = "USD"
    """Currency of the prices."""


QuestionKind = Literal["fact", "sentences", "comparison", "unanswerable", "follow_up"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)


class Questions(Section):
    """Questions that a generator writes about the documents of the index.

    A capable model writes better questions than the embedded one: name it here, and review what it wrote.
    """

    count: int = Field(100, gt=0)
    """Questions to keep after all filters; fewer if the documents or `max_draws` do not yield as many."""
    shares: dict[QuestionKind, float] = Field(
        {"fact": 0.4, "sentences": 0.25, "comparison": 0.1, "unanswerable": 0.15, "follow_up": 0.1}
    )
    """Relative number of each kind. `fact`: the answer is a phrase of a passage. `sentences`: it takes several sentences.
    `comparison`: it needs two passages of two documents. `unanswerable`: plausible, but no document answers it.
    `follow_up`: a question after another one, which makes sense only in that conversation. A kind that is left out is not
    written."""
    per_document: int = Field(5, gt=0)
    """Most questions about one document."""
    max_draws: int = Field(4, gt=0)
    """Passages to try for each question that is wanted, before the command settles for fewer."""
    unit_questions: int = Field(16, gt=0)
    """Drawn passages per task. A task is repeated as a whole if its worker dies."""
    model: str = ""
    """Model that writes and checks the questions, named as in `generator.model`. Empty: the generator of the config."""
    engine: Engine = "openai"
    """As `generator.engine`; used if `questions.model` is set."""
    base_url: str = Generator().base_url
    """As `generator.base_url`; used if `questions.model` is set."""
    api_key_env: str = Generator().api_key_env
    """As `generator.api_key_env`; used if `questions.model` is set."""
    max_new_tokens: int = Field(512, gt=0)
    """Longest reply of the model, in tokens; one that thinks before it answers needs more."""
    max_attempts: int = Field(3, gt=0)
    """Requests per question, if the model's reply is not the JSON that was asked for."""
    yes_no: bool = False
    """Keep questions whose answer is yes or no."""
    near_duplicate: float = Field(0.85, gt=0, le=1)
    """Two questions with the same answer are the same question from this cosine of their embeddings on (see
    docs/questions.md). 1: only questions with equal words are."""
    same_answer: float = Field(0.6, gt=0, le=1)
    """Token F1 from which an answer of up to 8 tokens counts as the same as the one written with the question."""
    same_long_answer: float = Field(0.35, gt=0, le=1)
    """The same for longer answers, which may be worded differently."""

    @model_validator(mode="after")
    def _shares_are_shares(self) -> Self:
        if not self.shares or min(self.shares.values()) < 0 or not sum(self.shares.values()):
            raise ValueError(f"questions.shares {self.shares}: none may be negative, one must be positive")
        return self

    def generator_values(self) -> dict[str, Any]:
        """The settings of the section `generator` that this section replaces, by dotted name."""
        values: dict[str, Any] = {
            "generator.max_new_tokens": self.max_new_tokens,
            "generator.stop": (),
            "answer.reading": "together",
        }
        if self.model:
            named = self.model_dump(include={"model", "engine", "base_url", "api_key_env"})
            values |= {f"generator.{name}": value for name, value in named.items()}
        return values
