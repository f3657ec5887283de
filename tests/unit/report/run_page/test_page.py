"""The report page of a run: complete, self-contained, inert, without sections of missing files."""

import json
from itertools import product
from pathlib import Path

import pytest
import yaml

from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.insight.metrics.log import MetricsLog, final_and_best
from dpo_dist.insight.pages.run import write_page
from tests.unit.report.run_page.made_run import HOSTILE, Page, made_run, row, summary


def page_of(run: RunFolder, price: float | None = None) -> Page:
    write_page(run, price)
    return Page(run.report.read_text(encoding="utf-8"))


def test_the_verdict_comes_first(tmp_path: Path) -> None:
    text = page_of(made_run(tmp_path)).section("qwen-sigmoid-3fa9c1d2")
    order = (
        "completed",
        "Does not generalise: plain.",
        "Plain fell.",
        "Try",
        "final loss",
        "Samples",
    )
    places = [
        text.index(part) for part in (*order, "Curves over", "By source", "Training data", "Time by work")
    ]
    assert places == sorted(places)


def test_a_remark_is_shown_beside_a_verdict_without_fault(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    remark = {"rule": "displacement", "text": "log-probs fell. Try: read the samples"}
    content = json.loads(run.summary.read_text()) | {
        "verdict": {"sentence": "no fault found", "findings": [remark]}
    }
    run.summary.write_text(json.dumps(content))
    page = page_of(run)
    shown = page.section("Verdict")
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
        ("cost", "6.05"),  # 2 GPUs, 4210.4 + 60 + 84 seconds, 2.5 an hour
        ("By length", "64-127 0.7 [0.6, 0.8]"),
        (
            "By source",
            "all pairs 100 evaluation pairs 0.625 [0.55, 0.7] 0.625, between 0.550 and 0.700 0.5",
        ),
        (
            "By source",
            "math 40 evaluation pairs, not better than guessing 0.55 [0.45, 0.65] 0.550, between",
        ),
        ("Evaluations (30)", "The last 20 of 30."),
        (
            "Chosen responses became less likely",
            "-1.01 to -1.30 nats per token, so that a token is on average 75 %",
        ),
        ("Chosen responses became less likely", "In 60 % of the evaluation pairs both are less likely"),
        ("Chosen responses became less likely", "Both are beyond the verdict's limits"),
        (
            "Training data",
            "1,920 of 2,000 records kept. records meaning 80 (4 %) dropped: two responses are the same",
        ),
        ("Training data", "17 (0.89 %) the end of a response is cut, and with it"),
        ("Findings of the doctor", "The doctor examined these data: 1 error."),
        ("Time by work", "training steps 1 h 10 min 97 %"),
        ("Time by work", "evaluations 1 min 00 s"),
        ("Time of a step by phase", "forward the policy's log-probs, and the loss 124.0 ms 24 %"),
        ("Memory", "needed 3.0 GiB at its peak"),
        ("Model FLOPs utilization (MFU)", "40 % of the measured peak, 30 % of the data sheet's; 64 pairs"),
        ("Cost", "6.05, for 2.42 GPU-hours at 2.50 each"),
        (
            "Reference model",
            "In the last start: 840 log-probs computed in 1 min 24 s, 3,000 reused. Reuse saved about 5 min",
        ),
        ("Reference model", "differ from the stored ones by 2e-9 nats per token on average"),
        ("Reference model", "That is rounding."),
        ("Repeat this run", "python -m dpo_dist.train plain"),
        ("Repeat this run", "abc123, with 2 changed files digest of the configuration 3fa9c1d2"),
        ("Repeat this run", "torch 2.13.0"),
        ("Complete configuration", "loss.beta 0.1"),
        ("Environment", "packages.torch 2.13.0"),
    ],
)
def test_the_page_says(page: Page, heading: str, expected: str) -> None:
    assert expected in page.section(heading)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(made_run(tmp_path_factory.mktemp("page")))


def test_only_the_last_evaluations_have_a_line(page: Page) -> None:
    table = page.section("Evaluations (30)")
    assert " 30 0.41 " in table
    assert " 10 0.61 " not in table


def test_a_price_replaces_that_of_the_run(tmp_path: Path) -> None:
    assert "at 5.00 each" in page_of(made_run(tmp_path), price=5.0).text


WORK = {
    "seconds": {"starting": 100.0, "reference": 90.0, "training": 4210.4, "samples": 50.0, "other": 0.0},
    "device_seconds": 14400.0,
    "since_step": 0,
}


