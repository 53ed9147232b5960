"""Citation metrics of one answer."""

from __future__ import annotations

import pytest

from ragtune_ray.evaluation.metrics.citations import citation_precision, citation_recall
from ragtune_ray.evaluation.metrics.errors import MetricError


def test_undefined_citation_shares_are_refused() -> None:
    with pytest.raises(MetricError, match="cites nothing"):
        citation_precision([], {"a": 1})
    with pytest.raises(MetricError, match="no relevance above 0"):
        citation_recall([], {"a": 0})
