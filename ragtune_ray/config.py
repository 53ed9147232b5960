"""The typed settings tree: defaults < YAML file < `section.field=value` arguments.

In: a YAML file and dotted overrides. Out: one frozen `Config`, every field checked. This module knows nothing of models, Ray
or files other than the YAML file, and importing it loads neither torch nor Ray.

The string under a field is its documentation; `describe` prints all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from ragtune_ray import RagtuneError

__all__ = [
    "Config",
    "ConfigError",
    "describe",
    "is_mode",
    "is_tuned",
    "load",
    "retrieves",
]

Mode = Literal["staged", "joint", "iterative", "domain"]
Arm = Literal["base", "rag", "ft", "rag+ft", "staged", "joint", "iterative", "domain"]
Component = Literal["generator", "retriever"]
Objective = Literal["sft", "contrastive", "distillation", "query_side", "joint"]
RetrievalMode = Literal["dense", "lexical", "hybrid"]
RetrievalUse = Literal["always", "auto"]
IndexKind = Literal["auto", "flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"]
Precision = Literal["auto", "float32", "bfloat16"]
SplitName = Literal["all", "train", "validation", "test"]


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


class ConfigError(RagtuneError, ValueError):
    """The configuration is wrong; the message names the field, the value and the rule."""


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, coerce_numbers_to_str=True
    )


class Corpus(Section):
    """Where documents come from."""

    path: str = ""
    """A folder of .md .txt .html .pdf .docx, a .jsonl or .parquet file, a BEIR folder, or SQuAD JSON; local or s3://."""
    strict: bool = False
    """Stop at the first bad row or file instead of writing it to rejects.jsonl and going on."""
    max_document_bytes: int = Field(32 * 2**20, gt=0)
    """A document (or a line of a .jsonl file) longer than this is rejected."""
    unit_bytes: int = Field(4 * 2**20, gt=0)
    """Input bytes that one reading task takes; larger files are read in ranges of about this size."""


class Queries(Section):
    """Where questions come from."""

    path: str = ""
    """A .jsonl or .parquet file, a BEIR folder, or SQuAD JSON; local or s3://."""
    split: SplitName = "all"
    """Which queries to use, by their `split` column (BEIR: the qrels file of that name)."""
    split_by: Literal["given", "document", "folder"] = "given"
    """`given`: queries say their split. `document`: drawn so that no document serves two splits. `folder`: nor does a folder of
    documents (what stands before the last / of their ids; in SQuAD, an article)."""
    split_shares: tuple[float, float, float] = (4, 1, 1)
    """Relative sizes of train, validation and test where they are drawn: the chance of a document (or folder) to fall there."""
    split_seed: int = 0
    """Which splits are drawn; apart from `seed`, so that runs with several seeds are examined on the same queries. A small corpus
    may fall unevenly: then take another."""
    limit: int = Field(0, ge=0)
    """Use only the first so many queries; 0 means all of them."""

    @model_validator(mode="after")
    def _shares_are_shares(self) -> Self:
        if min(self.split_shares) < 0 or not sum(self.split_shares):
            raise ValueError(f"queries.split_shares {self.split_shares}: none may be negative and one must be positive")
        return self


class Chunking(Section):
    """How documents are cut into passages."""

    size_tokens: int = Field(256, ge=8)
    """Longest passage, in tokens of the encoder (special tokens included)."""
    overlap_tokens: int = Field(32, ge=0)
    """Tokens that neighbouring passages of a document share, at most."""

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if self.overlap_tokens * 2 > self.size_tokens:
            raise ValueError(
                f"chunking.overlap_tokens ({self.overlap_tokens}) must be at most half of "
                f"chunking.size_tokens ({self.size_tokens})"
            )
        return self


class Encoder(Section):
    """The bi-encoder: text to unit vector."""

    model: str = "all-MiniLM-L6-v2"
    """An embedded model's name, a directory, a hub name (NAME@REVISION pins it), or `hashing-384`: none, for dry runs."""
    query_model: str = ""
    """Encodes queries in place of `model`, into the same space: what `training.objective=query_side` makes. Empty: `model`."""
    query_prefix: str = ""
    """Put before every query (E5 wants "query: ")."""
    passage_prefix: str = ""
    """Put before every passage (E5 wants "passage: ")."""
    precision: Precision = "auto"
    """`auto`: bfloat16 where the hardware computes in it, else float32."""
    batch_tokens: int = Field(0, ge=0)
    """Padded tokens per forward pass; 0 means 2,048 on a CPU (what its cache holds) and 65,536 on a GPU."""
    unit_passages: int = Field(256, gt=0)
    """Passages per unit of work: what a killed worker costs at most, and what is sorted by length together."""