def with_work(folder: Path, **changes: object) -> Page:
    run = made_run(folder)
    content = json.loads(run.summary.read_text())
    run.summary.write_text(json.dumps({**content, "work": {**WORK, **changes}}))
    return page_of(run)


def test_time_and_cost_are_those_of_all_starts(tmp_path: Path) -> None:
    """Also if a start had another number of processes: 4 GPU-hours, not those of 2 GPUs all the time."""
    page = with_work(tmp_path)
    work = page.section("Time by work").split("Time of a step")[0]
    assert "starting 1 min 40 s 2.2 %" in work
    assert "generating samples 50 s" in work
    assert "the rest" not in work
    assert "All work of all starts" in work
    assert "10.00, for 4 GPU-hours at 2.50 each" in page.section("Cost")
    assert "In this run: 840 log-probs computed" in page.section("Reference model")


def test_steps_of_an_earlier_version_are_named(tmp_path: Path) -> None:
    page = with_work(tmp_path, since_step=1200)
    assert "Of the work up to step 1,200 only training steps were measured." in page.section("Time by work")
    assert "Since step 1,200: 840 log-probs computed" in page.section("Reference model")


def test_time_of_a_run_that_has_not_ended_is_that_of_its_rows(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    run.summary.unlink()
    page = page_of(run)
    assert "training steps 30 s 33 %" in page.section("Time by work")


def test_displacement_compares_the_same_responses(tmp_path: Path) -> None:
    """The verdict's comparison: under the reference and under the policy, not among training rows."""
    run = made_run(tmp_path)
    rows = json.loads(run.log_history.read_text())
    for each in rows:
        each["rewards/both_fall"] = 0.6
        if "eval_loss" in each:
            each |= {"eval_logps/chosen_per_token": -1.2, "eval_logps/rejected_per_token": -1.5}
            each |= {"eval_tokens/chosen": 50.0, "eval_tokens/rejected": 40.0}
            each |= {"eval_rewards/chosen": -0.1 * 50 * 0.04, "eval_rewards/rejected": -0.1 * 40 * 0.3}
    run.log_history.write_text(json.dumps(rows))
    assert "Chosen responses became less likely" not in page_of(run).text  # training rows: a fall of 0.29
    rows[-1]["eval_rewards/chosen"] = -0.1 * 50 * 0.2
    run.log_history.write_text(json.dumps(rows))
    shown = page_of(run).section("Chosen responses became less likely")
    assert "-1.00 to -1.20 nats per token, so that a token is on average 82 %" in shown
    assert "The rejected ones: -1.20 to -1.50." in shown
    assert "evaluation pairs of the last metrics row" in shown
    assert "Both are beyond the verdict's limits" in shown
    rows[-1]["eval_rewards/chosen"] = -0.1 * 50 * 0.09
    run.log_history.write_text(json.dumps(rows))
    shown = page_of(run).section("Chosen responses became less likely")
    assert "The verdict remarks on it when both reach 0.1 nats per token and 50 % of the pairs." in shown


def test_intervals_of_another_evaluation_are_not_shown(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    file = run.evaluation_of(LAST_EVALUATION).results
    content = json.loads(file.read_text())
    content["all"]["eval_loss"] += 0.1
    file.write_text(json.dumps(content))
    text = page_of(run).text
    assert "95 %" not in text
    assert "[0.55, 0.7]" not in text


def test_secrets_of_settings_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "3f6c1be2a9")
    run = made_run(tmp_path, "https://me:pass-word@host/x?token=abcdef 3f6c1be2a9")
    run.samples_file(30).unlink()
    page_of(run)
    html = run.report.read_text()
    assert "https://***@host" in html
    assert [text for text in ("pass-word", "abcdef", "3f6c1be2a9") if text in html] == []


def test_steps_count_alike_in_the_time_by_phase(tmp_path: Path) -> None:
    history = MetricsLog.open(RunFolder(tmp_path), None)
    history.append({**row(9, "math"), "time/forward": 0.1})
    history.append({**row(10, "math"), "time/forward": 1.1})
    history.save()
    shown = page_of(RunFolder(tmp_path)).section("Time of a step by phase")
    assert "the policy's log-probs, and the loss 200.0 ms" in shown
    assert "Mean of 10 steps, on the first process." in shown


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
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "url(" not in html


def test_sections_without_a_file_are_omitted(tmp_path: Path) -> None:
    write_page(RunFolder(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert tmp_path.name in page.text
    assert not {"h2", "table", "svg", "details", "script"} & set(page.tags)


@pytest.mark.parametrize(
    ("name", "content", "heading"),
    [
        ("config.yaml", "a: [", "Complete configuration"),
        ("environment.json", "{", "Environment"),
        ("dpo_metrics/summary.json", "7", "Reference model"),
        ("doctor/doctor.json", "[]", "Findings of the doctor"),
    ],
)
def test_an_unreadable_file_omits_only_its_section(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: str, heading: str
) -> None:
    run = made_run(tmp_path)
    (run.path / name).write_text(content)
    text = page_of(run).text
    headings = {
        *("Complete configuration", "Environment", "Reference model"),
        "Findings of the doctor",
    }
    assert {shown for shown in headings if f"{shown}\n" in text} == headings - {heading}
    assert Path(name).name in caplog.text


def test_other_content_of_a_file_omits_only_its_section(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = made_run(tmp_path)
    content = json.loads(run.summary.read_text())
    run.summary.write_text(json.dumps({**content, "reference": {"mode": "cached", "hits": "many"}}))
    text = page_of(run).text
    assert "Reference model\n" not in text
    assert "Training data\n" in text
    assert "reference_section of the report is omitted" in caplog.text


ODD: tuple[object, ...] = ("many", [1], {"a": [None]}, None, True, -1e308)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("dpo_metrics/summary.json", (*summary("a"), "work", "final", "best")),
        ("doctor/doctor.json", ("findings", "sources")),
        ("evaluation/training/evaluation.json", ("all", "math")),
        ("environment.json", ("gpus", "world_size", "packages")),
        ("run_state.json", ("identity",)),
    ],
)
def test_a_field_of_another_type_leaves_a_page(tmp_path: Path, name: str, fields: tuple[str, ...]) -> None:
    run = made_run(tmp_path)
    if name.startswith("evaluation"):
        name = str(run.evaluation_of(LAST_EVALUATION).results.relative_to(run.path))
    content = json.loads((run.path / name).read_text())
    for field, value in product(fields, ODD):
        (run.path / name).write_text(json.dumps({**content, field: value}))
        text = page_of(run).text
        assert "Curves\n" in text, (field, value)
        assert "Repeat this run\n" in text, (field, value)


@pytest.mark.parametrize("tracking", ["text", ["a"], {"price_per_gpu_hour": "cheap"}])
def test_a_price_of_another_type_is_no_price(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tracking: object
) -> None:
    run = made_run(tmp_path)
    run.config.write_text(yaml.safe_dump({"tracking": tracking}))
    assert "GPU-hours at" not in page_of(run).text
    assert "config.yaml: omitted from the report, of another type than expected: " in caplog.text


@pytest.mark.parametrize("damaged", ["{}", "[null]", '[{"step": "one"}]', '[{"step": 1, "loss": 0.5},'])
def test_rows_of_a_damaged_file_are_those_of_the_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    run = made_run(tmp_path)
    run.log_history.write_text(damaged)
    with run.metrics_table.open("a") as table:
        table.write("31,0.")  # a line that a kill cut
    assert "Evaluations (30)\n" in page_of(run).text
    assert "log_history.json cannot be read and is ignored" in caplog.text


def test_a_run_that_has_not_ended_says_so(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    run.summary.unlink()
    assert "This run has not ended: its last metrics are of step 30." in page_of(run).text


def test_the_run_of_an_earlier_version_gets_a_verdict(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    content = json.loads(run.summary.read_text())
    del content["verdict"], content["settings"]
    content["data"] = content["data"]["train"]  # without a part for evaluation
    run.summary.write_text(json.dumps(content))
    for file in (run.evaluation_of(LAST_EVALUATION).results, run.state, run.doctor_report):
        file.unlink()
    page = page_of(run)
    assert "Verdict" in page.text
    assert "1,920 of 2,000 records kept" in page.text
    assert "The doctor has not examined these data." in page.text


def test_values_that_are_not_finite_do_not_break_the_page(tmp_path: Path) -> None:
    history = MetricsLog.open(RunFolder(tmp_path), None)
    history.append({"step": 1, "loss": float("nan"), "eval_loss": float("inf")})
    history.save()
    history.write_summary({**final_and_best(history.rows), "exit": "diverged"})
    page = page_of(RunFolder(tmp_path))
    assert "diverged" in page.text
    assert "not finite" in page.text


def test_the_page_has_no_secrets(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    notes = "tracking: {notes: 'pushed to https://me:hidden-word@host/repository'}\n"
    run.config.write_text(run.config.read_text() + notes)
    assert "pushed to https://***@host/repository" in page_of(run).text
    assert "hidden-word" not in run.report.read_text()
