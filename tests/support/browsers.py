"""Chromium without a window, for the tests of web pages."""

import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"
)

TOO_FAINT = """
const channel = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const luminance = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const parse = text => text.match(/[\\d.]+/g).map(Number);
const behind = node => {
  for (; node; node = node.parentElement) {
    const color = parse(getComputedStyle(node).backgroundColor);
    if (color.length < 4 || color[3] > 0) return color;
  }
};
const found = [];
for (const node of document.body.querySelectorAll('*')) {
  const own = [...node.childNodes].some(each => each.nodeType === 3 && each.data.trim());
  if (!own || !node.checkVisibility()) continue;
  const [a, b] = [parse(getComputedStyle(node).color), behind(node)].map(luminance);
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) found.push([contrast, node.outerHTML.slice(0, 120)]);
}
return found;
"""
"""Finds text with too little contrast to its background (WCAG 2.2, 1.4.3)."""


def chromium() -> Any:
    """Start the browser; its logs record messages of pages and requests. `quit` ends it."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))


def text_of(browser: Any, name: str) -> str:
    return str(browser.find_element("id", name).text)


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
