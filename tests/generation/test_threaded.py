"""One thread per request, with a scripted engine."""

import threading

import pytest

from ragtune_ray.generation.interface import GeneratorError, Prompt
from ragtune_ray.generation.request import Overloaded, RequestFailed
from ragtune_ray.generation.threaded import PassThroughGenerator

PROMPT = Prompt((("user", "x"),), (), 7)


class Slow:
    """Yields its pieces once `go` is set, and counts them."""

    def __init__(self, *pieces: str, finish: str = "stop") -> None:
        self.finish = finish
        self.pieces, self.go, self.given, self.ended = pieces, threading.Event(), 0, threading.Event()

    def count_tokens(self, texts):
        return [len(text.split()) for text in texts]

    def stream(self, prompt, **options):
        self.options = options
        try:
            for piece in self.pieces:
                assert self.go.wait(120)
                if piece == "!":
                    raise GeneratorError("the server is gone")
                if piece == "?":
                    raise TypeError("a reply of another form")
                self.given += 1
                yield piece
            return self.finish
        finally:
            self.ended.set()


def test_pieces_and_completion_are_those_of_the_engine() -> None:
    slow = Slow("a ", "b ", "c")
    slow.go.set()
    request = PassThroughGenerator(slow).submit(PROMPT, max_new_tokens=9)
    assert "".join(request.pieces()) == "a b c"
    completion = request.completion()
    assert (completion.text, completion.prompt_tokens, completion.completion_tokens) == ("a b c", 7, 3)
    assert completion.finish == "stop"
    # The finish reason is the engine's, not derived from the estimated number of tokens.
    assert PassThroughGenerator(slow).submit(PROMPT, max_new_tokens=3).completion().finish == "stop"
    slow.finish = "length"
    assert PassThroughGenerator(slow).submit(PROMPT, max_new_tokens=9).completion().finish == "length"


def test_the_engine_gets_all_options() -> None:
    slow = Slow("a")
    slow.go.set()
    options = {
        "max_new_tokens": 9,
        "temperature": 0.5,
        "stop": ("x",),
        "seed": 3,
        "top_p": 0.9,
        "presence_penalty": 1.0,
    }
    PassThroughGenerator(slow).submit(PROMPT, **options).completion()
    assert slow.options == options


def test_a_failing_engine_fails_the_request_with_its_message() -> None:
    slow = Slow("a", "!")
    slow.go.set()
    with pytest.raises(RequestFailed, match="the server is gone") as error:
        PassThroughGenerator(slow).submit(PROMPT, max_new_tokens=9).completion()
    assert error.value.reason == "failed"


def test_an_unexpected_error_fails_the_request_too() -> None:
    slow = Slow("a", "?")
    slow.go.set()
    with pytest.raises(RequestFailed, match="TypeError: a reply of another form"):
        PassThroughGenerator(slow).submit(PROMPT, max_new_tokens=9).completion()


def test_a_cancelled_request_returns_at_once_and_stops_the_engine() -> None:
    slow = Slow(*"abcdef")
    generator = PassThroughGenerator(slow)
    request = generator.submit(PROMPT, max_new_tokens=9)
    request.cancel()
    with pytest.raises(RequestFailed):
        request.completion()
    slow.go.set()
    assert slow.ended.wait(120)
    assert slow.given <= 1


def test_a_full_queue_refuses_requests() -> None:
    slow = Slow("a")
    generator = PassThroughGenerator(slow, max_running=2, max_waiting=1)
    requests = [generator.submit(PROMPT, max_new_tokens=9) for _ in range(3)]
    assert (generator.stats().running, generator.stats().waiting) == (2, 1)
    with pytest.raises(Overloaded):
        generator.submit(PROMPT, max_new_tokens=9)
    slow.go.set()
    assert [request.completion().text for request in requests] == ["a"] * 3