class Index(Section):
    """The searchable whole."""

    kind: IndexKind = "auto"
    """FAISS structure; `auto`: exact (flat) up to 100,000 vectors of 384 dimensions, beyond that inverted lists of 8-bit codes
    (ivf_sq), or of product-quantised codes (ivf_pq) where the former exceed `memory_bytes`; both are re-scored exactly."""
    memory_bytes: int = Field(8 * 2**30, gt=0)
    """Memory that what is searched of the vectors may take, for `auto` to choose by."""
    target_recall: float = Field(0.95, gt=0, le=1)
    """Share of the true ten nearest vectors that an approximate index must find; how much it looks at is calibrated to it."""
    segment_passages: int = Field(250_000, gt=0)
    """Passages per segment: the parallel, immutable piece of an index."""
    compact_segments: int = Field(8, ge=2)
    """More small segments than this, left by upserts, are merged at the end of the next upsert or index."""
    compact_deleted_share: float = Field(0.2, gt=0, le=1)
    """A segment of which more than this share is deleted is rewritten without it at the same occasion."""
    tenant_field: str = ""
    """Metadata field that says whose a document is; with it, every retrieval must name a `retrieval.tenant`."""
    language: Literal["en", "none"] = "en"
    """Stop words and stemming of the lexical index; `none` for neither. Unspaced scripts are always cut into bigrams."""


class Retrieval(Section):
    """How hits are found."""

    mode: RetrievalMode = "hybrid"
    """Dense vectors, BM25, or both fused by reciprocal rank."""
    top_k: int = Field(5, gt=0)
    """Hits per query, and passages per prompt."""
    candidates: int = Field(50, gt=0)
    """Hits taken from each of dense and lexical before they are fused or reranked."""
    fusion_constant: float = Field(5.0, ge=0)
    """The k of reciprocal-rank fusion, 1 / (k + rank)."""
    reranker: str = ""
    """A cross-encoder (directory or hub name) that re-scores the candidates; empty means none."""
    filter: dict[str, Any] = {}
    """Conditions on documents' metadata, all of which must hold: `{product: pump, year: {gte: 2020}, language: [de, en]}`."""
    tenant: str = ""
    """Find only documents of this tenant; wanted where `index.tenant_field` is set."""


class Prompt(Section):
    """What the generator is shown."""

    system: str = (
        "Answer the question with a short phrase from the passages and cite the passage like [1]. "
        "If the passages do not hold the answer, say: I don't know."
    )
    """The instruction when passages are shown."""
    system_without_passages: str = "Answer the question with a short phrase. If you do not know, say: I don't know."
    """The instruction in the base arm."""
    max_tokens: int = Field(1536, ge=64)
    """Longest prompt, in tokens of the generator; passages are shortened or dropped to fit, the question never is."""


