"""Charts of pages in a real browser: hover, keyboard, touch, narrow, without script."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.insight.pages.charts import Line, chart
from dpo_dist.insight.pages.render import page
from tests.support.browser import Watched, chromium

HOSTILE = "</figure><script>alert(1)</script><img src=x onerror=alert(2)>'\""
STEPS = list(range(10, 1010, 10))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    loss = [1 / step for step in STEPS]
    loss[50] = math.nan
    lines = [
        Line("train", "raw", STEPS, loss),
        Line("train", "smooth", STEPS, [0.123456789] * len(STEPS)),
        Line("evaluation", "evaluation", [250, 500, 750, 1000], [0.5] * 4),
    ]
    figures = [
        chart("Loss", lines),
        chart(HOSTILE, [Line(HOSTILE, "raw", STEPS, [1e7 + step for step in STEPS])], HOSTILE),
        chart("Norm", [Line("norm", "raw", STEPS, [10.0**-step for step in range(100)])], log=True),
    ]
    file = tmp_path_factory.mktemp("page") / "charts.html"
    names = "outcome about verdict last_step tiles links samples accuracy data speed reference"
    content = dict.fromkeys([*names.split(), "repeat", "config", "environment"], ())
    file.write_text(
        page("run.jinja", HOSTILE, ["charts.js"], **(content | {"last_step": None, "curves": figures}))
    )
    return file


def opened(browser: Any, file: Path, **context: Any) -> Watched:
    watched = Watched(browser, **{"viewport": {"width": 1200, "height": 900}, **context})
    watched.page.goto(file.as_uri())
    return watched


def texts(watched: Watched, number: int = 0) -> list[str]:
    figure = watched.page.locator("figure").nth(number)
    return [figure.locator(".place").inner_text(), *figure.locator(".legend li").all_inner_texts()]


def hover(watched: Watched, share: float, number: int = 0) -> None:
    """Move the mouse to a share of the horizontal axis."""
    box = watched.page.locator("figure svg").nth(number).bounding_box()
    left, right = (place / 380 * box["width"] for place in (50, 364))
    watched.page.mouse.move(box["x"] + left + share * (right - left), box["y"] + box["height"] / 2)


LAST = ["step 1,000", "train 0.001 · mean 0.1235", "evaluation 0.5"]


def test_hover_shows_the_values_at_a_step_in_all_charts(browser: Any, page_file: Path) -> None:
    watched = opened(browser, page_file)
    assert texts(watched) == LAST
    hover(watched, 0.0)
    assert texts(watched) == ["step 10", "train 0.1 · mean 0.1235", "evaluation none yet"]
    assert texts(watched, 2)[1] == "norm 1"
    hover(watched, (510 - 10) / 990)
    assert texts(watched) == ["step 510", "train no value · mean 0.1235", "evaluation 0.5 at step 500"]
    assert texts(watched, 1)[1] == f"{HOSTILE} 1e7"
    assert watched.page.locator(".cursor line").count() == 3
    watched.page.mouse.move(0, 0)
    assert texts(watched) == LAST
    assert watched.page.locator(".cursor line").count() == 0
    assert watched.errors == []
    assert watched.requests == [page_file.as_uri()]


def test_the_keyboard_moves_from_step_to_step(browser: Any, page_file: Path) -> None:
    watched = opened(browser, page_file)
    watched.page.locator("figure").first.focus()
    for key, step in (("ArrowLeft", "990"), ("ArrowRight", "1,000"), ("Home", "10"), ("PageDown", "110")):
        watched.page.keyboard.press(key)
        assert texts(watched)[0] == f"step {step}"
    watched.page.keyboard.press("Escape")
    assert texts(watched) == LAST
    assert watched.errors == []


def test_touch_shows_the_values_and_keeps_them(browser: Any, page_file: Path) -> None:
    phone = opened(browser, page_file, viewport={"width": 400, "height": 800}, has_touch=True)
    box = phone.page.locator("figure svg").first.bounding_box()
    phone.page.touchscreen.tap(box["x"] + 52 / 380 * box["width"], box["y"] + 50)
    assert texts(phone)[0] in ("step 10", "step 20")
    assert phone.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_is_not_wider_than_the_screen(browser: Any, page_file: Path, scheme: str) -> None:
    watched = opened(browser, page_file, viewport={"width": 400, "height": 800}, color_scheme=scheme)
    assert watched.page.evaluate("document.documentElement.scrollWidth") == 400
    sizes = watched.page.evaluate(
        "[...document.querySelectorAll('svg text')].filter(text => text.getBoundingClientRect().height)"
        ".map(text => text.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 10


def test_without_script_the_charts_are_complete(browser: Any, page_file: Path) -> None:
    watched = opened(browser, page_file, java_script_enabled=False)
    assert texts(watched) == LAST
