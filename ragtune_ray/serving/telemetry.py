"""What the endpoint counts, in Prometheus' format, under the names `ragtune_*`.

In: what happens to requests. Out: the text of /metrics. No label holds a question, a document, a key or a tenant. This module
knows nothing of HTTP servers or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

__all__ = ["Telemetry"]

disable_created_metrics()  # type: ignore[no-untyped-call]  # when a series began says nothing here, and doubles the text
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Telemetry:
    """The meters of one process."""

    def __init__(self) -> None:
        registry = self._counting = CollectorRegistry()
        self.requests = Counter("ragtune_requests", "Requests that have ended", ["route", "status"], registry=registry)
        self.refused = Counter("ragtune_refused", "Requests that were refused", ["reason"], registry=registry)
        self.cancelled = Counter("ragtune_cancelled", "Requests whose client left", registry=registry)
        self.retries = Counter(
            "ragtune_retries", "Calls made again after a copy died", ["deployment"], registry=registry
        )
        self.adaptive = Counter(
            "ragtune_adaptive", "Adaptive questions by the way they were answered", ["path"], registry=registry
        )
        self.running = Gauge("ragtune_requests_in_flight", "Requests under way", registry=registry)
        self.seconds = Histogram(
            "ragtune_request_seconds",
            "From request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.retrieval_seconds = Histogram(
            "ragtune_retrieval_seconds", "Time to retrieve, waiting included", buckets=_SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "ragtune_time_to_first_token_seconds", "From request to the first text", buckets=_SECONDS, registry=registry
        )
        self.generation_seconds = Histogram(
            "ragtune_generation_seconds", "Time to generate, waiting included", buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("ragtune_prompt_tokens", "Tokens of prompts", registry=registry)
        self.completion_tokens = Counter("ragtune_completion_tokens", "Tokens generated", registry=registry)
        registry = self._asked = CollectorRegistry()
        self._copies = Gauge("ragtune_copies", "Copies that answer", ["deployment"], registry=registry)
        self._generating = Gauge(
            "ragtune_generator_requests", "Requests in the generators", ["state"], registry=registry
        )
        self._version = Gauge(
            "ragtune_index_version_info", "Copies that serve an index version", ["version"], registry=registry
        )
        self._model = Gauge("ragtune_model_info", "Copies that serve a model", ["fingerprint"], registry=registry)
        self._refused_copies = Gauge(
            "ragtune_refused_versions", "Copies that would not take what was published", ["kind"], registry=registry
        )

    def counted(self) -> bytes:
        """What this process has counted."""
        return generate_latest(self._counting)

    def text(
        self,
        retrievers: Sequence[Mapping[str, Any]],
        generators: Sequence[Mapping[str, Any]],
        others: Sequence[bytes] = (),
    ) -> bytes:
        """All meters.

        Args:
            retrievers: how these copies stand now.
            generators: how these copies stand now.
            others: what other processes that take requests have counted, to be added.
        """
        for deployment, copies in (("retriever", retrievers), ("generator", generators)):
            self._copies.labels(deployment).set(len(copies))
            self._refused_copies.labels(deployment).set(sum(copy["refused"] is not None for copy in copies))
        for state in ("running", "waiting"):
            self._generating.labels(state).set(sum(copy.get(state, 0) for copy in generators))
        for gauge, name, copies in (
            (self._version, "index_version", retrievers),
            (self._model, "model", generators),
        ):
            gauge.clear()
            for copy in copies:
                gauge.labels(str(copy[name])).inc()
        counted = _summed([self.counted(), *others]) if others else self.counted()
        return counted + generate_latest(self._asked)


def _summed(texts: Sequence[bytes]) -> bytes:
    """Several processes' meters as one's: every sample is the sum of those of its name and labels."""
    families: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text.decode()):
            families.setdefault(family.name, family)
            found = sums.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sample.labels.items()))
                found[key] = found.get(key, 0.0) + sample.value
    registry = CollectorRegistry()
    registry.register(_Given(families, sums))
    return generate_latest(registry)


class _Given(Collector):
    """Metrics that are known already."""

    def __init__(
        self,
        families: Mapping[str, Metric],
        sums: Mapping[str, Mapping[tuple[str, tuple[tuple[str, str], ...]], float]],
    ) -> None:
        self._families, self._sums = families, sums

    def collect(self) -> Iterator[Metric]:
        for name, family in self._families.items():
            made = Metric(name, family.documentation, family.type)
            for (sample, labels), value in self._sums[name].items():
                made.add_sample(sample, dict(labels), value)
            yield made