class Generator(Section):
    """The causal language model."""

    model: str = "SmolLM2-135M-Instruct"
    """An embedded model's name, a directory or a hub name; with engine `openai`, the server's name for it."""
    engine: Literal["transformers", "openai"] = "transformers"
    """Generate in this process, or ask any OpenAI-compatible server (vLLM, Ray Serve LLM)."""
    precision: Precision = "auto"
    """`auto`: bfloat16 where the hardware computes in it, else float32."""
    max_new_tokens: int = Field(48, gt=0)
    """Longest answer, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends (they are not part of it)."""
    batch_tokens: int = Field(32768, gt=0)
    """Prompt and answer tokens of one batch, padding included; their keys and values are what memory must hold."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """engine `openai`: where the server listens."""
    api_key_env: str = "OPENAI_API_KEY"
    """engine `openai`: the environment variable that holds the key; the key itself never stands in a config."""
    concurrency: int = Field(16, gt=0)
    """engine `openai`: requests under way at once, per worker."""
    timeout_seconds: float = Field(60.0, gt=0)
    """engine `openai`: longest wait for one request."""
    max_attempts: int = Field(5, gt=0)
    """engine `openai`: tries per request, with exponential back-off between them."""


class Answer(Section):
    """Bulk answering."""

    arm: Arm = "rag"
    """`rag` shows the generator the retrieved passages, `base` does not; `ft` and `rag+ft`: the same with the generator that
    `ragtune train` last made for them; a mode's name: rag with the retriever and generator that `ragtune tune` made in it."""
    gold_passage: bool = False
    """Show the passage that holds the answer in place of what is retrieved: how far the generator alone comes. Queries without
    such a passage fail."""
    closed_book: bool = False
    """Show no passages, though the arm retrieves: what its generator knows by itself."""
    reading: Literal["together", "apart"] = "together"
    """`together`: all retrieved passages stand in one prompt. `apart`: each in a prompt of its own, and the likeliest of the
    answers is given, as in RAG-Sequence (Lewis et al. 2020). That takes retrieval.top_k times the work, and suits a small
    generator that was tuned on one passage a prompt (training.passages=1)."""
    rank_weight: float = Field(1.5, ge=0)
    """reading `apart`: how much retrieval's order counts beside how likely the generator finds an answer: the passage of rank r
    counts as 1 / r ** rank_weight. 0: not at all. Choose it on validation questions."""
    unit_queries: int = Field(32, gt=0)
    """Queries per unit of work: what a killed worker costs at most."""
    max_failed_share: float = Field(0.5, ge=0, le=1)
    """The job ends as failed when more than this share of its rows has status `failed`."""

    @property
    def shows_passages(self) -> bool:
        """Whether the generator is shown passages."""
        return retrieves(self.arm) and not self.closed_book

    @model_validator(mode="after")
    def _arm_shows_passages(self) -> Self:
        if self.closed_book and self.gold_passage:
            raise ValueError("answer.closed_book shows no passage and answer.gold_passage one; give one of them")
        if self.gold_passage and not retrieves(self.arm):
            raise ValueError(
                f"answer.gold_passage shows a passage, and answer.arm={self.arm} shows none; use rag or rag+ft"
            )
        return self


