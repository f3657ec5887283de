"""The report page of a run: complete, self-contained, inert, without sections of missing files."""

import json
from pathlib import Path

import pytest

from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.insight.metrics.log import MetricsLog, final_and_best
from dpo_dist.insight.pages.run import write_page
from tests.unit.insight.pages.made_run import HOSTILE, Page, made_run


def page_of(run: RunFolder, price: float | None = None) -> Page:
    write_page(run, price)
    return Page(run.report.read_text(encoding="utf-8"))


def change_summary(run: RunFolder, **fields: object) -> None:
    run.summary.write_text(json.dumps(json.loads(run.summary.read_text()) | fields))


def test_the_verdict_comes_first(tmp_path: Path) -> None:
    text = page_of(made_run(tmp_path)).section("qwen-sigmoid-3fa9c1d2")
    order = ("completed", "Does not generalise: plain.", "Plain fell.", "Try", "final loss", "Samples")
    later = ("Light lines", "all pairs", "Training data", "training steps", "cached: 840", "abc123")
    places = [text.index(part) for part in (*order, *later)]
    assert places == sorted(places)
    assert "a lower optim.lr ." in text


def test_a_remark_is_shown_beside_a_verdict_without_fault(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    remark = {"rule": "displacement", "text": "log-probs fell. Try: read the samples"}
    change_summary(run, verdict={"sentence": "no fault found", "findings": [remark]})
    shown = page_of(run).section("Verdict")
    assert 'class="verdict good"' in run.report.read_text(encoding="utf-8")
    for part in (
        "No rule of the verdict found a fault",
        "Both responses become less likely",
        "read the samples",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("qwen-sigmoid-3fa9c1d2", "loss sigmoid with beta 0.1; learning rate 1e-6; 1,920 training pairs"),
        ("final loss", "0.4"),
        ("eval accuracy", "0.625 95 %: 0.55 to 0.7; best 0.625 at step 1"),
        ("steps", "30 1,920 pairs"),
        ("training time", "1 h 10 min"),
        ("peak memory", "3.0 GiB"),
        ("cost", "10.00 4 hours at 2.50"),
        (
            "Accuracy and margin",
            "all pairs 100 evaluation pairs 0.625 [0.55, 0.7] 0.625, between 0.550 and 0.700 0.5",
        ),
        (
            "Accuracy and margin",
            "math 40 evaluation pairs, not better than guessing 0.55 [0.45, 0.65] 0.550, between",
        ),
        (
            "Training data",
            "1,920 of 2,000 records kept. records meaning 80 (4 %) dropped: two responses are the same",
        ),
        ("Training data", "17 (0.89 %) the end of a response is cut, and with it"),
        ("First dropped records", "plain:3 identical_responses"),
        ("Findings of the doctor", "error label leak plain"),
        ("Time", "training steps 1 h 10 min 95 %"),
        ("Reference model", "cached: 840 log-probs computed, 3,000 reused. Before the first step"),
        ("Reference model", "differ from the stored ones by 2e-9 nats per token on average"),
        ("Repeat this run", "python -m dpo_dist.train plain"),
        ("Repeat this run", "abc123, with 2 changed files"),
        ("Repeat this run", "torch 2.13.0"),
        ("Configuration", "loss.beta 0.1"),
        ("Environment", "packages.torch 2.13.0"),
    ],
)
def test_the_page_says(page: Page, heading: str, expected: str) -> None:
    assert expected in page.section(heading)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(made_run(tmp_path_factory.mktemp("page")), price=2.5)


def test_a_price_replaces_that_of_the_run(tmp_path: Path) -> None:
    assert "4 hours at 5.00" in page_of(made_run(tmp_path), price=5.0).section("cost")


def test_time_of_a_run_that_has_not_ended_is_that_of_its_rows(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    run.summary.unlink()
    page = page_of(run)
    assert "This run has not ended: its last metrics are of step 30." in page.text
    assert "training steps 30 s 33 %" in page.section("Time")


def test_intervals_of_another_evaluation_are_not_shown(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    file = run.evaluation_of(LAST_EVALUATION).results
    content = json.loads(file.read_text())
    content["all"]["eval_loss"] += 0.1
    file.write_text(json.dumps(content))
    text = page_of(run).section("final loss")
    assert "95 %: " not in text
    assert "[0.55, 0.7]" not in text


def test_secrets_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "3f6c1be2a9")
    run = made_run(tmp_path, "https://me:pass-word@host/x?token=abcdef 3f6c1be2a9")
    run.samples_file(30).unlink()
    page_of(run)
    html = run.report.read_text()
    assert "https://***@host" in html
    assert [text for text in ("pass-word", "abcdef", "3f6c1be2a9") if text in html] == []


def test_texts_add_no_element(tmp_path: Path) -> None:
    plain, page = page_of(made_run(tmp_path / "plain")), page_of(made_run(tmp_path / "hostile", HOSTILE))
    tags = [[tag for tag in each.tags if tag not in ("i", "mark")] for each in (plain, page)]
    assert tags[0] == tags[1]
    assert page.tags.count("script") == 1
    assert not {"img", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "style")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    html = (tmp_path / "hostile" / "qwen-sigmoid-3fa9c1d2" / "report.html").read_text()
    assert "default-src 'none'" in html
    assert not {"\u202e", "\x1b"} & set(html)
    assert "url(" not in html


def test_sections_without_a_file_are_omitted(tmp_path: Path) -> None:
    write_page(RunFolder(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert tmp_path.name in page.text
    assert not {"h2", "table", "svg", "details", "script"} & set(page.tags)


def test_values_that_are_not_finite_do_not_break_the_page(tmp_path: Path) -> None:
    history = MetricsLog.open(RunFolder(tmp_path), None)
    history.append({"step": 1, "loss": float("nan"), "eval_loss": float("inf")})
    history.save()
    history.write_summary({**final_and_best(history.rows), "exit": "diverged"})
    page = page_of(RunFolder(tmp_path))
    assert "diverged" in page.text
    assert "not finite" in page.text
