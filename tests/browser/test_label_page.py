"""The labelling page in a real browser: graded with the keyboard, undone, skipped, resumed; readable; closed to other pages."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray.evaluation.labelling import labels
from ragtune_ray.evaluation.labelling.desk import Desk
from ragtune_ray.evaluation.labelling.drawing import Item, Source
from ragtune_ray.serving.local.label import app
from tests.support.browsers import TOO_FAINT, chromium, needs_chromium, text_of, wait
from tests.support.gateways import InThread

pytestmark = [pytest.mark.browser, needs_chromium]

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
ITEMS = [
    Item("q1", "Who walked first?", ("Neil Armstrong", "Armstrong"), ("Armstrong did.", "嫦娥 " * 40)),
    Item("q2", f"What is {HOSTILE}?", None, (HOSTILE, "")),
    Item("q3", "And then?", (), ("I do not know.",), (("user", "Who walked first?"), ("assistant", "Armstrong."))),
]


def sources(query_id: str) -> list[Source]:
    return (
        []
        if query_id == "q3"
        else [Source("Apollo 11", "a.md", "The Eagle landed. " * 40), Source("", HOSTILE, HOSTILE)]
    )


@pytest.fixture
def serve() -> Iterator[Callable[[Desk], str]]:
    started: list[InThread] = []

    def start(desk: Desk) -> str:
        started.append(InThread(app.build_app(desk)))
        return started[-1].address

    yield start
    for served in started:
        served.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = chromium()
    yield driver
    driver.quit()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(ITEMS, sources, tmp_path / "labels.jsonl", "ann")


def press(browser: Any, keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(keys).perform()


def shows(browser: Any, query: str) -> None:
    wait(lambda: query in text_of(browser, "query"), f"the question {query}")


def graded(desk: Desk) -> list[tuple[str, str, float]]:
    return [(row.query_id, row.answer, row.grade) for row in labels.read(str(desk.path)).rows]


def test_answers_are_graded_with_the_keyboard_undone_skipped_and_resumed(
    browser: Any, serve: Callable[[Desk], str], desk: Desk
) -> None:
    address = serve(desk)
    browser.get(address)
    shows(browser, "Who walked first?")
    assert "Gold answer: Neil Armstrong, or Armstrong" in text_of(browser, "golds")
    press(browser, "3\n")
    assert graded(desk) == [], "the second answer has no grade yet"
    press(browser, "7\n")
    shows(browser, "What is")
    assert [grade for _, _, grade in graded(desk)] == [1.0, 0.0]
    assert text_of(browser, "state") == "1 of 3 labelled by ann"
    press(browser, "u")
    shows(browser, "Who walked first?")
    checked = browser.find_elements("css selector", "#answers input:checked")
    assert [each.get_attribute("value") for each in checked] == ["1", "0"], "the grades given before"
    press(browser, "8\n")
    shows(browser, "What is")
    assert labels.read(str(desk.path)).grades() == {ITEMS[0].keys[0]: 1.0, ITEMS[0].keys[1]: 0.5}
    press(browser, "s")
    shows(browser, "And then?")
    assert text_of(browser, "history").split("\n") == ["user: Who walked first?", "assistant: Armstrong."]
    press(browser, "78")
    assert not browser.find_element("id", "next").is_enabled(), "there is no second answer to grade"
    press(browser, "3\n")
    wait(lambda: text_of(browser, "end-title") == "1 left", "the end")
    assert str(desk.path) in text_of(browser, "end-text")
    browser.get(serve(Desk(ITEMS, sources, desk.path, "ann")))
    shows(browser, "What is")
    browser.find_elements("css selector", ".grades label")[1].click()
    browser.find_elements("css selector", ".grades label")[5].click()
    browser.find_element("id", "next").click()
    wait(lambda: text_of(browser, "end-title") == "All are labelled", "the end")
    assert graded(desk)[-2:] == [("q2", HOSTILE, 0.5), ("q2", "", 1.0)]


def test_texts_are_never_markup_and_nothing_is_loaded_from_elsewhere(
    browser: Any, serve: Callable[[Desk], str], desk: Desk
) -> None:
    browser.get_log("performance")
    browser.get(serve(desk))
    shows(browser, "Who walked first?")
    press(browser, "s")
    shows(browser, "What is")
    assert browser.title == "ragtune: label answers"
    assert not browser.find_elements("css selector", "main img, main script")
    assert HOSTILE in browser.find_element("css selector", "#answers .answer").text
    assert "No gold answer is known" in text_of(browser, "golds")
    assert browser.find_element("css selector", "#sources p").is_displayed(), "then the sources are open"
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(browser.current_url) for url in asked)


def test_a_page_of_another_origin_cannot_post_labels(browser: Any, serve: Callable[[Desk], str], desk: Desk) -> None:
    address = serve(desk)
    browser.get(serve(Desk([], sources, desk.path, "other")))  # another port is another origin
    wait(lambda: text_of(browser, "end-title") == "All are labelled", "the other page")
    attempt = """
    const [url, type, item, done] = arguments;
    fetch(url + 'label', {method: 'POST', mode: type === 'text/plain' ? 'no-cors' : 'cors', headers: {'Content-Type': type},
      body: JSON.stringify({place: 0, item, grades: [1, 1]})}).then(() => done('sent'), () => done('refused'));
    """
    item = ITEMS[0].digest
    assert browser.execute_async_script(attempt, address, "application/json", item) == "refused"
    # Plain text is sent without asking, and refused by its type.
    browser.execute_async_script(attempt, address, "text/plain", item)
    assert graded(desk) == []
    browser.get(address)
    shows(browser, "Who walked first?")
    own = attempt.replace("url + 'label'", "'/label'")
    assert browser.execute_async_script(own, address, "application/json", item) == "sent", "the attempt itself is right"
    wait(lambda: len(graded(desk)) == 2, "the label of the own page")


def test_an_ended_command_is_an_error_on_the_page(browser: Any, desk: Desk) -> None:
    served = InThread(app.build_app(desk))
    browser.get(served.address)
    shows(browser, "Who walked first?")
    served.stop()
    press(browser, "37\n")
    wait(lambda: "Start it again" in text_of(browser, "error"), "the error is shown")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_readable(
    browser: Any, serve: Callable[[Desk], str], desk: Desk, theme: str, width: int, tmp_path: Path
) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get_log("browser")
    browser.get(serve(desk))
    shows(browser, "Who walked first?")
    press(browser, "3")
    browser.save_screenshot(str(tmp_path / f"label-{theme}-{width}.png"))
    assert browser.execute_script(TOO_FAINT) == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    unnamed = "return [...document.querySelectorAll('input')].filter(node => !node.labels.length).length"
    assert browser.execute_script(unnamed) == 0
    assert browser.get_log("browser") == []
