"""The OpenAI client against a scripted HTTP server, and once against a real one."""

import itertools
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ragtune_ray.generation.interface import GeneratorError
from ragtune_ray.generation.openai_client import OpenAIGenerator
from tests.support.openai_server import SECRET, Server, prompts_of, transformers_server

NOW = {"Retry-After-Ms": "1"}  # so that tests do not wait for the backoff


def test_answers_are_in_the_order_of_the_prompts(server: Server, connect: Callable[..., OpenAIGenerator]) -> None:
    questions = [f"q{n}" for n in range(20)]
    made = connect(concurrency=4).generate(prompts_of(*questions), max_new_tokens=9, stop=["x"], seed=3)
    assert [one.text for one in made] == [question.upper() for question in questions]
    assert (made[0].prompt_tokens, made[0].completion_tokens, made[0].finish) == (7, 3, "length")
    assert server.keys == {f"Bearer {SECRET}"}
    sent = server.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "S"}
    assert (sent["model"], sent["max_tokens"], sent["stop"], sent["seed"], sent["temperature"]) == (
        "a-model", 9, ["x"], 3, 0.0,
    )  # fmt: skip


def test_options_of_sampling_are_sent_only_if_they_change_something(
    server: Server, connect: Callable[..., OpenAIGenerator]
) -> None:
    neutral = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    changed = {"top_p": 0.9, "presence_penalty": -0.5, "frequency_penalty": 0.5}
    for options in (neutral, changed):
        connect().generate(prompts_of("q"), max_new_tokens=9, **options)
    before, after = server.requests
    assert after == before | changed
    assert not set(neutral) & set(before)


def test_concurrency_limits_the_requests_in_flight(server: Server, connect: Callable[..., OpenAIGenerator]) -> None:
    server.barrier = threading.Barrier(3)  # replies are sent when three requests are in flight; fewer would hang
    connect(concurrency=3).generate(prompts_of(*"abcdefghi"), max_new_tokens=9)
    assert server.most_active == 3


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_temporary_failures_are_retried(server: Server, connect: Callable[..., OpenAIGenerator], status: int) -> None:
    server.scripts["q"] = [(status, NOW, "{}"), (status, NOW, "{}"), "fine"]
    (made,) = connect().generate(prompts_of("q"), max_new_tokens=9)
    assert (made.text, made.error) == ("fine", "")
    assert len(server.requests) == 3


def test_the_servers_retry_after_is_respected(server: Server, connect: Callable[..., OpenAIGenerator]) -> None:
    server.scripts["q"] = [(429, {"Retry-After": "1"}, "{}"), "fine"]
    (made,) = connect().generate(prompts_of("q"), max_new_tokens=9)
    assert made.text == "fine"
    assert made.seconds >= 1.0  # the SDK's own first backoff is at most half a second


def test_a_failed_request_is_an_error_row_among_good_ones(
    server: Server, connect: Callable[..., OpenAIGenerator]
) -> None:
    server.scripts |= {
        "down": [(500, NOW, '{"error": {"message": "broken"}}')],
        "wrong": [(400, {}, '{"error": {"message": "no such field"}}')],
        "malformed": [(200, {}, '{"choices": [')],
        "shapeless": [(200, {}, '{"surprise": 1}')],
        "null": [(200, {}, "null")],
        "list": [(200, {}, "[]")],
        "empty choice": [(200, {}, '{"choices": [{}]}')],
    }
    bad = list(server.scripts)
    made = connect().generate(prompts_of("good", *bad, "fine"), max_new_tokens=9)
    assert [one.text for one in made] == ["GOOD", *[""] * len(bad), "FINE"]
    assert all(one.error for one in made[1:-1])
    assert not made[0].error
    assert "status 500" in made[1].error
    assert "broken" in made[1].error
    assert "status 400" in made[2].error
    assert sum(request["messages"][1]["content"] == "down" for request in server.requests) == 3
    assert sum(request["messages"][1]["content"] == "wrong" for request in server.requests) == 1


def test_a_timeout_is_an_error_row(server: Server, connect: Callable[..., OpenAIGenerator]) -> None:
    server.scripts["slow"] = ["hang"]
    slow, quick = connect(timeout_seconds=0.3, max_attempts=1).generate(prompts_of("slow", "quick"), max_new_tokens=9)
    assert "Timeout" in slow.error
    assert quick.text == "QUICK"


