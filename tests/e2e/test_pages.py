"""Pages in a real browser: charts by hover, keyboard and touch; texts of data, which do nothing."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.schema import FolderConfig, RunConfig
from dpo_dist.foundation.text import number
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.compare.page import write_comparison_page
from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.tools.doctor.page import write_doctor_page
from dpo_dist.tools.pages.charts import Line, chart
from dpo_dist.tools.pages.render import page
from tests.e2e.conftest import Overrides, last_evaluation
from tests.support.browser import Watched, chromium
from tests.support.comparison_files import answer, model, results, row, write_comparison
from tests.support.doctor_data import diagnosis
from tests.support.launch import run_verb, train

HOSTILE = (
    "</figure></style></script><script>alert(1)</script><img src='http://example.com/x.png' onerror=alert(2)>"
    "</svg></details></div>\"<a href='javascript:alert(3)'>x</a> \u202egnp.exe\u202c \u200b\x07 <|im_end|>"
    + "unbroken"
    * 40
)
STEPS = list(range(10, 1010, 10))
OF_OTHERS = "main a:not([href^='#']), main img, main script, main iframe"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def chart_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loss = [1 / step for step in STEPS]
    loss[50] = math.nan
    lines = [
        Line("train", "raw", STEPS, loss),
        Line("train", "smooth", STEPS, [0.123456789] * len(STEPS)),
        Line("evaluation", "evaluation", [250, 500, 750, 1000], [0.5] * 4),
    ]
    named = "</figure><script>alert(1)</script><img src=x onerror=alert(2)>'\""
    figures = [
        chart("Loss", lines),
        chart(named, [Line(named, "raw", STEPS, [1e7 + step for step in STEPS])], named),
        chart("Norm", [Line("norm", "raw", STEPS, [10.0**-step for step in range(100)])], log=True),
    ]
    file = tmp_path_factory.mktemp("page") / "charts.html"
    names = (
        "outcome about verdict tiles links samples accuracy data speed reference repeat config environment"
    )
    content = dict.fromkeys(names.split(), ())
    file.write_text(page("run.jinja", named, ["charts.js"], last_step=None, curves=figures, **content))
    return file


def opened(browser: Any, file: Path, width: int = 1200, **context: Any) -> Watched:
    watched = Watched(browser, viewport={"width": width, "height": 900}, **context)
    watched.page.goto(file.as_uri())
    return watched


def texts(watched: Watched, number: int = 0) -> list[str]:
    figure = watched.page.locator("figure").nth(number)
    return [figure.locator(".place").inner_text(), *figure.locator(".legend li").all_inner_texts()]


def assert_inert(watched: Watched, file: Path) -> None:
    """The page fits the screen, and has made no error, no dialog, no request and no element of a text."""
    page = watched.page
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert page.locator(OF_OTHERS).count() == 0
    assert (watched.errors, watched.requests) == ([], [file.as_uri()])


def hover(watched: Watched, share: float) -> None:
    """Move the mouse to a share of the horizontal axis of the first chart."""
    box = watched.page.locator("figure svg").first.bounding_box()
    left, right = (place / 380 * box["width"] for place in (50, 364))
    watched.page.mouse.move(box["x"] + left + share * (right - left), box["y"] + box["height"] / 2)


LAST = ["step 1,000", "train 0.001 · mean 0.1235", "evaluation 0.5"]


def test_hover_shows_the_values_at_a_step_in_all_charts(browser: Any, chart_file: Path) -> None:
    watched = opened(browser, chart_file)
    assert texts(watched) == LAST
    hover(watched, 0.0)
    assert texts(watched) == ["step 10", "train 0.1 · mean 0.1235", "evaluation none yet"]
    assert texts(watched, 2)[1] == "norm 1"
    hover(watched, (510 - 10) / 990)
    assert texts(watched) == ["step 510", "train no value · mean 0.1235", "evaluation 0.5 at step 500"]
    assert texts(watched, 1)[1].endswith("onerror=alert(2)>'\" 1e7")
    assert watched.page.locator(".cursor line").count() == 3
    watched.page.mouse.move(0, 0)
    assert texts(watched) == LAST
    assert watched.page.locator(".cursor line").count() == 0
    assert_inert(watched, chart_file)


def test_keyboard_and_touch_show_the_values_at_a_step(browser: Any, chart_file: Path) -> None:
    watched = opened(browser, chart_file, 400, has_touch=True)
    watched.page.locator("figure").first.focus()
    for key, step in (("ArrowLeft", "990"), ("ArrowRight", "1,000"), ("Home", "10"), ("PageDown", "110")):
        watched.page.keyboard.press(key)
        assert texts(watched)[0] == f"step {step}"
    watched.page.keyboard.press("Escape")
    assert texts(watched) == LAST
    box = watched.page.locator("figure svg").first.bounding_box()
    watched.page.touchscreen.tap(box["x"] + 52 / 380 * box["width"], box["y"] + 50)
    assert texts(watched)[0] in ("step 10", "step 20")
    assert_inert(watched, chart_file)


def test_without_script_the_charts_are_complete(browser: Any, chart_file: Path) -> None:
    assert texts(opened(browser, chart_file, java_script_enabled=False)) == LAST


@pytest.mark.parametrize(("width", "has_script"), [(400, True), (1200, False)])
def test_a_comparison(tmp_path: Path, browser: Any, width: int, has_script: bool) -> None:
    names = "base", "beta 0.3", "beta 0.1"
    content = results([model("base", None, 0.41), model(names[1], 6.5, 0.6), model(names[2], 14.0, 0.62)], [])
    rows = [row(at, {name: answer(f"text {at}", at % 2) for name in names}) for at in range(6)]
    rows[1] = row(
        1, {name: answer(HOSTILE, finished=False) for name in names}, prompt=HOSTILE, source=HOSTILE
    )
    file = write_comparison(tmp_path, content, rows)
    write_comparison_page(ComparisonFolder(tmp_path), content)
    watched = opened(browser, file, width, java_script_enabled=has_script)
    page = watched.page
    prompts = page.locator(".prompt:visible")
    assert prompts.count() == 6
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
    assert_inert(watched, file)


def test_three_runs_by_their_verb(overrides: Overrides, assets: Path, tmp_path: Path, browser: Any) -> None:
    evaluated = (f"data.eval=[{assets}/eval.jsonl]", "trainer.eval_every=2", "samples.prompts=2")
    extra = {
        "slow": (*evaluated, "trainer.max_steps=4", "sampling.max_new_tokens=8"),
        "fast": (*evaluated, "trainer.max_steps=8", "sampling.max_new_tokens=8", "optim.lr=5e-2",
                 "trainer.global_batch_pairs=3"),
        "unseen": ("trainer.max_steps=2",),
    }  # fmt: skip
    for name, words in extra.items():
        train(overrides(*words, f"run.dir={tmp_path}/{name}"))
    ended = run_verb("report", list(extra), cwd=tmp_path)
    assert ended.code == 0, ended.output
    lines = [line.split() for line in ended.output.splitlines()]
    assert lines[0][:4] == ["run", "outcome", "loss", "accuracy"], "more than four settings differ"
    last = {name: last_evaluation(tmp_path / name) for name in ("slow", "fast")}
    for name, line in zip(last, lines[1:], strict=False):
        assert line[:2] == [name, "completed"]
        loss = last[name]["eval_loss"]
        is_best = loss == min(each["eval_loss"] for each in last.values())
        assert line[2] == f"{loss:.4f}" + ("*" if is_best else "")
    assert lines[3] == ["unseen", "completed", *"-----"]
    assert lines[-1] == ["report:", "runs.html"]
    watched = opened(browser, tmp_path / "runs.html", 700)
    page = watched.page
    assert page.get_by_role("row", name="optim.lr 0.0001 0.05 0.0001", exact=True).is_visible()
    place, *legend = texts(watched)
    assert place == "pair 24"  # 4 steps of 6 pairs, 8 of 3
    assert page.locator(".runs li").all_inner_texts()[-1] == "unseen"
    assert legend[-1].endswith("at pair 12")
    page.locator("figure svg").first.scroll_into_view_if_needed()
    hover(watched, 0.0)
    assert texts(watched)[0] == "pair 0"
    assert page.locator("#samples .prompt").count() == 2
    assert_inert(watched, tmp_path / "runs.html")
    scores = [
        json.loads(line) for line in (tmp_path / "fast/evaluation/scores.jsonl").read_text().splitlines()
    ]
    wrong = sorted((each for each in scores if each["margin"] < 0), key=lambda each: each["margin"])
    assert wrong
    pairs = (assets / "eval.jsonl").read_text().splitlines()
    watched = opened(browser, tmp_path / "fast/report.html")
    worst = watched.page.locator("#accuracy .prompt")
    assert not worst.first.is_visible(), "texts are hidden until they are asked for"
    watched.page.get_by_text("Evaluation pairs with the lowest margins").click()
    for shown, each in zip(worst.all(), wrong, strict=True):
        shown.evaluate("each => each.open = true")
        text, pair = " ".join(shown.inner_text().split()), json.loads(pairs[each["line"] - 1])
        assert f"eval.jsonl:{each['line']}: margin {number(each['margin'], 3)}" in text
        for side in ("chosen", "rejected"):
            assert pair[side][-1]["content"][:20] in text
    assert_inert(watched, tmp_path / "fast/report.html")


def test_texts_of_the_doctor_are_hidden_until_they_are_asked_for(tmp_path: Path, browser: Any) -> None:
    config = RunConfig(run=FolderConfig(str(tmp_path)))
    write_doctor_page(DoctorFolder(config.run.path), diagnosis(HOSTILE), config.data, config.doctor)
    file = DoctorFolder(config.run.path).doctor_page
    watched = opened(browser, file, 390, color_scheme="dark")
    page = watched.page
    hidden = page.locator(".texts", has_text="javascript:alert(3)")
    assert not hidden.first.is_visible()
    page.locator("label[for=all-texts]").click()
    assert hidden.first.is_visible()
    assert page.locator(".mark", has_text="U+202E").first.is_visible()
    # Opened one by one, by the keyboard.
    page.locator("label[for=all-texts]").click()
    page.locator("#text-0").focus()
    page.keyboard.press("Space")
    assert page.locator("article .texts").first.is_visible()
    assert_inert(watched, file)
