"""Reports in a real browser: the slider is dragged, a series switched off, a value read off, the page printed.

Needs a Chromium (`make browser` installs Debian's); without one these tests are skipped, and say so.
"""

import io
import os

import numpy as np
import pytest
from browser import Browser, find
from PIL import Image
from test_report import run, sweep  # noqa: F401  (fixtures)

from maejax.cli import main


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find()
    if executable is None:
        if os.environ.get("MAEJAX_BROWSER"):
            pytest.fail("no Chromium was found, and make browser should have installed one")
        pytest.skip("no Chromium: reports were not opened in a browser; make browser installs one and does it")
    with Browser(executable, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def pages(browser, run, sweep, monkeypatch):  # noqa: F811
    """The reports of a run and of a sweep."""
    monkeypatch.setattr("maejax.sweep.sealed_steps", lambda folder: [1000] if folder.parent.exists() else [])
    for folder in (run, sweep):
        assert main(["report", str(folder)]) == 0
    browser.complaints.clear()
    browser.media()
    yield run / "report.html", sweep / "report.html"
    assert browser.complaints == []


SHOWN = "[...document.querySelectorAll('.frame')].filter(f => f.offsetHeight > 0).map(f => f.dataset.words)"


def test_the_slider_is_dragged_through_the_pictures(browser, pages):
    browser.open(pages[0])
    assert browser.ask(SHOWN) == ["1,000"] and browser.ask("document.querySelector('.frame img').naturalWidth") == 16
    left, top, width, height = browser.box(".control input")
    browser.drag((left + width - 6, top + height / 2), (left + 4, top + height / 2))
    assert browser.ask(SHOWN) == ["10"]
    assert browser.ask("document.querySelector('.control output').textContent") == "10"
    browser.key("ArrowRight")  # the slider has the focus
    assert browser.ask(SHOWN) == ["200"]
    assert browser.ask("document.querySelector('.control input').getAttribute('aria-valuetext')") == "200"


def test_a_series_is_switched_off_and_on_in_every_chart(browser, pages):
    browser.open(pages[1])
    curves = "[...document.querySelectorAll('.series[data-group=\"%d\"]')]"
    seen, others = (f"{curves % n}.filter(s => s.getBoundingClientRect().width > 0).length" for n in (0, 1))
    assert browser.ask(seen) == 2 * 4 and browser.ask(others) == 4
    browser.click(".legend input")
    assert browser.ask(seen) == 0 and browser.ask(others) == 4
    browser.click(".legend input")
    assert browser.ask(seen) == 2 * 4


def test_values_are_read_off_with_pointer_and_keys(browser, pages):
    browser.open(pages[0])
    reading = "document.querySelector('.reading').textContent"
    left, top, width, height = browser.box("figure svg")
    browser.mouse("mouseMoved", left + 60 / 520 * width, top + height / 2)  # beside the first point, step 100
    assert browser.ask(reading) == "step 100: 0.9"
    browser.mouse("mouseMoved", left + width / 2, top - 200)
    assert browser.ask(reading) == ""
    browser.ask("document.querySelector('figure svg').focus()")
    browser.key("ArrowRight")
    assert browser.ask(reading) == "step 200: 0.8"
    browser.key("ArrowRight")  # at step 400 the loss was no number
    assert browser.ask(reading) == "step 1000: 0.5"


def test_light_dark_and_print(browser, pages):
    shades = {}
    for scheme in ("light", "dark"):
        browser.media(scheme=scheme)
        browser.open(pages[1])
        seen = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L"))
        shades[scheme] = np.median(seen)
        assert len(np.unique(seen)) > 50  # something is drawn on it
    assert shades["light"] > 240 and shades["dark"] < 40
    browser.media(scheme="dark", print=True)  # paper is white
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("getComputedStyle(document.querySelector('.legend input')).display") == "none"
    assert browser.pdf().startswith(b"%PDF")


def test_nothing_sticks_out_on_a_phone(browser, pages):
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    try:
        for path in pages:
            browser.open(path)
            assert browser.ask("document.documentElement.scrollWidth") <= 390
    finally:
        browser.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)


def test_everything_has_a_name(browser, pages):
    """What assistive technology is told of the page: every control and every drawing has a name."""
    browser.open(pages[1])
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    wanted = [(role, name) for role, name in named if role in ("checkbox", "slider", "image")]
    assert {role for role, _ in wanted} == {"checkbox", "slider", "image"} and all(name for _, name in wanted)
