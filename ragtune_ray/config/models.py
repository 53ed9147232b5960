"""Settings of `models`: the encoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ragtune_ray.config.section import Section

__all__ = ["Encoder", "Precision"]

Precision = Literal["auto", "float32", "bfloat16"]


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