class Training(Section):
    """Fine-tuning of the generator or of the retriever."""

    objective: Objective = "sft"
    """`sft`: the generator learns answers. The retriever: `contrastive` (positives against negatives), `distillation` (a
    teacher's ranking), `query_side` (contrastive, but only queries are encoded anew: the index stays as it is). Both at once:
    `joint` (the likelihood of the answer, summed over the passages that may be found, of which the retriever says how likely each
    is; only queries are encoded anew)."""
    arm: Literal["ft", "rag+ft"] = "rag+ft"
    """`sft`: whether the examples show the question alone (ft) or with passages (rag+ft)."""
    name: str = ""
    """Names the result in `models/`; empty: the arm, or `retriever`, or `both`. The arms ft and rag+ft answer with the models of
    their own names; one of another name is used by naming its directory in generator.model or encoder.model."""
    epochs: int = Field(1, gt=0)
    """Passes over the examples."""
    max_steps: int = Field(0, ge=0)
    """Stop after so many optimiser steps; 0: all epochs. Warm-up and decay fit the steps that are made."""
    batch_examples: int = Field(16, gt=0)
    """Examples per optimiser step, over all workers."""
    micro_batch_tokens: int = Field(2048, gt=0)
    """Padded tokens that a worker takes through the model at once; a step's gradient is accumulated over them."""
    max_tokens: int = Field(1024, ge=32)
    """`sft` and `joint`: longest prompt and answer together; passages are shortened or dropped to fit, the answer never is."""
    learning_rate: float = Field(0.0, ge=0)
    """0: 5e-5 for the generator (2e-4 with LoRA), 3e-5 for the retriever and for both at once."""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; then it falls as a cosine."""
    weight_decay: float = Field(0.01, ge=0)
    """Of matrices; biases and norms have none (AdamW)."""
    clip_norm: float = Field(1.0, gt=0)
    """Longest gradient."""
    precision: Precision = "auto"
    """What matrices are multiplied in; learnt weights stay in float32. `auto`: bfloat16 where the hardware has it."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    lora_rank: int = Field(0, ge=0)
    """`sft`: learn adapters of this rank on all linear layers instead of all weights; 0: all weights."""
    lora_alpha: float = Field(32.0, gt=0)
    """Scale of the adapters, divided by their rank."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`fsdp`: weights and optimiser state are spread over the workers, for generators (`sft`) that do not fit one GPU."""
    workers: int = Field(1, gt=0)
    """Fewest training workers."""
    max_workers: int = Field(0, ge=0)
    """Most of them, where the cluster has room; 0: exactly `workers`."""
    max_failures: int = Field(3, ge=0)
    """So often a lost worker is replaced and the run goes on from its last checkpoint."""
    checkpoint_steps: int = Field(100, gt=0)
    """Steps between checkpoints: what a killed run costs at most."""
    evaluate_steps: int = Field(100, gt=0)
    """Steps between evaluations on validation examples; the best weights are kept."""
    validation_examples: int = Field(256, gt=0)
    """Most validation examples, drawn by the seed."""
    passages: int = Field(0, ge=0)
    """`sft`, rag+ft: passages per example; 0: retrieval.top_k."""
    distractors: Literal["query", "passage"] = "query"
    """`sft`, rag+ft: what the other passages of an example are retrieved for. `query`: its question, as in answering. `passage`:
    the passage that holds the answer, so that all questions about it show the same passages, which are then read once."""
    gold_left_out_share: float = Field(0.1, ge=0, le=1)
    """`sft`, rag+ft: share of examples without the passage that holds the answer (RAFT, Zhang et al. 2024)."""
    abstain_share: float = Field(0.5, ge=0, le=1)
    """... of which so many are to be answered with `abstention`."""
    abstention: str = Field("I don't know.", min_length=1)
    """What to say when the passages do not hold the answer."""
    cite: bool = True
    """`sft`, rag+ft: answers end with the number of the passage they rest on, such as [2]."""
    replay_path: str = ""
    """`sft`: other questions with answers (as queries.path), mixed in without passages against forgetting."""
    replay_share: float = Field(0.1, ge=0, lt=1)
    """Share of the examples that are replay, where there is a `replay_path`."""
    hard_negatives: int = Field(4, ge=0)
    """Retriever: passages per example that were found but do not answer. `joint`: candidates beside the first."""
    negative_depth: int = Field(50, gt=0)
    """Retriever: hits that hard negatives are taken from."""
    negative_margin: float = Field(0.05, ge=0, lt=1)
    """Retriever: a hit scoring above (1 - margin) of the positive may be a false negative and is left out (Moreira 2024)."""
    temperature: float = Field(0.05, gt=0)
    """Retriever: divides the cosines of the model that learns."""
    teacher: Literal["retrieval", "generator"] = "retrieval"
    """Whose scores are taught. `retrieval` (`distillation` only): the reranker's or, without one, those that the hits came with.
    `generator` (also `query_side`): by how much a passage raises the likelihood of the answer; no qrels are needed, and a
    reranker is mixed in."""
    teacher_temperature: float = Field(0.3, gt=0)
    """Divides the teacher's scores: those of retrieval are scaled to 0..1 per query, the generator's are nats per token."""
    contrastive_weight: float = Field(0.1, ge=0)
    """Of the contrastive term beside the teacher's."""

    @property
    def learns_from_generator(self) -> bool:
        """Whether the generator scores the passages that the retriever learns from."""
        return self.teacher == "generator" and self.objective in ("distillation", "query_side")

    @property
    def trains_generator(self) -> bool:
        """Whether the weights of the generator move."""
        return self.objective in ("sft", "joint")

    @property
    def keeps_index(self) -> bool:
        """Whether the retriever learns, but passages stay as they are encoded in the index."""
        return self.objective in ("query_side", "joint")

    @model_validator(mode="after")
    def _workers_are_ordered(self) -> Self:
        if self.max_workers and self.max_workers < self.workers:
            raise ValueError(
                f"training.max_workers ({self.max_workers}) is less than training.workers ({self.workers})"
            )
        if self.teacher == "generator" and self.objective == "contrastive":
            raise ValueError(
                "training.teacher=generator teaches training.objective distillation or query_side, not contrastive"
            )
        if self.lora_rank and not self.trains_generator:
            raise ValueError(
                "training.lora_rank: adapters are for objectives sft and joint; the retriever is trained whole"
            )
        return self


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


