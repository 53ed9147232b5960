"""Citation metrics of one answer, by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ragtune_ray.evaluation.metrics.errors import MetricError
from ragtune_ray.evaluation.metrics.retrieval import relevant_only
from ragtune_ray.schema import Citation


def citation_precision(citations: Sequence[Citation], qrels: Mapping[str, float]) -> float:
    """Share of the documents cited by one answer that are relevant, which means a relevance above 0 in `qrels`.

    Raises:
        MetricError: nothing is cited or nothing is relevant, so the share is undefined.

    >>> citation_precision([Citation("a#0", "a", 0, 9), Citation("b#0", "b", 0, 9)], {"a": 1})
    0.5
    """
    cited = {citation.document_id for citation in citations}
    if not cited:
        raise MetricError("the answer cites nothing; its citation precision is undefined")
    return len(cited & _relevant_ids(qrels)) / len(cited)


def citation_recall(citations: Sequence[Citation], qrels: Mapping[str, float]) -> float:
    """Share of the relevant documents that are cited; 0 without citations. Arguments as for `citation_precision`.

    Raises:
        MetricError: nothing is relevant, so the share is undefined.

    >>> citation_recall([Citation("a#0", "a", 0, 9)], {"a": 1, "b": 2, "c": 0})
    0.5
    """
    relevant = _relevant_ids(qrels)
    return len(relevant & {citation.document_id for citation in citations}) / len(relevant)


def _relevant_ids(qrels: Mapping[str, float]) -> set[str]:
    relevant = set(relevant_only(qrels))
    if not relevant:
        raise MetricError(f"no relevance above 0 among {len(qrels)} qrels; citations of such a query are not scored")
    return relevant
