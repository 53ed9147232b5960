"""Settings of `tuning`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ragtune_ray.config.arms import Mode
from ragtune_ray.config.section import Section

__all__ = ["Component", "Tune"]

Component = Literal["generator", "retriever"]


class Tune(Section):
    """Retriever and generator tuned together, in rounds; what scores higher on the validation split is taken over.

    Scores are `compare.metric` for the generator and MRR@10 for the retriever.
    """

    mode: Mode = "staged"
    """`staged`: tune what retrieval or reading fails at. `joint`: retriever and generator teach each other. `iterative`: learn
    from own answers to questions without answers. `domain`: learn from questions made of the corpus's own passages."""
    rounds: int = Field(2, gt=0, le=10)
    """Most rounds of `joint` and `iterative`; fewer where a round brings nothing."""
    in_loop: bool = False
    """`joint`: train both models at once on one loss (training.objective=joint) instead of one after the other in each round."""
    components: tuple[Component, ...] = Field(("generator", "retriever"), min_length=1)
    """What is tuned."""
    reindex: bool = False
    """Train the encoder of passages too, and index the corpus anew for it; else only queries are encoded anew, and the index
    stays: cheap on a large corpus, but it carries less over to documents that no question was learnt from."""
    retriever_learning_rate: float = Field(0.0, ge=0)
    """As training.learning_rate, for the retriever; 0: its objective's own."""
    confidence: float = Field(0.9, gt=0, lt=1)
    """Of the interval around a round's gain."""
    margin: float = Field(0.02, ge=0, lt=1)
    """A round is accepted that scores higher, and for which a loss of more than this lies outside the interval of its gain."""
    max_cosine_rise: float = Field(0.15, ge=0)
    """`reindex`: an encoder is refused whose passages lie closer together by more than this, in mean cosine of random pairs."""
    probe_path: str = ""
    """Questions with answers on other things than the corpus: a generator that is credibly worse at them, without passages, is
    refused."""
    retriever_probe_path: str = ""
    """Questions on the corpus of another kind than those learnt from, with judged documents or answers: a retriever that ranks
    what answers them credibly worse is refused."""
    success_score: float = Field(0.5, gt=0, le=1)
    """`staged`: answers with at least this `compare.metric` are successes."""
    success_share: float = Field(0.4, ge=0, lt=1)
    """`staged`: share of the training questions that are successes, mixed in so that what works is not forgotten."""
    deep_hits: int = Field(100, gt=0)
    """`staged`: hits among which the passage is looked for that should have been retrieved."""
    min_examples: int = Field(8, gt=0)
    """A component with fewer questions to learn from is left as it is."""
    candidates: int = Field(8, ge=2)
    """Passages per question that the generator, as a teacher, scores."""
    samples: int = Field(3, ge=0)
    """`iterative`: further answers, sampled, that an answer is held against; 0: none."""
    sample_temperature: float = Field(0.7, gt=0)
    """`iterative`: of those."""
    min_precision: float = Field(0.8, ge=0, lt=1)
    """`iterative`, and `domain` with questions of your own: an answer is learnt from only if the generator is as sure of it as of
    answers to validation questions of which this share were right (token F1 of .6 or more); 0: however sure it is."""
    min_agreement: float = Field(0.6, ge=0, le=1)
    """`iterative`: share of the samples that must say the same (token F1 of .6 or more)."""
    round_trip_score: float = Field(0.8, ge=0, le=1)
    """`iterative` and `domain`: token F1 of an answer with the one that is given from its cited passage alone."""
    pseudo_share: float = Field(0.5, gt=0, lt=1)
    """`iterative`: most of the training questions that may be pseudo-labelled; the others have gold answers."""
    questions_path: str = ""
    """`iterative`: questions without answers; empty: those of the training split. `domain`: your own questions on the corpus;
    empty: the generator makes them."""
    question_model: str = ""
    """`domain`: makes the questions and answers them, as generator.model names it; empty: that one."""
    passages: int = Field(200, gt=0)
    """`domain`: passages that questions are made of."""
    round_trip_hits: int = Field(10, gt=0)
    """`domain`: a made question must find its passage's document among so many hits."""

    @model_validator(mode="after")
    def _in_loop_tunes_both_and_keeps_the_index(self) -> Self:
        if self.in_loop and (self.mode != "joint" or self.reindex or len(set(self.components)) < 2):
            raise ValueError(
                "tune.in_loop: one loss trains generator and retriever against the index as it is; it needs tune.mode=joint, "
                "both tune.components and tune.reindex=false"
            )
        return self