def test_a_refused_connection_is_an_error_row() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nobody = OpenAIGenerator(f"http://127.0.0.1:{port}/v1", "m", api_key_env="RAGTUNE_NO_KEY", max_attempts=1)
    (made,) = nobody.generate(prompts_of("q"), max_new_tokens=9)
    assert "Connection" in made.error
    assert str(port) in made.error


def test_a_stream_yields_the_servers_pieces(server: Server, connect: Callable[..., OpenAIGenerator]) -> None:
    server.scripts["q"] = ["abc"]
    stream = connect().stream(prompts_of("q")[0], max_new_tokens=9)
    assert list(itertools.islice(stream, 3)) == ["a", "b", "c"]
    with pytest.raises(StopIteration) as end:
        next(stream)
    assert end.value.value == "length"


def test_a_failed_stream_raises_the_servers_message(server: Server, connect: Callable[..., OpenAIGenerator]) -> None:
    server.scripts["q"] = [(404, {}, '{"error": {"message": "no such model"}}')]
    with pytest.raises(GeneratorError, match=r"status 404.*no such model"):
        list(connect().stream(prompts_of("q")[0], max_new_tokens=9))


def test_the_api_key_appears_in_no_error_and_no_log(
    server: Server, connect: Callable[..., OpenAIGenerator], caplog: pytest.LogCaptureFixture
) -> None:
    echo = json.dumps({"error": {"message": f"Incorrect API key provided: {SECRET}"}})
    server.scripts["q"] = [(401, {}, echo)]
    client = connect()
    with caplog.at_level(logging.DEBUG):
        (made,) = client.generate(prompts_of("q"), max_new_tokens=9)
        with pytest.raises(GeneratorError) as raised:
            list(client.stream(prompts_of("q")[0], max_new_tokens=9))
    assert "status 401" in made.error
    assert "***" in made.error
    for text in (made.error, str(raised.value), repr(client), caplog.text):
        assert SECRET not in text
    assert raised.value.__cause__ is None


def test_a_missing_key_is_accepted_only_for_loopback_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAGTUNE_NO_KEY", raising=False)
    for url in ("http://127.0.0.1:1/v1", "http://localhost:1/v1", "http://[::1]:1/v1"):
        OpenAIGenerator(url, "m", api_key_env="RAGTUNE_NO_KEY")
    for url in ("https://api.example.com/v1", "http://10.0.0.1/v1", "http://127.0.0.1.example.com/v1"):
        with pytest.raises(GeneratorError, match=r"RAGTUNE_NO_KEY is not set.*export RAGTUNE_NO_KEY"):
            OpenAIGenerator(url, "m", api_key_env="RAGTUNE_NO_KEY")


def test_a_missing_package_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(GeneratorError, match=r"run: .*pip install 'openai>=2'"):
        OpenAIGenerator("http://127.0.0.1:1/v1", "m")


def test_unsupported_calls_are_refused(connect: Callable[..., OpenAIGenerator]) -> None:
    with pytest.raises(GeneratorError, match="engine=openai"):
        connect().log_likelihood(prompts_of("q"), ["a"])
    with pytest.raises(GeneratorError, match=r"generator.stop: 5"):
        connect().generate(prompts_of("q"), max_new_tokens=9, stop=list("abcde"))


def test_tokens_are_estimated_and_rendering_joins_contents(connect: Callable[..., OpenAIGenerator]) -> None:
    client = connect()
    assert client.count_tokens(["", "a", "abcd", "月球"]) == [0, 1, 2, 2]
    assert client.render((("system", "S"), ("user", "U"))) == "S\nU"


@pytest.mark.slow
def test_a_real_server_answers(tmp_path: Path) -> None:
    from tests.support.models import save_model, save_tokenizer

    save_tokenizer(tmp_path)
    save_model(tmp_path)
    with transformers_server(tmp_path, tmp_path / "server.log") as url:
        client = OpenAIGenerator(url, str(tmp_path), api_key_env="RAGTUNE_NO_KEY", timeout_seconds=60)
        made = client.generate(prompts_of("Hello", "Where?"), max_new_tokens=8)
        assert [one.error for one in made] == ["", ""]
        assert all(one.text for one in made)
        assert "".join(client.stream(prompts_of("Hello")[0], max_new_tokens=8))