class Evaluate(Section):
    """Scoring."""

    arms: tuple[Arm, ...] = Field(("base", "rag"), min_length=1)
    """Which arms answer the queries; the first is what the others are compared with."""
    cutoffs: tuple[int, ...] = Field((1, 3, 5, 10), min_length=1)
    """The k of recall@k, MRR@k and nDCG@k."""
    depth: int = Field(20, gt=0)
    """Hits per query in the run of `retrieve` (at least retrieval.top_k); answers always see top_k."""
    resamples: int = Field(10_000, ge=100)
    """Bootstrap resamples behind every interval."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Coverage of the intervals."""
    language: Literal["en", "zh"] = "en"
    """How EM and token F1 cut an answer: SQuAD words, or characters for Chinese."""


class Compare(Section):
    """Choosing an arm by measurement, on `queries`; where an arm is tuned, on their test split if no other is named."""

    arms: tuple[Arm, ...] = Field(("base", "rag", "ft", "rag+ft"), min_length=1)
    """Which arms stand for choice; tuned ones are trained first where no tuned model stands in models/. The name of a mode of
    `ragtune tune` is an arm too."""
    metric: Literal["EM", "token_F1", "contains_answer"] = "token_F1"
    """What quality means here."""
    margin: float = Field(0.02, ge=0, lt=1)
    """An arm that is worse than the best by no more than this is as good: then the cheapest is taken."""
    answers: int = Field(10_000, gt=0)
    """How many answers indexing and training are spread over when costs are compared."""
    latency_queries: int = Field(20, gt=0)
    """Queries that each arm answers one at a time, to measure how long an answer takes."""
    gold_passages: bool = True
    """Also let the generators answer from the passage that holds the answer: how far reading alone would come."""
    max_p95_seconds: float = Field(0.0, ge=0)
    """Constraint: 95 of 100 answers take no longer; 0: none."""
    max_cost_per_1000: float = Field(0.0, ge=0)
    """Constraint: of a thousand answers, indexing and training spread over `answers`; in prices.currency, or in seconds where
    prices are not known. 0: none."""
    max_visible_seconds: float = Field(0.0, ge=0)
    """Constraint: a changed document shows in answers after so long, with all training that this takes; 0: none."""
    min_cited_share: float = Field(0.0, ge=0, le=1)
    """Constraint: so many of the answers name a passage; 0: none."""
    changes_path: str = ""
    """Documents that changed (as corpus.path may be): upserted in a copy of the index, to see what each arm makes of them."""
    deleted: tuple[str, ...] = ()
    """Ids of documents that went."""
    changed_queries_path: str = ""
    """Questions about what changed, with the new answers."""
    probe_path: str = ""
    """Questions with answers that training never saw, on other things than the corpus: what tuned generators forget."""
    num_examples: int = Field(8, ge=0)
    """Questions whose answers stand side by side in the report."""

    @model_validator(mode="after")
    def _changes_are_whole(self) -> Self:
        if bool(self.changes_path or self.deleted) != bool(self.changed_queries_path):
            raise ValueError(
                "compare.changed_queries_path and what changed (compare.changes_path or compare.deleted) go together: "
                "give both or neither"
            )
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"compare.arms names an arm twice: {', '.join(self.arms)}")
        return self


class Cluster(Section):
    """How much of a Ray cluster is used."""

    address: str = ""
    """Address of a running cluster; empty means RAY_ADDRESS if set, else Ray on this machine."""
    encoder_workers: int = Field(0, ge=0)
    """Most encoder actors; 0 means one per core (or per GPU where there are any)."""
    generator_workers: int = Field(0, ge=0)
    """Most generator actors; 0 means one per core (or per GPU where there are any)."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs that each encoder or generator actor holds; 0 means CPU only."""
    memory_per_worker_bytes: int = Field(0, ge=0)
    """Memory that Ray reserves per actor; 0 means no reservation."""
    shard_bytes: int = Field(8 * 2**30, gt=0)
    """Most bytes of an index that one process of `retrieve` opens; a larger index is searched in shards, and merged."""


