"""The page of a long run with hostile texts in a real browser: inert, small, readable at any width."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.insight.pages.run import write_page
from tests.support.browser import Watched, chromium
from tests.unit.insight.pages.made_run import HOSTILE, evaluation, made_run

ROWS = 100_000
MOST_BYTES = 5_000_000
LONG_NAME = "a-label-without-any-space-" * 8


def long_row(step: int) -> dict[str, float]:
    values = {
        "loss": math.sin(step),
        "rewards/accuracies": math.cos(step),
        "grad_norm": 1 + math.sin(3 * step),
    }
    return {
        "step": step,
        "step_seconds": 1.0,
        f"rewards/accuracies/{LONG_NAME}": math.cos(step) ** 2,
        **values,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    made = made_run(tmp_path_factory.mktemp("long"), HOSTILE, LONG_NAME)
    evaluations = [evaluation(step, LONG_NAME) for step in range(1000, ROWS + 1, 1000)]
    made.log_history.write_text(json.dumps([*map(long_row, range(1, ROWS + 1)), *evaluations]))
    write_page(made)
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def test_the_page_of_a_long_run_is_small(run: RunFolder) -> None:
    assert run.report.stat().st_size < MOST_BYTES


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1200, "light")])
def test_the_page_is_inert_and_readable(run: RunFolder, browser: Any, width: int, scheme: str) -> None:
    watched = Watched(browser, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, address = watched.page, f"file://{run.report}"
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".sentence").bounding_box()["y"] < 900
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img, link, iframe, a:not([href^='#'])").count() == 0
    assert page.locator("h3", has_text="Findings of the doctor").is_visible()
    assert page.locator("figure.curves svg").first.is_visible()
    assert watched.errors == []
    assert watched.requests == [address]
