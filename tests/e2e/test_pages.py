"""Each page in a real browser: charts by hover, tables without script, texts of data, which do nothing."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.foundation.text import number
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.compare.page import write_comparison_page
from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.tools.doctor.page import write_doctor_page
from dpo_dist.tools.report.run import write_page
from dpo_dist.tools.report.runs import compare_runs
from dpo_dist.tools.sweep.figure import figures
from tests.e2e.conftest import Overrides, last_evaluation
from tests.support.browser import Watched, chromium
from tests.support.comparison_files import answer, model, results, row, write_comparison
from tests.support.doctor_data import diagnosis
from tests.support.launch import run_verb, train
from tests.unit.tools.pages.made_run import HOSTILE, change, made_run, write_rows

OF_OTHERS = "main a:not([href^='#']), main img, main script, main iframe, main [onclick], main [onerror]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def opened(browser: Any, file: Path, width: int = 1200, **context: Any) -> Watched:
    watched = Watched(browser, viewport={"width": width, "height": 900}, **context)
    watched.page.goto(file.as_uri())
    return watched


def assert_inert(watched: Watched) -> None:
    """The page fits the screen, and has made no error, no dialog, no request and no element of a text."""
    page = watched.page
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert page.locator(OF_OTHERS).count() == 0
    assert (watched.errors, watched.requests) == ([], [page.url.split("#")[0]])


def assert_readable(browser: Any, file: Path, charts: int) -> Watched:
    """Hostile or not, the page works at both widths, in dark and without script; return the wide one."""
    narrow = opened(browser, file, 500, color_scheme="dark")
    assert narrow.page.locator("figure canvas").count() == charts
    assert_inert(narrow)
    plain = opened(browser, file, java_script_enabled=False)
    assert plain.page.locator("figure").count() == charts
    assert_inert(plain)
    watched = opened(browser, file)
    assert_inert(watched)
    return watched


def legend(watched: Watched, chart: int = 0) -> list[str]:
    """The values in a chart's legend: those at the cursor, or the last ones."""
    rows = watched.page.locator("figure").nth(chart).locator(".u-series").all()
    return [" ".join(" ".join(row.locator("th, td").all_inner_texts()).split()) for row in rows]


def hover(watched: Watched, share: float) -> None:
    """Move the mouse to a share of the horizontal axis of the first chart."""
    area = watched.page.locator("figure .u-over").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    watched.page.mouse.move(box["x"] + share * (box["width"] - 1), box["y"] + box["height"] / 2)


def test_the_page_of_a_run(tmp_path: Path, browser: Any) -> None:
    run = made_run(tmp_path, HOSTILE, HOSTILE)
    watched = assert_readable(browser, write_page(run), 4)
    assert watched.page.locator(".badge.warning", has_text="completed").is_visible()
    assert watched.page.locator(".mark", has_text="U+202E").first.is_visible()
    assert legend(watched) == ["step 30", "loss 0.4", "loss (evaluation) 0.41"]
    hover(watched, 0.0)
    assert legend(watched)[:2] == ["step 1", "loss 0.69"]
    assert legend(watched, 1)[:2] == ["step 1", "accuracy 0.51"], "all charts show the same step"
    watched.page.mouse.move(0, 0)
    assert legend(watched)[0] == "step 30"


def test_the_page_of_a_comparison(tmp_path: Path, browser: Any) -> None:
    content = results([model("base", 0.41), model(HOSTILE, 0.62)], 0.6)
    rows = []
    for at in range(6):
        both = {"base": answer(f"text {at}", 0.0), HOSTILE: answer(f"text {at}", at % 2)}
        rows.append(row(at, both, credit=0.5))
    hostile = {name: answer(HOSTILE, finished=False) for name in ("base", HOSTILE)}
    rows[0] = row(1, hostile, prompt=HOSTILE, source=HOSTILE)
    file = write_comparison(tmp_path, content, rows)
    write_comparison_page(ComparisonFolder(tmp_path), content)
    watched = assert_readable(browser, file, 0)
    assert watched.page.get_by_text("at a rate of 0.600 [0.540, 0.660]").is_visible()
    prompts = watched.page.locator(".prompt:visible")
    assert prompts.count() == 6
    assert "Question 1" in prompts.first.inner_text(), "the largest difference of scores"
    search = watched.page.get_by_role("searchbox")
    search.fill("does not end")
    assert prompts.count() == 1
    prompts.first.evaluate("each => each.open = true")
    assert prompts.first.locator(".mark", has_text="U+202E").first.is_visible()
    search.fill("Question 3?")
    assert "Question 3" in prompts.first.inner_text()
    assert watched.page.get_by_text("1 of 6 prompts").is_visible()


