"""The web page in a real browser, over a fake backend: answers, errors, keys, keyboard and contrast."""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ragtune_ray import schema
from ragtune_ray.serving.api_keys import Keys
from ragtune_ray.serving.backend import Failed
from tests.support.browsers import TOO_FAINT, chromium, needs_chromium, text_of, wait
from tests.support.gateways import SECRETS, FakeBackend, Served, keys

pytestmark = [pytest.mark.browser, needs_chromium]

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    started: list[Served] = []

    def start(backend: FakeBackend, allowed: Keys | None = None) -> str:
        started.append(Served(backend, allowed or Keys([])))
        return started[-1].address

    yield start
    for served in started:
        served.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = chromium()
    yield driver
    driver.quit()


def ask(browser: Any, address: str, text: str = "What is the code of vessel0?") -> None:
    """Ask with the keyboard alone."""
    from selenium.webdriver.common.keys import Keys as Typed

    browser.get(address)
    wait(lambda: text_of(browser, "state") != "Connecting", "the page connects")
    browser.find_element("id", "question").send_keys(text, Typed.ENTER)


def follow_up(browser: Any, text: str) -> None:
    from selenium.webdriver.common.keys import Keys as Typed

    browser.find_element("id", "question").send_keys(text, Typed.ENTER)
    wait(lambda: text_of(browser, "asked") == text and text_of(browser, "state") == "Done", "the next answer")


def test_a_streamed_answer_shows_sources_with_the_cited_span(browser: Any, serve: Callable[..., str]) -> None:
    passage = schema.Passage("d0#0", "d0", "😀 Before. The code is secret0. After.", "Vessel 0", "{}", 100, 137)
    cited = schema.Citation("d0#0", "d0", 110, 130)

    class Citing(FakeBackend):
        async def retrieve(self, text, top_k, visible, seconds, parts=()):
            found = await super().retrieve(text, top_k, visible, seconds)
            return type(found)(found.index_version, (passage,), (0.5,), 0.0)

        def _finished(self, job):
            finished = super()._finished(job)
            return dataclasses.replace(finished, answer=dataclasses.replace(finished.answer, citations=(cited,)))

    citing = Citing()
    citing.raw = "嫦娥 It is secret0 [1]."
    ask(browser, serve(citing))
    wait(lambda: text_of(browser, "state") == "Done", "the answer is complete")
    assert text_of(browser, "answer") == "嫦娥 It is secret0."
    (mark,) = browser.find_elements("css selector", "#sources mark")
    assert mark.text == "The code is secret0."
    assert mark.is_displayed(), "a cited source is open"
    facts = text_of(browser, "facts")
    for part in ("rag", "000007", "Retrieval", "First token", "Generation"):
        assert part in facts
    assert browser.find_element("id", "answer").get_attribute("aria-busy") == "false"
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(browser.current_url) for url in asked), "no request goes to another origin"


def test_text_of_documents_is_never_markup(browser: Any, serve: Callable[..., str]) -> None:
    class Hostile(FakeBackend):
        async def retrieve(self, text, top_k, visible, seconds, parts=()):
            found = await super().retrieve(text, top_k, visible, seconds)
            passage = schema.Passage("d0#0", HOSTILE, HOSTILE, HOSTILE, "{}", 0, len(HOSTILE))
            return type(found)(found.index_version, (passage,), (0.5,), 0.0)

    backend = Hostile()
    backend.raw = f"{HOSTILE} 1 < 2 [1]"
    ask(browser, serve(backend))
    wait(lambda: text_of(browser, "state") == "Done", "the answer is complete")
    assert browser.title == "ragtune: ask your documents"
    assert not browser.find_elements("css selector", "#result img, #result script")
    assert HOSTILE in str(browser.find_element("css selector", "#sources details p").get_property("textContent"))
    assert "1 < 2" in text_of(browser, "answer")


def test_errors_are_shown_and_the_next_question_works(browser: Any, serve: Callable[..., str]) -> None:
    backend = FakeBackend()
    backend.failure = Failed(429, "too much at once", "overloaded", 3.0)
    ask(browser, serve(backend))
    wait(lambda: "too much at once" in text_of(browser, "error"), "the error is shown")
    assert "3 s" in text_of(browser, "error")
    assert browser.find_element("id", "error").get_attribute("role") == "alert"
    backend.fail_after = 2
    backend.failure = Failed(502, "it died", "replica_died")
    browser.find_element("id", "send").click()
    wait(lambda: "it died" in text_of(browser, "error"), "an error during a stream is shown")
    backend.failure = None
    browser.find_element("id", "send").click()
    wait(lambda: text_of(browser, "state") == "Done", "the next question is answered")
    assert text_of(browser, "error") == ""


