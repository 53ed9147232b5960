"""Valid and invalid requests generated from the endpoint's own schema: none causes a 5xx or a malformed error."""

import itertools
import time

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis import GenerationMode

from tests.support.gateways import SECRETS, FakeBackend, Served, keys

pytestmark = pytest.mark.slow

SECONDS = 120
"""Minimum duration; the last round over all operations is always finished."""


def _missed_own_deadline(case: schemathesis.Case, reply: schemathesis.Response) -> bool:
    """Whether the request set such a short deadline that 504 is correct."""
    seconds = case.body.get("timeout_seconds") if isinstance(case.body, dict) else None
    return reply.status_code == 504 and isinstance(seconds, int | float) and seconds < 1


def test_no_request_generated_from_the_schema_breaks_the_endpoint() -> None:
    served = Served(FakeBackend(), keys())
    described = requests.get(f"{served.address}/openapi.json", timeout=10).json()
    schema = schemathesis.openapi.from_dict(described)
    asked: dict[int, int] = {}
    headers = {"Authorization": f"Bearer {SECRETS['admin']}"}
    until = time.monotonic() + SECONDS
    for seed in itertools.count():
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if mode is GenerationMode.NEGATIVE and not operation.body:
                    continue

                @hypothesis.seed(seed)
                @hypothesis.settings(
                    max_examples=25, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
                )
                @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
                def ask(case) -> None:
                    reply = case.call(base_url=served.address, headers=headers)
                    asked[reply.status_code] = asked.get(reply.status_code, 0) + 1
                    assert reply.status_code < 500 or _missed_own_deadline(case, reply), (case.body, reply.text)
                    if reply.status_code >= 400 and case.method != "HEAD" and case.path != "/mcp":  # JSON-RPC there
                        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

                ask()
        if time.monotonic() > until:
            break
    assert requests.get(f"{served.address}/healthz", timeout=10).status_code == 200
    served.stop()
    assert asked[200] > 50, asked
    assert asked[400] > 50, asked
