"""Settings of `serving`: the HTTP endpoint."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ragtune_ray.config.section import Section

__all__ = ["Replicas", "RetrievalUse", "Serve"]

RetrievalUse = Literal["always", "auto"]


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
