"""Pages with responses side by side in a browser: a run's samples, a comparison."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.insight.pages.compare import write_comparison_page
from dpo_dist.insight.pages.run import write_page
from tests.support.browser import Watched, chromium
from tests.support.comparison_files import answer, betas, row, write_comparison
from tests.support.sample_files import sample, write_samples

HOSTILE = (
    "</script><script>alert(1)</script><img src='http://example.com/x.png' onerror=alert(2)></svg></details>"
    "<a href='javascript:alert(3)'>x</a> \u202egnp.exe\u202c \u200b\x07 " + "unbroken" * 40
)
SIZES = [(400, "dark"), (1200, "light")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def opened(browser: Any, file: Path, width: int, scheme: str, **context: Any) -> Watched:
    watched = Watched(browser, viewport={"width": width, "height": 900}, color_scheme=scheme, **context)
    watched.page.goto(f"file://{file}")
    return watched


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_samples_of_a_run(tmp_path: Path, browser: Any, width: int, scheme: str) -> None:
    write_samples(tmp_path, 100, [sample(1, "Hello."), sample(2)])
    write_samples(tmp_path, 200, [sample(1, HOSTILE, prompt=HOSTILE, chosen=HOSTILE), sample(2, "")])
    file = write_page(RunFolder(tmp_path))
    watched = opened(browser, file, width, scheme)
    page = watched.page
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".mark", has_text="U+202E").first.is_visible()
    assert page.locator("main a:not([href^='#']), main img, main script").count() == 0
    boxes = [each.bounding_box() for each in page.locator(".side").first.locator("> div").all()]
    assert len({round(box["y"]) for box in boxes[:3]}) == (3 if width == 400 else 1)
    assert (watched.errors, [url for url in watched.requests if not url.startswith("file:")]) == ([], [])


@pytest.mark.parametrize(("width", "scheme"), SIZES)
@pytest.mark.parametrize("has_script", [True, False])
def test_a_comparison(tmp_path: Path, browser: Any, width: int, scheme: str, has_script: bool) -> None:
    names = [each["name"] for each in betas()["models"]]
    rows = [row(at, {name: answer(f"text {at}", at % 2) for name in names}) for at in range(6)]
    rows[1] = row(
        1, {name: answer(HOSTILE, finished=False) for name in names}, prompt=HOSTILE, source=HOSTILE
    )
    file = write_comparison(tmp_path, betas(), rows)
    write_comparison_page(RunFolder(tmp_path), betas())
    watched = opened(browser, file, width, scheme, java_script_enabled=has_script)
    page = watched.page
    assert page.locator(".headline").bounding_box()["y"] < 300
    prompts = page.locator(".prompt:visible")
    assert prompts.count() == 6
    page.locator(".prompt summary").nth(3).click()
    assert page.locator("main a, main img, main script").count() == 0
    search = page.get_by_label("words of a prompt or response")
    assert search.is_visible() == has_script
    if has_script:
        page.get_by_label("prompts to show").select_option("a response does not end")
        assert prompts.count() == 1
        prompts.first.evaluate("each => each.open = true")
        assert page.locator(".mark", has_text="U+202E").first.is_visible()
        assert page.locator("#found").inner_text() == "1 of 6 prompts"
        page.get_by_label("prompts to show").select_option("")
        search.fill("Question 3?")
        assert prompts.count() == 1
        assert "Question 3" in prompts.first.inner_text()
        search.fill("")
        page.get_by_label("largest differences of scores first").check()
        orders = [float(each.get_attribute("data-order")) for each in prompts.all()]
        assert orders == sorted(orders)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (watched.errors, [url for url in watched.requests if not url.startswith("file:")]) == ([], [])
