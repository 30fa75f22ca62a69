"""The report in a real browser, if the system has one (packages chromium and chromium-driver).

`nox -s browser` runs this and keeps the screenshots; without a browser the tests are skipped.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from gpt_simple.report.history import read_history
from gpt_simple.report.page import page

DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(DRIVER is None, reason="chromedriver is not installed")


@frozen
class Browser:
    """The few WebDriver commands that are needed."""

    session: str
    screenshots: Path

    def open(self, path: Path) -> None:
        self._post("url", url=path.as_uri())

    def resize(self, width: int, height: int) -> None:
        """The page itself, as on a phone, and not the window, which cannot be that narrow."""
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True
        )

    def media(self, media: str = "", scheme: str = "light") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", media=media, features=features)

    def click(self, selector: str) -> None:
        (element,) = self._post("element", using="css selector", value=selector).values()
        self._post(f"element/{element}/click")

    def press(self, selector: str, key: str) -> None:
        (element,) = self._post("element", using="css selector", value=selector).values()
        self._post(f"element/{element}/value", text=key)

    def ask(self, script: str) -> Any:
        return self._post("execute/sync", script=f"return {script}", args=[])

    def shows(self, selector: str) -> bool:
        return bool(self.ask(f"document.querySelector('{selector}').getBoundingClientRect().height > 0"))

    def screenshot(self, name: str) -> None:
        with urllib.request.urlopen(f"{self.session}/screenshot") as answer:
            (self.screenshots / f"{name}.png").write_bytes(base64.b64decode(json.load(answer)["value"]))

    def _devtools(self, command: str, **parameters: Any) -> None:
        self._post("goog/cdp/execute", cmd=command, params=parameters)

    def _post(self, command: str, **body: Any) -> Any:
        return _post(f"{self.session}/{command}", body)


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    screenshots = Path(os.environ.get("REPORT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    screenshots.mkdir(parents=True, exist_ok=True)
    assert DRIVER is not None
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        port = next(found[1] for line in driver.stdout if (found := re.search(r"on port (\d+)\.", line)))
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {"goog:chromeOptions": {"args": arguments}}
        made = _post(f"http://127.0.0.1:{port}/session", {"capabilities": {"alwaysMatch": options}})
        session = f"http://127.0.0.1:{port}/session/{made['sessionId']}"
        yield Browser(session, screenshots)
        urllib.request.urlopen(urllib.request.Request(session, method="DELETE")).close()
        driver.terminate()


@pytest.fixture
def opened(make: Callable[..., Path], tmp_path: Path, browser: Browser) -> Browser:
    """The report of two runs, wide and light."""
    histories = [
        read_history(make("calm"), "calm"),
        read_history(make("bold", **{"optimizer.learning_rate": 1}), "bold"),
    ]
    (tmp_path / "report.html").write_text(page(histories), encoding="utf-8")
    browser.media()
    browser.resize(1280, 1800)
    browser.open(tmp_path / "report.html")
    return browser


def test_the_axis_is_chosen_by_mouse_and_by_keyboard(opened: Browser) -> None:
    assert (opened.shows(".over-step"), opened.shows(".over-tokens")) == (True, False)
    opened.screenshot("light")
    opened.click("label[for=axis-tokens]")
    assert (opened.shows(".over-step"), opened.shows(".over-tokens")) == (False, True)
    opened.press("#axis-tokens", "\ue014")  # arrow right
    assert (opened.shows(".over-tokens"), opened.shows(".over-time")) == (False, True)
    opened.screenshot("time")


def test_a_sample_unfolds(opened: Browser) -> None:
    opened.click("details summary")
    assert not opened.ask("document.querySelector('details').open")
    opened.click("details summary")
    assert opened.ask("document.querySelector('details').open")


def test_on_a_phone_nothing_sticks_out(opened: Browser) -> None:
    opened.resize(390, 844)
    assert opened.ask("document.documentElement.scrollWidth") <= 390
    assert opened.ask("document.querySelector('figure svg').getBoundingClientRect().width") > 330
    opened.screenshot("phone")


def test_dark_is_dark(opened: Browser) -> None:
    light = opened.ask("getComputedStyle(document.body).backgroundColor")
    opened.media(scheme="dark")
    dark = opened.ask("getComputedStyle(document.body).backgroundColor")
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(22, 24, 28)")
    opened.screenshot("dark")


def test_on_paper_there_is_what_was_chosen_and_all_samples(opened: Browser) -> None:
    opened.click("label[for=axis-tokens]")
    opened.click("details summary")
    opened.media("print", scheme="dark")
    assert [opened.shows(f"label[for=axis-{axis}]") for axis in ("step", "tokens", "time")] == [False, True, False]
    assert opened.shows("details pre")
    columns = opened.ask("getComputedStyle(document.querySelector('.charts')).gridTemplateColumns")
    assert len(columns.split()) == 2
    assert opened.ask("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    opened.screenshot("print")


def test_it_loads_nothing(opened: Browser) -> None:
    assert opened.ask("performance.getEntriesByType('resource').length") == 0
