"""Settings of `cluster`: how much of a Ray cluster is used."""

from __future__ import annotations

from pydantic import Field

from ragtune_ray.config.section import Section


class Cluster(Section):
    """How much of a Ray cluster is used."""

    address: str = ""
    """Address of a running Ray cluster. Empty: RAY_ADDRESS if it is set, otherwise this machine, where small inputs are
    indexed without Ray. `local`: Ray on this machine, even for small inputs."""
    encoder_workers: int = Field(0, ge=0)
    """Maximum number of encoder actors. 0: on a cluster as many as have work and room, also on nodes that join; on this machine
    one per CPU core, or one per GPU if there are any."""
    generator_workers: int = Field(0, ge=0)
    """Maximum number of generator actors. 0: like `encoder_workers`."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs per encoder or generator actor; may be a fraction. 0: CPU only."""
    memory_per_worker_bytes: int = Field(0, ge=0)
    """Memory that Ray reserves per actor, in bytes. 0: no reservation."""
    shard_bytes: int = Field(8 * 2**30, gt=0)
    """Maximum bytes of the index that a process opens to find hits, for any command or the endpoint. A larger index is searched
    in shards."""
    worker_variables: tuple[str, ...] = ()
    """Names of environment variables that workers of a cluster get from this machine, such as the one of an API key. Whoever may
    see the cluster's dashboard can read them. Without effect if Ray starts here."""
