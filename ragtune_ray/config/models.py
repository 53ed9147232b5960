"""Settings of `models`: the encoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ragtune_ray.config.section import Section

Precision = Literal["auto", "float32", "bfloat16"]


class Encoder(Section):
    """The bi-encoder, which turns text into a unit vector."""

    model: str = "all-MiniLM-L6-v2"
    """Name of an embedded model, a directory, or a hub name (NAME@REVISION pins it). `hashing-384` needs no model:
    it hashes words into 384 dimensions, for tests and dry runs."""
    query_model: str = ""
    """Encoder of queries, if it is not `encoder.model`; both must use the same vector space.
    `training.objective=query_side` trains one. Empty: `encoder.model`."""
    query_prefix: str | None = None
    """Text put before every query, for models that expect one (E5: "query: "). null: the prompt for queries that the model
    brings, if any; "" for none."""
    passage_prefix: str | None = None
    """Text put before every passage, for models that expect one (E5: "passage: "). null: the prompt for documents that the
    model brings, if any; "" for none."""
    precision: Precision = "auto"
    """Number format of the computation. `auto`: bfloat16 if the hardware supports it, otherwise float32."""
    batch_tokens: int = Field(0, ge=0)
    """Tokens per forward pass, padding included. 0: 2,048 on a CPU, 65,536 on a GPU."""
    unit_passages: int = Field(256, gt=0)
    """Passages that are embedded together, sorted by length; more of them suit a GPU."""
