"""The page in a real browser: it says nothing on the console, sorts, filters, and shows what lies under the mouse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, find_browser
from lowbit.bench.report import Measured, render
from pages import layers, names, report

HOSTILE = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium here; it is what this test opens the page with")
    with Browser(executable, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    of = [*names(12), f"model.layers.3.{HOSTILE.replace('.', '_')}"]
    made = report(layers(of), name=HOSTILE, measured=Measured(HOSTILE, 8, 1024, 25.9, 24.8, 0.05))
    file.write_text(render(made), encoding="utf-8")
    return file


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 390])
def test_opens_without_a_complaint_and_fits_its_window(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.complaints == []
    assert browser.run("document.documentElement.classList.contains('js')")
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("document.querySelector('#theme').textContent") == ("Light" if dark else "Dark")
    lightness = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert (sum(lightness) < 200) == dark


def test_markup_in_names_stays_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert "owned" in browser.run("document.title")  # as a part of the name
    assert browser.run("document.title") != "owned"
    assert browser.run("document.images.length") == 0
    assert browser.complaints == []


def test_sorts_by_a_column_both_ways_and_back_by_name(browser: Browser, page: Path) -> None:
    browser.open(page)
    column = browser.run(
        "[...document.querySelectorAll('#table thead th')].findIndex(e => e.innerText.includes('Output'))"
    )
    values = f"[...document.querySelectorAll('#table tbody tr')].map(row => Number(row.cells[{column}].dataset.v))"
    before = browser.run(values)
    head = f"#table thead th:nth-child({column + 1})"
    browser.click(f"{head} button")
    assert browser.run(values) == sorted(before, reverse=True) != before
    assert browser.run(f"document.querySelector('{head}').ariaSort") == "descending"
    browser.click(f"{head} button")
    assert browser.run(values) == sorted(before)
    browser.click("#table thead th:first-child button")
    rows = browser.run("[...document.querySelectorAll('#table tbody th')].map(e => e.textContent)")
    assert rows.index("model.layers.2.mlp.up_proj") < rows.index("model.layers.10.mlp.up_proj")


def test_filters(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.click("#filter")
    browser.send("Input.insertText", text="layers.7 down")
    assert browser.run("document.querySelector('#shown').textContent") == "1 of 85 rows"
    shown = browser.run("[...document.querySelectorAll('#table tbody tr')].filter(e => e.offsetParent).length")
    assert shown == 1


def test_shows_the_values_under_the_mouse(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("document.querySelector('#tip').hidden")
    browser.hover("#heat > rect:nth-of-type(3)")
    said = browser.run("document.querySelector('#tip').innerText")
    assert said.startswith("model.layers.2.self_attn.q_proj")
    assert "Output error" in said
    assert "Bits per weight" in said
    browser.hover("h1")
    assert browser.run("document.querySelector('#tip').hidden")


def test_the_map_changes_what_it_shows(browser: Browser, page: Path) -> None:
    browser.open(page)
    classes = "[...document.querySelectorAll('#heat > rect')].map(e => e.getAttribute('class'))"
    before = browser.run(classes)
    browser.click("[data-metric='3']")
    assert browser.run(classes) != before
    assert browser.run("document.querySelector(\"[data-metric='3']\").ariaPressed") == "true"
    assert browser.run("document.querySelector('#heat > rect').ariaLabel").startswith("model.layers.0.self_attn.q_proj")


def test_the_keyboard_reaches_every_cell_and_its_row(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelector('#heat-scroll').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        browser.press(key)
    assert browser.run("document.querySelector('tr.found th').textContent") == "model.layers.1.self_attn.k_proj"


def test_the_theme_can_be_chosen(browser: Browser, page: Path) -> None:
    browser.open(page)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = browser.run(colour)
    browser.click("#theme")
    assert browser.run(colour) != light
    browser.click("#theme")
    assert browser.run(colour) == light