class Replicas(Section):
    """How many copies of one deployment of the endpoint there are, and what each takes on."""

    min_replicas: int = Field(1, ge=0)
    """Fewest copies. The generator may go down to 0; its first question then waits until it is loaded."""
    max_replicas: int = Field(1, ge=1)
    """Most copies."""
    target_ongoing_requests: float = Field(8.0, gt=0)
    """Requests under way per copy that autoscaling aims at."""
    upscale_delay_seconds: float = Field(5.0, ge=0)
    """So long the load must ask for more copies before one is added."""
    downscale_delay_seconds: float = Field(300.0, ge=0)
    """So long the load must ask for fewer copies before one is taken away."""
    max_ongoing_requests: int = Field(16, gt=0)
    """Most requests in one copy at once; the others wait outside it, where the loss of the copy does not touch them."""
    max_queued_requests: int = Field(64, ge=0)
    """Most requests that wait for a copy; one more is refused with 429 and Retry-After."""
    num_cpus: float = Field(1.0, ge=0)
    """Cores that Ray reserves per copy."""
    num_threads: int = Field(0, ge=0)
    """Threads that a copy computes with; 0: one per reserved core, at least one, and for the generator all cores of its machine,
    shared by max_replicas. On a cluster that does other work besides, give a number and reserve as many."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs per copy."""
    memory_bytes: int = Field(0, ge=0)
    """Memory that Ray reserves per copy; 0 means no reservation."""

    @model_validator(mode="after")
    def _replicas_are_ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is more than max_replicas ({self.max_replicas})")
        return self


class Serve(Section):
    """The endpoint: `ragtune serve`."""

    host: str = "127.0.0.1"
    """Where it listens; another than this machine is refused without API keys."""
    port: int = Field(8000, ge=0, le=65535)
    """Its port; 0 takes a free one."""
    keys_path: str = ""
    """A YAML file of API keys, as ragtune_ray/serving/api_keys.py describes it. Read when a copy of the ingress starts."""
    keys_env: str = "RAGTUNE_API_KEYS"
    """The environment variable that holds API keys, separated by commas; each may do all but change documents."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Longest time from a request to the end of its answer; a request may ask for less."""
    grace_seconds: float = Field(30.0, ge=0)
    """How long requests under way may go on when a copy or the endpoint is stopped."""
    poll_seconds: float = Field(1.0, gt=0)
    """How often copies look for a new index version or tuned model."""
    max_body_bytes: int = Field(256 * 1024, gt=0)
    """Longest body of a request; documents excepted."""
    max_document_bytes: int = Field(8 * 2**20, gt=0)
    """Longest body of a request that changes documents."""
    max_messages: int = Field(64, gt=0)
    """Most messages of a conversation."""
    max_question_characters: int = Field(8000, gt=0)
    """Longest question, and longest text to embed."""
    max_texts: int = Field(64, gt=0)
    """Most texts of one request for embeddings."""
    max_top_k: int = Field(50, gt=0)
    """Most hits that a request may ask for."""
    max_new_tokens: int = Field(512, gt=0)
    """Longest answer that a request may ask for; without asking it is generator.max_new_tokens."""
    retrieval: RetrievalUse = "always"
    """`auto`: a question is first answered closed-book, and retrieved for only where the generator is less sure than
    `ragtune calibrate` found to be enough. A request may ask for either."""
    adapter_arms: tuple[Literal["ft", "rag+ft"], ...] = ()
    """With answer.arm base or rag: tuned arms to be served beside it by the same copies, where they were trained with
    training.lora_rank; a request names one as its model."""
    link_hosts: tuple[str, ...] = ()
    """Hosts to which links in answers may stay; all others are taken out, images always."""
    ingress: Replicas = Replicas(
        num_cpus=0, target_ongoing_requests=64, max_ongoing_requests=512, max_queued_requests=128
    )
    """HTTP: keys, limits, streams."""
    retriever: Replicas = Replicas(
        num_cpus=0.5, target_ongoing_requests=8, max_ongoing_requests=32, max_queued_requests=128
    )
    """Encoder and index."""
    generator: Replicas = Replicas(target_ongoing_requests=8)
    """The language model; `max_ongoing_requests` is the size of its running batch, beside which a quarter as many wait."""

    @field_validator("ingress", "retriever", "generator", mode="before")
    @classmethod
    def _changes_are_to_its_own_defaults(cls, given: Any, about: ValidationInfo) -> Any:
        if not isinstance(given, dict):
            return given
        default = cls.model_fields[str(about.field_name)].default
        return {**default.model_dump(), **given}

    @model_validator(mode="after")
    def _only_the_generator_sleeps(self) -> Self:
        if len(set(self.adapter_arms)) < len(self.adapter_arms):
            raise ValueError(f"serve.adapter_arms {self.adapter_arms}: names an arm twice")
        for name in ("ingress", "retriever"):
            if getattr(self, name).min_replicas < 1:
                raise ValueError(f"serve.{name}.min_replicas must be at least 1; only the generator may go down to 0")
        return self


