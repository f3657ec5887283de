"""The report page shows a run's configuration, results and cost, and needs no other file."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.report.metrics_log import MetricsLog, final_and_best
from dpo_dist.report.plots import draw_curves
from dpo_dist.report.run_page.page import write_page

# Seconds of each phase in the last step, which takes one second.
SHARES = {
    "data": 0.001,
    "reference": 0.0,
    "forward": 0.24,
    "backward": 0.5,
    "optimizer": 0.25,
    "checkpoint": 0.0,
    "other": 0.009,
}
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Visible text, tags and addresses of a page; fails if tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.addresses: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "style")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def finished_run(folder: Path) -> Path:
    run_dir = folder / "qwen-sigmoid-3fa9c1d2"
    history = MetricsLog.open(RunFolder(run_dir), None)
    for step in range(1, 31):
        times = {f"time/{phase}": share * step / 30 for phase, share in SHARES.items()}
        history.append({"step": step, "loss": 0.7 - step / 100, **times})
        history.append({"step": step, "eval_loss": 0.71 - step / 100, "eval_rewards/accuracies": 0.625})
    history.save()
    history.write_summary(
        {
            **final_and_best(history.rows),
            "steps": 30,
            "pairs_seen": 1920,
            "train_seconds": 4210.4,
            "peak_memory_bytes": 3 * 2**30,
            "reference": {"mode": "cached", "hits": 3840, "computed": 0, "seconds": 1.25},
            "data": {"read": 2000, "kept": 1920, "dropped": {"chosen equals rejected": 80}, "truncated": 17},
            "exit": "preempted",
        }
    )
    draw_curves(history.rows, history.folder.curves, "qwen")
    config = {
        "model": {"path": "org/model", "revision": None},
        "data": {"train": [{"path": "<script>alert(1)</script>", "weight": 2.0, "split": None}, "b & c"]},
        "loss": {"kind": "sigmoid", "beta": 0.1},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    (run_dir / "environment.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}}))
    return run_dir


def test_the_page_shows_configuration_and_results(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path)
    write_page(RunFolder(run_dir))
    page = Page((run_dir / "report.html").read_text())
    for shown in (
        "qwen-sigmoid-3fa9c1d2",
        "preempted",
        "best 0.4100 at step 30",
        "best 0.6250 at step 1",
        "1,920 pairs",
        "1 h 10 min",
        "3.0 GiB",
        "loss.beta\n0.1",
        "hits\n3840",
        "dropped.chosen equals rejected\n80",
        "truncated\n17",
        "versions.torch\n2.13.0",
        "The last 20 of 30.",
        "\n30\n0.4100",
        "forward\n124.0 ms\n24.0%",
        "data\n0.5 ms\n0.1%",
        "Mean of the 30 logged steps",
    ):
        assert shown in page.text, shown
    assert "\n10\n0.6100" not in page.text


def test_the_page_has_the_last_metrics_of_each_source(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path)
    history = MetricsLog.open(RunFolder(run_dir), 30)
    history.append({"step": 31, "rewards/accuracies/math": 0.25, "rewards/margins/math": 1.5})
    history.append({"step": 32, "rewards/accuracies/math": 0.75, "rewards/accuracies/a&b": 0.5})
    history.append({"step": 32, "eval_loss": 0.1, "eval_rewards/accuracies/math": 0.625})
    history.save()
    write_page(RunFolder(run_dir))
    page = Page((run_dir / "report.html").read_text())
    table = page.text[page.text.index("Sources\n") :]
    assert table.startswith("Sources\nsource\naccuracy\nmargin\neval accuracy\na&b\n0.5000\n")
    assert "\nmath\n0.7500\n1.500\n0.6250\n" in table


def test_the_page_is_self_contained_and_escapes_texts(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path)
    write_page(RunFolder(run_dir))
    html = (run_dir / "report.html").read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "default-src 'none'" in html
    assert '<meta name="referrer" content="no-referrer">' in html
    assert "://" not in html.replace("data:image/png;base64,", "").split("base64,")[0]
    (picture,) = page.addresses
    assert picture.startswith("data:image/png;base64,")
    assert "url(" not in html
    assert "@import" not in html


def test_sections_without_a_file_are_omitted(tmp_path: Path) -> None:
    write_page(RunFolder(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert tmp_path.name in page.text
    assert not {"h2", "table", "img", "details"} & set(page.tags)


@pytest.mark.parametrize(
    ("name", "content", "heading"),
    [
        ("config.yaml", "a: [", "Complete configuration"),
        ("environment.json", "{", "Environment"),
        ("dpo_metrics/summary.json", "7", "Reference log-probs"),
        ("dpo_metrics/log_history.json", "{}", "Evaluations"),
    ],
)
def test_an_unreadable_file_omits_only_its_section(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: str, heading: str
) -> None:
    run_dir = finished_run(tmp_path)
    (run_dir / name).write_text(content)
    write_page(RunFolder(run_dir))
    text = Page((run_dir / "report.html").read_text()).text
    headings = {"Complete configuration", "Environment", "Reference log-probs", "Evaluations"}
    assert {shown for shown in headings if shown in text} == headings - {heading}
    assert Path(name).name in caplog.text


def test_values_that_are_not_finite_do_not_break_the_page(tmp_path: Path) -> None:
    history = MetricsLog.open(RunFolder(tmp_path), None)
    history.append({"step": 1, "loss": float("nan"), "eval_loss": float("inf")})
    history.save()
    history.write_summary({**final_and_best(history.rows), "exit": "diverged"})
    write_page(RunFolder(tmp_path))
    assert "diverged" in Page((tmp_path / "report.html").read_text()).text
