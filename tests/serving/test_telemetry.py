"""The metrics, and the dashboard that shows them."""

import json
import re
from pathlib import Path

from ragtune_ray.serving.telemetry import Telemetry

ROOT = Path(__file__).parents[2]


def test_every_metric_on_the_dashboard_exists() -> None:
    text = Telemetry().text((), ()).decode()
    offered = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    offered |= {f"{name}_bucket" for name in offered}
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    drawn = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ragtune_\w+", target["expr"])
    }
    assert len(drawn) > 12
    assert drawn <= offered


def test_counts_of_several_processes_are_added() -> None:
    one, other = Telemetry(), Telemetry()
    one.requests.labels("/a", "200").inc(2)
    other.requests.labels("/a", "200").inc(3)
    other.requests.labels("/b", "429").inc()
    one.seconds.labels("/a").observe(0.02)
    other.seconds.labels("/a").observe(0.2)
    text = one.text(({"index_version": "1", "refused": None},), (), [other.counted()]).decode()
    lines = text.splitlines()
    assert 'ragtune_requests_total{route="/a",status="200"} 5.0' in lines
    assert 'ragtune_requests_total{route="/b",status="429"} 1.0' in lines
    assert 'ragtune_request_seconds_bucket{le="0.025",route="/a"} 1.0' in lines
    assert 'ragtune_request_seconds_count{route="/a"} 2.0' in lines
    assert 'ragtune_copies{deployment="retriever"} 1.0' in lines
    assert len(lines) == len(set(lines)), "no sample appears twice"