class Prices(Section):
    """What computing costs, for `plan` and `compare`; 0 means not known, and costs are then given in hours alone."""

    core_hour: float = Field(0.0, ge=0)
    """One CPU core for an hour."""
    gpu_hour: float = Field(0.0, ge=0)
    """One GPU for an hour."""
    gibibyte_month: float = Field(0.0, ge=0)
    """One GiB stored for a month."""
    currency: str = "USD"
    """In which the prices are."""


class Config(Section):
    """Everything a run depends on; the resolved tree stands in every manifest."""

    workspace: str = Field("workspace", min_length=1)
    """Where runs write: index/, models/ and runs/ below it; local or s3://."""
    seed: int = Field(0, ge=0)
    """Behind everything random."""
    corpus: Corpus = Corpus()
    queries: Queries = Queries()
    chunking: Chunking = Chunking()
    encoder: Encoder = Encoder()
    index: Index = Index()
    retrieval: Retrieval = Retrieval()
    prompt: Prompt = Prompt()
    generator: Generator = Generator()
    answer: Answer = Answer()
    training: Training = Training()
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()
    tune: Tune = Tune()
    cluster: Cluster = Cluster()
    serve: Serve = Serve()
    prices: Prices = Prices()

    @model_validator(mode="after")
    def _reading_apart_needs_probabilities(self) -> Self:
        if self.answer.reading == "apart" and self.generator.engine != "transformers":
            raise ValueError(
                f"answer.reading=apart weighs answers by their probabilities, which generator.engine={self.generator.engine} "
                "does not tell; use generator.engine=transformers or answer.reading=together"
            )
        return self

    def using(self, *overrides: str) -> Config:
        """A copy with `section.field=value` changed, checked again.

        >>> Config().using("retrieval.top_k=3").retrieval.top_k
        3
        """
        return _build(self.model_dump(mode="json"), overrides, source="overrides")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.field=value` overrides.

    Raises:
        ConfigError: the file is missing or no mapping, a key is unknown, or a value breaks its rule.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read ({error.strerror}); name a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, such as 2024-02-30
        raise ConfigError(f"config {path}: is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: must hold a mapping of sections, found {type(values).__name__}")
    return _build(values, overrides, source=str(path))


def describe() -> Iterator[tuple[str, str, str]]:
    """Every setting as (dotted name, default, meaning), in the order of the tree.

    >>> next(describe())[0]
    'workspace'
    """
    yield from _describe(Config(), "")


def _describe(section: BaseModel, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _describe(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value), field.description or ""


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _build(values: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    for override in overrides:
        _set(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, source) for item in error.errors())) from error


def _explain(item: Any, source: str) -> str:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _known_fields(item["loc"][:-1])
        return f"{source}: unknown setting {field!r}; known here: {', '.join(known)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
    return f"{source}: {field or 'config'}: {message}{given}"


def _known_fields(location: Sequence[Any]) -> list[str]:
    section: type[BaseModel] = Config
    for part in location:
        nested = _section_of(section.model_fields[str(part)])
        if nested is None:
            return []
        section = nested
    return list(section.model_fields)


def _set(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"override {override!r}: must read section.field=value")
    *sections, field = name.strip().split(".")
    for section in sections:
        child = values.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section!r} is not a section")
        values = child
    try:
        values[field] = yaml.safe_load(text) if text.strip() else ""
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from error
