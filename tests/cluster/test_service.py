"""The endpoint on a local Ray, asked over HTTP."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ragtune_ray.cluster.corpus import build_index
from ragtune_ray.cluster.service import running

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]

QUESTION = "What is the code of vessel7?"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, settings_for, shared_ray: None) -> Iterator[Any]:
    workspace = tmp_path_factory.mktemp("workspace")
    settings = settings_for(workspace, "serve.port=0", "serve.poll_seconds=0.1", "serve.generator.num_cpus=0.5")
    build_index(settings)
    with running(settings) as address, httpx.Client(base_url=address, timeout=60) as http:
        yield http, settings


def test_x(endpoint) -> None:
    http, settings = endpoint
    print(http.get("/readyz").json())
    t = time.time()
    r = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": QUESTION}]})
    print(r.status_code, r.text[:1500], time.time() - t)
    r = http.post("/v1/retrieve", json={"query": QUESTION, "top_k": 1})
    print(r.text)
    r = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": QUESTION}], "stream": True})
    print(r.text[-1500:])
    r = http.post("/v1/documents", json={"documents": [{"document_id": "new", "text": "The code of vessel99 is secret99."}]})
    print(r.text)
    r = http.post("/v1/retrieve", json={"query": "What is the code of vessel99?", "top_k": 1})
    print(r.text)
    print(http.get("/metrics").text[:300])
    for i in range(30):
        t = time.perf_counter(); http.post("/v1/retrieve", json={"query": QUESTION, "top_k": 1}); print(round((time.perf_counter()-t)*1000,1), end=" ")
    assert 0
