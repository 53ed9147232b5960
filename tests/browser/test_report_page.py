"""The report in a real browser: it loads nothing, runs nothing, does not overflow, and is readable."""

import base64
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray.evaluation.report import html_page
from tests.support.comparisons import comparison, contested, half_failed, hostile, one_question

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"),
]

ALL = [comparison, contested, half_failed, hostile, one_question]
WIDTHS, THEMES = (400, 1400), ("light", "dark")

# Text whose contrast with what lies behind it is too low (WCAG 2.2, 1.4.3: 4.5 to 1 for text of ordinary size).
TOO_FAINT = """
const channel = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const luminance = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const parse = text => text.match(/[\\d.]+/g).map(Number);
const behind = node => {
  if (node.matches('.count')) return parse(getComputedStyle(node.previousElementSibling).fill);
  for (; node; node = node.parentElement) {
    const color = parse(getComputedStyle(node).backgroundColor);
    if (!(node instanceof SVGElement) && (color.length < 4 || color[3] > 0)) return color;
  }
  throw new Error('nothing behind');
};
const found = [];
for (const node of document.body.querySelectorAll('*')) {
  const own = [...node.childNodes].some(each => each.nodeType === 3 && each.data.trim());
  if (!own || !node.checkVisibility() || node.closest('svg title, svg desc')) continue;
  const style = getComputedStyle(node);
  const [a, b] = [parse(node instanceof SVGElement ? style.fill : style.color), behind(node)].map(luminance);
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) found.push([contrast, node.outerHTML.slice(0, 120)]);
}
return found;
"""

# Boxes that stick out of the page and lie in no box that scrolls.
STICKING_OUT = """
return [...document.body.querySelectorAll('*')]
  .filter(node => node.checkVisibility() && !node.closest('.scroll, pre, svg'))
  .filter(node => { const box = node.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth; })
  .map(node => node.outerHTML.slice(0, 120));
"""

# Texts of plots that cover each other or are cut off by the edge of the page.
COVERED = """
const found = [];
for (const svg of document.querySelectorAll('svg.plot')) {
  const texts = [...svg.querySelectorAll('text')].map(node => [node.textContent, node.getBoundingClientRect()]);
  texts.forEach(([a, p], n) => {
    if (p.left < 0 || p.right > innerWidth) found.push([a, 'cut off']);
    for (const [b, q] of texts.slice(n + 1)) {
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (wide > 1 && high > 3) found.push([a, b]);
    }
  });
}
return found;
"""

Open = Callable[[str], str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that records what it says and asks for."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Open:
    """Write a page, open it, and give its address."""

    def open_(text: str) -> str:
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        logged(browser)
        browser.get(path.as_uri())
        return path.as_uri()

    return open_


def logged(browser: Any) -> tuple[list[str], list[str]]:
    """What the console said, and which addresses were asked for, since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [entry["message"] for entry in browser.get_log("browser")], asked


def show(browser: Any, width: int, theme: str, media: str = "screen") -> None:
    """Size of the window and what it pretends to be."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [feature]})


def test_page_loads_nothing_and_logs_no_error(browser: Any, opened: Open) -> None:
    for make in ALL:
        address = opened(html_page.render(make()))
        assert browser.find_element("css selector", "h1").text == make()["verdict"]["headline"]
        for each in browser.find_elements("css selector", "details:not([open]) > summary"):
            browser.execute_script("arguments[0].click()", each)
        console, asked = logged(browser)
        assert console == []
        assert asked == [address]


def test_policy_blocks_injected_markup(browser: Any, opened: Open) -> None:
    page = html_page.render(comparison())
    markup = (
        "<script>document.title = 'taken'</script><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw=' onload='document.title=1'>"
        "<img src='http://127.0.0.1:9/x'><iframe src='http://127.0.0.1:9/y'></iframe><style>h1 { display: none }</style>"
        "<h2 style='display: none' id='hidden'>x</h2><link rel='stylesheet' href='http://127.0.0.1:9/z'>"
    )
    opened(page.replace("<main>", f"<main>{markup}"))
    console, _ = logged(browser)
    assert browser.title.startswith("Use rag+ft")
    assert browser.find_element("css selector", "h1").is_displayed()
    assert browser.find_element("id", "hidden").is_displayed()
    assert len([line for line in console if "Content Security Policy" in line]) >= 7
    assert not [line for line in console if "ERR_CONNECTION" in line], "no request was even tried"


@pytest.mark.parametrize("make", ALL)
def test_page_is_readable_at_both_widths_and_themes(browser: Any, opened: Open, make: Any, tmp_path: Path) -> None:
    opened(html_page.render(make()))
    papers = set()
    for width, theme in itertools.product(WIDTHS, THEMES):
        show(browser, width, theme)
        scroll, client = browser.execute_script(
            "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]"
        )
        assert scroll <= client == width
        assert browser.execute_script(STICKING_OUT) == []
        assert browser.execute_script(COVERED) == []
        assert browser.execute_script(TOO_FAINT) == []
        first = browser.execute_script(
            "return ['.outcome', 'h1', '.reasons li'].map(s => document.querySelector(s).getBoundingClientRect().bottom)"
        )
        assert max(first) <= 800, "the verdict is seen without scrolling"
        papers.add((theme, browser.execute_script("return getComputedStyle(document.body).backgroundColor")))
        picture = base64.b64decode(browser.get_screenshot_as_base64())
        assert len(picture) > 10_000, "a blank page is smaller"
        (tmp_path / f"{make.__name__}-{theme}-{width}.png").write_bytes(picture)
    assert papers == {("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 26)")}


def test_wide_tables_scroll_inside_their_own_box(browser: Any, opened: Open) -> None:
    opened(html_page.render(comparison()))
    show(browser, 400, "light")
    box = browser.find_element("css selector", ".scroll:has(.measures)")
    inner, outer = browser.execute_script("return [arguments[0].scrollWidth, arguments[0].clientWidth]", box)
    assert inner > outer
    left = browser.execute_script(
        "arguments[0].scrollLeft = 300; return arguments[0].querySelector('.decides th').getBoundingClientRect().left",
        box,
    )
    assert left == pytest.approx(box.rect["x"], abs=1), "the name of the measure stays in sight"
    show(browser, 1400, "light")
    for each in browser.find_elements("css selector", ".scroll"):
        assert browser.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", each)


def test_print_shows_folded_parts_on_white(browser: Any, opened: Open) -> None:
    opened(html_page.render(comparison()))
    show(browser, 794, "dark", media="print")
    folded = "return [...document.querySelectorAll('details:not([open])')].map(each => each.lastElementChild.checkVisibility())"
    assert len(browser.execute_script(folded)) >= 5
    assert all(browser.execute_script(folded))
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.execute_script(TOO_FAINT) == []
    assert base64.b64decode(browser.print_page()).startswith(b"%PDF")
    show(browser, 794, "dark")
    assert not any(browser.execute_script(folded)), "on the screen it is folded up"
