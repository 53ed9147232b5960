"""Settings of `ragtune questions`: questions from documents."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from ragtune_ray.config.generation import Generator
from ragtune_ray.config.section import Section

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
    engine: Literal["openai", "transformers"] = "openai"
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
