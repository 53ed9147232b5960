"""Settings of `cluster`: how much of a Ray cluster is used."""

from __future__ import annotations

from pydantic import Field

from ragtune_ray.config.section import Section

__all__ = ["Cluster"]


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