def test_the_page_of_the_doctor_hides_texts_until_they_are_asked_for(tmp_path: Path, browser: Any) -> None:
    folder = DoctorFolder(tmp_path)
    write_doctor_page(folder, diagnosis(HOSTILE))
    watched = assert_readable(browser, folder.doctor_page, 0)
    hidden = watched.page.locator(".trained", has_text="javascript:alert(3)")
    assert not hidden.is_visible()
    watched.page.locator(".prompt summary").focus()
    watched.page.keyboard.press("Enter")
    assert hidden.is_visible()


def test_the_page_of_several_runs_has_the_figure_of_their_sweep(tmp_path: Path, browser: Any) -> None:
    runs = [made_run(tmp_path / HOSTILE.replace("/", "") / name, HOSTILE) for name in "ab"]
    change(runs[0].config, "loss", "kind", value=HOSTILE)
    accuracy = "eval_rewards/accuracies"
    points = []
    for kind in ("ipo", HOSTILE):
        for seed in (0, 1):
            settings = {"loss.kind": kind, "trainer.seed": seed}
            points.append({"settings": settings, "metrics": {accuracy: 0.5 + len(kind) / 1000 + seed / 10}})
    compare_runs(runs, tmp_path / "report.html", figures(points))
    watched = assert_readable(browser, tmp_path / "report.html", 8)
    assert watched.page.get_by_text("Their losses differ").is_visible()
    assert legend(watched)[1] == f"accuracy {number(0.55 + len(HOSTILE) / 1000)}"
    hover(watched, 0.0)
    assert legend(watched) == ["loss.kind ipo", "accuracy 0.553"]


def test_a_long_run_is_drawn_whole(tmp_path: Path, browser: Any) -> None:
    """Its page has some of its points, the extremes among them, and where a line has none, its last value."""
    run = made_run(tmp_path)
    source = random.Random(0)
    rows = [{"step": step, "loss": source.gauss(1, 0.1), "pairs": 64} for step in range(1, 20_001)]
    rows[7_777]["loss"] = 9.0
    rows[11_111]["loss"] = None
    rows.insert(10_000, {"step": 10_000, "eval_loss": 0.5})
    write_rows(run, rows)
    file = write_page(run)
    assert file.stat().st_size < 250_000
    watched = opened(browser, file)
    assert legend(watched)[-1] == "loss (evaluation) 0.5 at 10,000"
    hover(watched, 0.75)
    assert legend(watched)[-1] == "loss (evaluation) 0.5 at 10,000"
    hover(watched, 0.25)
    assert legend(watched)[-1] == "loss (evaluation) none yet"
    drawn = json.loads(watched.page.locator("figure").first.get_attribute("data-chart"))
    assert max(value for value in drawn["lines"][0]["ys"] if value is not None) == 9


def test_three_runs_by_their_verb(overrides: Overrides, assets: Path, tmp_path: Path, browser: Any) -> None:
    evaluated = (f"data.eval=[{assets}/eval.jsonl]", "trainer.eval_every=2", "sampling.prompts=2")
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
    assert legend(watched)[0] == "pair 24"  # 4 steps of 6 pairs, 8 of 3
    assert legend(watched)[-1].endswith("at 12")
    assert_inert(watched)
    scores = [
        json.loads(line) for line in (tmp_path / "fast/evaluation/scores.jsonl").read_text().splitlines()
    ]
    wrong = sorted((each for each in scores if each["margin"] < 0), key=lambda each: each["margin"])
    assert wrong
    pairs = (assets / "eval.jsonl").read_text().splitlines()
    watched = opened(browser, tmp_path / "fast/report.html")
    worst = watched.page.locator("details .prompt")
    assert not worst.first.is_visible(), "texts are hidden until they are asked for"
    watched.page.get_by_text("Evaluation pairs with the lowest margins").click()
    for shown, each in zip(worst.all(), wrong, strict=True):
        shown.evaluate("each => each.open = true")
        text, pair = " ".join(shown.inner_text().split()), json.loads(pairs[each["line"] - 1])
        assert f"eval.jsonl:{each['line']}: margin {number(each['margin'], 3)}" in text
        for side in ("chosen", "rejected"):
            assert pair[side][-1]["content"][:20] in text
    assert_inert(watched)
