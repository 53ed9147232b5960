"""The old import path of the Serve application, kept for one release; use `ragtune_ray.cluster.serving.serve`."""

from ragtune_ray.cluster.serving.serve import application

__all__ = ["application"]
