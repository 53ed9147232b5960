"""Settings of `serving`: the HTTP endpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ragtune_ray.config.section import Section

RetrievalUse = Literal["always", "auto"]


class Replicas(Section):
    """Number and resources of the replicas of one Serve deployment."""

    min_replicas: int = Field(1, ge=0)
    """Minimum number of replicas. Only the generator may use 0: the first question then waits until it is loaded."""
    max_replicas: int = Field(1, ge=1)
    """Maximum number of replicas."""
    target_ongoing_requests: float = Field(8.0, gt=0)
    """Concurrent requests per replica that autoscaling aims for."""
    upscale_delay_seconds: float = Field(5.0, ge=0)
    """Seconds of sustained load before a replica is added."""
    downscale_delay_seconds: float = Field(300.0, ge=0)
    """Seconds of sustained low load before a replica is removed."""
    max_ongoing_requests: int = Field(16, gt=0)
    """Maximum number of concurrent requests per replica. Further requests wait outside it and survive its loss."""
    max_queued_requests: int = Field(64, ge=0)
    """Maximum number of waiting requests. Further requests are refused with status 429 and Retry-After. 0: none may wait."""
    num_cpus: float = Field(1.0, ge=0)
    """CPU cores that Ray reserves per replica."""
    num_threads: int = Field(0, ge=0)
    """Threads per replica. 0: one per reserved core, at least one; for the generator, all cores of its machine divided by
    max_replicas. On a cluster shared with other work, set a number and reserve that many cores."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs per replica. 0: CPU only."""
    memory_bytes: int = Field(0, ge=0)
    """Memory that Ray reserves per replica, in bytes. 0: no reservation."""
    max_replicas_per_node: int = Field(0, ge=0, le=100)
    """Maximum number of replicas on one machine. 1: losing a machine loses at most one of them. Replicas beyond this number
    wait for another machine. 0: no limit."""

    @model_validator(mode="after")
    def _replicas_are_ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is more than max_replicas ({self.max_replicas})")
        return self


class RetrieverReplicas(Replicas):
    """Number and resources of the retriever's replicas, and of those of each shard if the index is divided."""

    shards: int = Field(0, ge=0)
    """Number of processes that the index is divided among, each with its own segments; replicas and resources are those of
    each shard. 1: every replica opens the whole index. 0: as many as `cluster.shard_bytes` demands when the endpoint
    starts."""


class Serve(Section):
    """The HTTP endpoint, `ragtune serve`."""

    host: str = "127.0.0.1"
    """Address to listen on. Any address other than this machine's own (127.0.0.1) requires API keys."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on. 0: any free port."""
    keys_path: str = ""
    """YAML file of API keys (format: docs/serving.md), read when a replica of the ingress starts. Empty: no file."""
    keys_env: str = "RAGTUNE_API_KEYS"
    """Environment variable with API keys, separated by commas. They have no admin rights: they can
    neither change documents nor read /metrics."""
    allowed_hosts: tuple[Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9._:-]+$")], ...] = ()
    """Names that requests may be addressed to, in lower case and without a port, such as rag.example.com or *.example.com;
    localhost always is. Empty: any name if there are API keys, otherwise only localhost."""
    allowed_origins: tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/?#\s]+)$")], ...] = ()
    """Origins whose web pages may use the endpoint (CORS), such as https://chat.example.com; *: all. Empty: only its own
    page."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Maximum seconds from a request to the end of its answer. A request may ask for less."""
    grace_seconds: float = Field(30.0, ge=0)
    """Seconds that running requests may take to finish when a replica or the endpoint stops."""
    poll_seconds: float = Field(1.0, gt=0)
    """Seconds between checks for a new index version or tuned model."""
    max_body_bytes: int = Field(512 * 1024, gt=0)
    """Maximum size of a request body, in bytes, except for embeddings and requests that change documents."""
    max_embeddings_bytes: int = Field(4 * 2**20, gt=0)
    """Maximum size of the body of a request for embeddings, in bytes."""
    max_document_bytes: int = Field(8 * 2**20, gt=0)
    """Maximum size of the body of a request that changes documents, in bytes."""
    max_messages: int = Field(512, gt=0)
    """Maximum number of messages in a conversation."""
    max_conversation_characters: int = Field(100_000, gt=0)
    """Maximum length of all messages of a conversation together, in characters."""
    max_question_characters: int = Field(8000, gt=0)
    """Maximum length of a question, of all system messages together, or of a text to embed, in characters."""
    max_texts: int = Field(2048, gt=0)
    """Maximum number of texts per request for embeddings."""
    max_answers: int = Field(8, gt=0)
    """Maximum number of answers that a request may draw (`n`)."""
    max_top_k: int = Field(50, gt=0)
    """Maximum number of hits a request may ask for."""
    max_new_tokens: int = Field(512, gt=0)
    """Maximum answer length, in tokens; a request for more gets this many. The default is generator.max_new_tokens."""
    retrieval: RetrievalUse = "always"
    """`always`: retrieve for every question. `auto`: answer without passages first, and retrieve only if the generator's
    confidence is below the threshold found by `ragtune calibrate`. A request may choose either."""
    adapter_arms: tuple[Literal["ft", "rag+ft"], ...] = ()
    """With answer.arm `base` or `rag`: tuned arms that the same replicas also serve, if they were trained with
    training.lora_rank. A request selects one as its model."""
    link_hosts: tuple[str, ...] = ()
    """Hosts to which answers may link. All other links, and all images, are removed."""
    ingress: Replicas = Replicas(
        num_cpus=0, target_ongoing_requests=64, max_ongoing_requests=512, max_queued_requests=128
    )
    """HTTP: API keys, limits, streams."""
    retriever: RetrieverReplicas = RetrieverReplicas(
        num_cpus=0.5, target_ongoing_requests=8, max_ongoing_requests=32, max_queued_requests=128
    )
    """Encoder and index."""
    generator: Replicas = Replicas(target_ongoing_requests=8)
    """The language model. `max_ongoing_requests` is the size of its batch; a quarter as many may wait in the replica."""

    @field_validator("ingress", "retriever", "generator", mode="before")
    @classmethod
    def _keep_the_defaults_of_the_deployment(cls, given: Any, about: ValidationInfo) -> Any:
        if not isinstance(given, dict):
            return given
        return {**cls.model_fields[str(about.field_name)].default.model_dump(), **given}

    @model_validator(mode="after")
    def _only_the_generator_may_scale_to_zero(self) -> Self:
        if len(set(self.adapter_arms)) < len(self.adapter_arms):
            raise ValueError(f"serve.adapter_arms {self.adapter_arms}: each arm may be named only once")
        for name in ("ingress", "retriever"):
            if getattr(self, name).min_replicas < 1:
                raise ValueError(f"serve.{name}.min_replicas must be at least 1; only the generator may use 0")
        return self
