"""The review page in a real browser: a question is accepted with a key, the next one mended; texts add no markup."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray.evaluation.questions.writing.review import Desk
from ragtune_ray.serving.local.review import app
from tests.support.browsers import chromium, needs_chromium, wait
from tests.support.gateways import InThread

pytestmark = [pytest.mark.browser, needs_chromium]

HOSTILE = "<script>document.title='taken'</script>"
ROW: Any = {
    "query_id": "made-1", "text": "Which word opens the gate?", "answers": ["secret"], "document_ids": ["d"], "split": "test",
    "kind": "fact", "passage_ids": ["d#0"], "rank": 1, "generator": "m", "prompt_version": 1,
    "evidence": [{"passage_id": "d#0", "document_id": "d", "start": 0, "end": 6, "text": "secret"}],
}  # fmt: skip
PASSAGE = {
    "passage_id": "d#0",
    "document_id": "d",
    "title": HOSTILE,
    "text": f"secret {HOSTILE}",
    "start": 0,
    "end": 46,
}


@pytest.fixture
def browser() -> Iterator[Any]:
    driver = chromium()
    yield driver
    driver.quit()


def test_questions_are_accepted_and_mended_with_the_keyboard(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    path = tmp_path / "reviewed.jsonl"
    rows = [ROW, {**ROW, "query_id": "made-2", "text": f"What is {HOSTILE}?"}]
    served = InThread(app.build_app(Desk(rows, {"d#0": PASSAGE}, path, "Ada")))
    try:
        browser.get(served.address)

        def question() -> str:
            return str(browser.execute_script("return document.getElementById('question').value"))

        wait(lambda: question() == ROW["text"], "the first question")
        assert browser.execute_script("return document.querySelector('mark').textContent") == "secret"
        browser.execute_script("document.activeElement.blur()")
        ActionChains(browser).send_keys("a").perform()
        wait(lambda: HOSTILE in question(), "the second question")
        field = browser.find_element("id", "question")
        field.clear()
        field.send_keys("Which word opens it?")
        browser.find_element("id", "accept").click()
        wait(lambda: path.exists() and len(path.read_text().splitlines()) == 2, "both decisions")
        assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == [
            ROW["text"],
            "Which word opens it?",
        ]
        assert browser.title == "ragtune: review questions"
    finally:
        served.stop()


def test_a_command_that_has_ended_is_named(browser: Any, tmp_path: Path) -> None:
    served = InThread(app.build_app(Desk([ROW], {"d#0": PASSAGE}, tmp_path / "r.jsonl", "Ada")))
    browser.get(served.address)
    wait(lambda: browser.execute_script("return document.getElementById('question').value") != "", "the question")
    served.stop()
    browser.find_element("id", "accept").click()
    wait(lambda: "ragtune questions review has ended" in browser.find_element("tag name", "body").text, "the message")
