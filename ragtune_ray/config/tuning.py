"""Settings of `tuning`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ragtune_ray.config.arms import Mode
from ragtune_ray.config.section import Section

Component = Literal["generator", "retriever"]


class Tune(Section):
    """Tuning of retriever and generator in rounds.

    A round's models are accepted only if validation scores rise: generator by `compare.metric`, retriever by MRR@10.
    """

    mode: Mode = "staged"
    """`staged`: train on questions where retrieval or reading fails. `joint`: retriever and generator teach each other.
    `iterative`: train on the generator's own answers to questions without answers. `domain`: train on questions generated
    from passages of the corpus."""
    rounds: int = Field(2, gt=0, le=10)
    """`joint` and `iterative`: maximum number of rounds. Tuning stops earlier after a round without improvement."""
    in_loop: bool = False
    """`joint`: train both models at once on one loss (`training.objective=joint`) instead of one after the other."""
    components: tuple[Component, ...] = Field(("generator", "retriever"), min_length=1)
    """Models to tune."""
    reindex: bool = False
    """Also train the encoder of passages and rebuild the index with it. Otherwise only the encoder of queries is trained
    and the index stays valid: cheaper on a large corpus, but less effective on documents without training questions."""
    retriever_learning_rate: float = Field(0.0, ge=0)
    """Peak learning rate of the retriever. 0: the default of its objective, see `training.learning_rate`."""
    confidence: float = Field(0.9, gt=0, lt=1)
    """Confidence level of the interval around the gain of a round."""
    margin: float = Field(0.02, ge=0, lt=1)
    """Accept a round only if its score is higher and the interval of its gain excludes a loss greater than this."""
    max_cosine_rise: float = Field(0.15, ge=0)
    """`tune.reindex`: reject an encoder that raises the mean cosine of random pairs of passages by more than this."""
    probe_path: str = ""
    """Questions with answers on topics outside the corpus. A generator that answers them significantly worse,
    without passages, is rejected. Empty: no such check."""
    retriever_probe_path: str = ""
    """Questions on the corpus, unlike those trained on, with qrels or answers. A retriever that ranks their
    passages significantly worse is rejected. Empty: no such check."""
    success_score: float = Field(0.5, gt=0, le=1)
    """`staged`: an answer with at least this `compare.metric` counts as a success."""
    success_share: float = Field(0.4, ge=0, lt=1)
    """`staged`: share of successes among the training questions, to preserve what works. 0: failures alone."""
    deep_hits: int = Field(100, gt=0)
    """`staged`: number of hits among which to look for the passage that retrieval missed."""
    min_examples: int = Field(8, gt=0)
    """Leave a model as it is if it has fewer training questions than this."""
    candidates: int = Field(8, ge=2)
    """Passages per question that the generator scores as a teacher."""
    samples: int = Field(3, ge=0)
    """`iterative`: additional sampled answers per question, compared with the first answer. 0: none."""
    sample_temperature: float = Field(0.7, gt=0)
    """`iterative`: sampling temperature of the additional answers."""
    min_precision: float = Field(0.8, ge=0, lt=1)
    """`iterative`, and `domain` with `tune.questions_path`: train only on answers at least as confident as
    validation answers of which this share was right (token F1 of 0.6 or more). 0: any confidence."""
    min_agreement: float = Field(0.6, ge=0, le=1)
    """`iterative`: share of the sampled answers that must agree with an answer (token F1 of 0.6 or more)."""
    round_trip_score: float = Field(0.8, ge=0, le=1)
    """`iterative` and `domain`: required token F1 between an answer and the answer given from its cited passage alone."""
    pseudo_share: float = Field(0.5, gt=0, lt=1)
    """`iterative`: maximum share of pseudo-labelled questions in training; the others have gold answers."""
    questions_path: str = ""
    """`iterative`: questions without answers; empty: those of the training split. `domain`: your questions on the
    corpus; empty: they are generated."""
    question_model: str = ""
    """`domain`: model that writes the questions and their answers, named as in generator.model. Empty: generator.model."""
    passages: int = Field(200, gt=0)
    """`domain`: number of passages to generate questions from."""
    round_trip_hits: int = Field(10, gt=0)
    """`domain`: drop a generated question unless this many hits include its document."""

    @model_validator(mode="after")
    def _in_loop_tunes_both_and_keeps_the_index(self) -> Self:
        if self.in_loop and (self.mode != "joint" or self.reindex or len(set(self.components)) < 2):
            raise ValueError(
                "tune.in_loop needs tune.mode=joint, both tune.components and tune.reindex=false: one loss trains generator "
                "and encoder of queries against an unchanged index"
            )
        return self
