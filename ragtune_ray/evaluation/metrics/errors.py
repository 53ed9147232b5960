"""The error of all metrics."""

from ragtune_ray import RagtuneError


class MetricError(RagtuneError, ValueError):
    """Records or values that cannot be scored; the message names them and the rule."""