def test_a_follow_up_question_sends_the_conversation(browser: Any, serve: Callable[..., str]) -> None:
    backend = FakeBackend()
    ask(browser, serve(backend), "What is the code of vessel0?")
    wait(lambda: text_of(browser, "state") == "Done", "the question is answered")
    assert text_of(browser, "question-label") == "Follow-up question"
    assert browser.find_element("id", "question").get_property("value") == ""
    follow_up(browser, "And of vessel1?")
    assert backend.asked[-1][1].history == (("user", "What is the code of vessel0?"), ("assistant", "It is secret0."))
    assert backend.asked[-1][1].question == "And of vessel1?"
    (turn,) = browser.find_elements("css selector", "#earlier article")
    assert turn.text.split("\n") == ["What is the code of vessel0?", "It is secret0.", "Sources (3)"]
    browser.find_element("id", "restart").click()
    assert not browser.find_element("id", "earlier").is_displayed()
    assert not browser.find_element("id", "result").is_displayed()
    assert text_of(browser, "question-label") == "Question"
    follow_up(browser, "Why?")
    assert backend.asked[-1][1].history == ()


def test_a_failed_question_can_be_asked_again_and_is_no_part_of_the_conversation(
    browser: Any, serve: Callable[..., str]
) -> None:
    backend = FakeBackend()
    backend.failure = Failed(502, "it died", "replica_died")
    ask(browser, serve(backend), "Why?")
    wait(lambda: text_of(browser, "state") == "Failed", "the failure is shown")
    assert browser.find_element("id", "question").get_property("value") == "Why?"
    backend.failure = None
    browser.find_element("id", "send").click()
    wait(lambda: text_of(browser, "state") == "Done", "the question is answered")
    assert backend.asked[-1][1].history == ()
    assert not browser.find_element("id", "earlier").is_displayed()


def test_the_page_asks_for_no_key_if_none_is_needed_and_shows_names(browser: Any, serve: Callable[..., str]) -> None:
    class Linked(FakeBackend):
        async def retrieve(self, text, top_k, visible, seconds, parts=()):
            found = await super().retrieve(text, top_k, visible, seconds)
            passages = [dataclasses.replace(each, metadata='{"url": "https://a.example/x"}') for each in found.passages]
            return type(found)(found.index_version, tuple(passages), found.scores, 0.0)

    ask(browser, serve(Linked()))
    wait(lambda: text_of(browser, "state") == "Done", "the question is answered")
    assert not browser.find_element("id", "key-row").is_displayed()
    assert "SmolLM2-135M-Instruct" in text_of(browser, "facts")
    options = [option.text for option in browser.find_elements("css selector", "#model option")]
    assert options == ["rag: with the documents", "base: the model alone"], "not the model that embeds"
    links = browser.find_elements("css selector", "#sources a")
    assert {(link.get_attribute("href"), link.get_attribute("rel")) for link in links} == {
        ("https://a.example/x", "noopener noreferrer")
    }


def test_stop_ends_the_stream_and_the_work_behind_it(browser: Any, serve: Callable[..., str]) -> None:
    backend = FakeBackend()
    backend.gate = asyncio.Event()  # never set, so the answer never arrives
    ask(browser, serve(backend))
    wait(lambda: browser.find_element("id", "result").is_displayed(), "the sources come first")
    browser.find_element("id", "stop").click()
    wait(lambda: text_of(browser, "state") == "Stopped", "the page stops")
    wait(lambda: backend.closed == 1, "the backend stops")


def test_a_required_key_is_requested_and_used(browser: Any, serve: Callable[..., str]) -> None:
    from selenium.webdriver.common.keys import Keys as Typed

    address = serve(FakeBackend(), keys())
    browser.get(address)
    wait(lambda: text_of(browser, "state") == "Enter an API key", "the page asks for a key")
    assert browser.find_element("id", "key").is_displayed()
    browser.find_element("id", "key").send_keys(SECRETS["user"], Typed.TAB)
    wait(lambda: text_of(browser, "state") == "Ready", "the key is accepted")
    browser.find_element("id", "question").send_keys("Who?", Typed.ENTER)
    wait(lambda: text_of(browser, "state") == "Done", "the question is answered")
    stored = browser.execute_script("return JSON.stringify([localStorage, sessionStorage, document.cookie])")
    assert SECRETS["user"] not in stored


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_is_readable_in_both_themes_and_all_widths(
    browser: Any, serve: Callable[..., str], theme: str, width: int
) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get_log("browser")  # discards the messages of earlier pages
    ask(browser, serve(FakeBackend()))
    wait(lambda: text_of(browser, "state") == "Done", "the question is answered")
    follow_up(browser, "And of vessel1?")
    assert browser.execute_script(TOO_FAINT) == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('input, textarea, select')].filter(node => !node.labels.length).length"
    )
    assert unnamed == 0
    assert browser.get_log("browser") == []
