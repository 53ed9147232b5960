"""The endpoint's metrics in Prometheus' format, with names `ragtune_*`.

No label contains a question, a document, a key or a tenant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

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

disable_created_metrics()  # type: ignore[no-untyped-call]  # creation times are useless here and double the text
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Telemetry:
    """The metrics of one process."""

    def __init__(self) -> None:
        registry = self._counted = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ragtune_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"ragtune_{name}", text, labels, buckets=_SECONDS, registry=registry)

        self.requests = counter("requests", "Completed requests", "route", "status")
        self.refused = counter("refused", "Refused requests", "reason")
        self.cancelled = counter("cancelled", "Requests whose client disconnected")
        self.retries = counter("retries", "Calls retried after a replica died", "deployment")
        self.adaptive = counter("adaptive", "Questions with adaptive retrieval, by how they were answered", "path")
        self.running = Gauge("ragtune_requests_in_flight", "Requests in flight", registry=registry)
        self.seconds = histogram("request_seconds", "From a request to the end of its answer", "route")
        self.retrieval_seconds = histogram("retrieval_seconds", "Time to retrieve, including waiting")
        self.first_token_seconds = histogram("time_to_first_token_seconds", "From a request to the first text")
        self.generation_seconds = histogram("generation_seconds", "Time to generate, including waiting")
        self.prompt_tokens = counter("prompt_tokens", "Tokens in prompts")
        self.completion_tokens = counter("completion_tokens", "Generated tokens")
        self._state = CollectorRegistry()

        def gauge(name: str, text: str, label: str) -> Gauge:
            return Gauge(f"ragtune_{name}", text, [label], registry=self._state)

        self._replicas = gauge("copies", "Replicas that respond", "deployment")
        self._generating = gauge("generator_requests", "Requests in the generators", "state")
        self._version = gauge("index_version_info", "Replicas per index version", "version")
        self._model = gauge("model_info", "Replicas per model", "fingerprint")
        self._refusing = gauge("refused_versions", "Replicas that refused a published version or model", "kind")

    def counted(self) -> bytes:
        """The metrics that this process has counted."""
        return generate_latest(self._counted)

    def text(
        self,
        retrievers: Sequence[Mapping[str, Any]],
        generators: Sequence[Mapping[str, Any]],
        others: Sequence[bytes] = (),
    ) -> bytes:
        """All metrics: the state of each replica, and the counts of this and the `others` ingress processes, added up."""
        for deployment, replicas in (("retriever", retrievers), ("generator", generators)):
            self._replicas.labels(deployment).set(len(replicas))
            self._refusing.labels(deployment).set(sum(replica["refused"] is not None for replica in replicas))
        for state in ("running", "waiting"):
            self._generating.labels(state).set(sum(replica.get(state, 0) for replica in generators))
        for gauge, name, replicas in ((self._version, "index_version", retrievers), (self._model, "model", generators)):
            gauge.clear()
            for replica in replicas:
                gauge.labels(str(replica[name])).inc()
        counted = _summed([self.counted(), *others]) if others else self.counted()
        return counted + generate_latest(self._state)


_Samples: TypeAlias = dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]]
"""Metric -> (name of the sample, labels) -> value."""


def _summed(texts: Sequence[bytes]) -> bytes:
    """Add up the metrics of several processes, sample by sample."""
    families: dict[str, Metric] = {}
    sums: _Samples = {}
    for text in texts:
        for family in text_string_to_metric_families(text.decode()):
            families.setdefault(family.name, family)
            found = sums.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sample.labels.items()))
                found[key] = found.get(key, 0.0) + sample.value
    registry = CollectorRegistry()
    registry.register(_Precomputed(families, sums))
    return generate_latest(registry)


class _Precomputed(Collector):
    """A Prometheus collector of values that are already known."""

    def __init__(self, families: Mapping[str, Metric], sums: _Samples) -> None:
        self._families, self._sums = families, sums

    def collect(self) -> Iterator[Metric]:
        for name, family in self._families.items():
            metric = Metric(name, family.documentation, family.type)
            for (sample, labels), value in self._sums[name].items():
                metric.add_sample(sample, dict(labels), value)
            yield metric
