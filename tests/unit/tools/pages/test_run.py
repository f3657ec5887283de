"""The page of a run and its verb: complete, also of a run in training."""

import csv
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.tools.report.__main__ import main
from dpo_dist.tools.report.run import write_page
from tests.unit.tools.pages.made_run import change, made_run, text_of, write_rows

pytestmark = pytest.mark.slow


RELOADS = '<meta http-equiv="refresh" content="30">'


def shown(run: RunFolder) -> str:
    return text_of(write_page(run))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shown(made_run(tmp_path_factory.mktemp("page")))


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("plain (all weights, bf16)", "loss sigmoid with beta 0.1; learning rate 1e-6."),
        ("training loss", "0.6900 0.4000"),
        ("evaluation accuracy 0", "0.625 0.625 0.625 at step 1"),
        ("run completed", "30 steps, 1 h 10 min of training, 1,920 pairs, 0.5 pairs/s, peak memory 3.0 GiB"),
        ("Accuracy and margin", "all 100 0.625 [0.550, 0.700] 0.500 [0.400, 0.600]"),
        ("Accuracy and margin", "math 40 0.550 [0.450, 0.650]"),
        (
            "train data:",
            "1,920 of 2,000 records kept: 80 dropped (identical_responses): two responses are the",
        ),
        ("eval data:", "100 of 100 records kept"),
        ("Findings of the doctor", "error label leak, plain plain To do: plain First: plain:4"),
        ("Repeat this run", "python -m dpo_dist.train plain"),
        ("Configuration", "loss.beta 0.1 loss.kind sigmoid loss.terms [] model.adapter null"),
    ],
)
def test_the_page_says(made: str, heading: str, expected: str) -> None:
    assert expected in made[made.rindex(heading) :]


def test_sections_without_a_file_are_omitted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert shown(run) == f"{tmp_path.name} {tmp_path.name}", "in the title, and as the heading"


def test_the_verb_writes_the_page_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path)
    left = run.curves.with_name(f"{run.curves.name}.tmp-0123456789ab")  # by a start that was killed
    left.touch()
    os.utime(left, (0, 0))
    assert main([f"run.dir={run}"]) == main([str(run), "--output", str(tmp_path / "other.html")]) == 0
    written = [f"curves: {run.curves}", f"report: {run.report}", f"report: {tmp_path / 'other.html'}"]
    assert capsys.readouterr().out.splitlines() == written
    assert run.report.read_text() == (tmp_path / "other.html").read_text()
    assert [file.name for file in run.path.rglob("*") if "tmp" in file.name] == []


def test_a_run_in_training_has_a_page_of_its_rows_so_far_that_reloads(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    assert RELOADS not in write_page(run).read_text()
    rows = [*json.loads(run.log_history.read_text()), {"step": 40, "loss": 0.5, "new": 2.0}]
    write_rows(run, rows)
    with run.log_history.open("a") as log:
        log.write('{"step": 41, "lo')
    run.summary.unlink()
    assert main([str(run)]) == 0
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    page = run.report.read_text()
    assert "This run has not ended: its last metrics are of step 40." in page
    assert page.count("data-chart=") >= 4
    assert RELOADS in page
    with run.metrics_table.open(newline="") as table:
        assert list(csv.DictReader(table))[-1]["new"] == "2.0"


def test_a_page_that_cannot_be_written_is_a_plain_error(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    with pytest.raises(ConfigError, match="the page cannot be written"):
        main([str(run), "--output", str(run.path)])
    run.summary.write_text("[1,")
    with pytest.raises(ConfigError, match="this file of a run cannot be read"):
        main([str(run)])
    with pytest.raises(ConfigError, match=re.escape(f"such as {run}")):
        main([str(tmp_path)])


def test_intervals_of_another_evaluation_are_not_shown(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    change(run.last_evaluation.results, "all", "eval_loss", value=9.0)
    assert "[0.55, 0.7]" not in shown(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config", "a: &a [x]\nb: [*a, *a]"),
        ("config", "- a"),
        ("doctor_report", ""),
        ("environment", "{"),
        ("log_history", "{\n"),
        ("state", "[1]"),
    ],
)
def test_a_damaged_file_is_a_plain_error_that_names_it(tmp_path: Path, name: str, content: str) -> None:
    run = made_run(tmp_path)
    file: Path = getattr(DoctorFolder(run.path), name)
    file.write_text(content)
    with pytest.raises(ConfigError) as raised:
        main([str(run)])
    assert raised.value.where.startswith(str(file))


def test_a_page_can_do_without_each_fact_of_a_file(tmp_path: Path) -> None:
    """A run that was stopped early, or one of another version, lacks some."""
    run = made_run(tmp_path)
    evaluation = run.last_evaluation.results
    for file in (
        run.config,
        run.environment,
        run.state,
        run.summary,
        DoctorFolder(run.path).doctor_report,
        evaluation,
    ):
        text, is_json = file.read_text(), file.suffix == ".json"
        facts = json.loads(text) if is_json else yaml.safe_load(text)
        for name in facts:
            others = {key: value for key, value in facts.items() if key != name}
            file.write_text(json.dumps(others) if is_json else yaml.safe_dump(others))
            assert "Samples" in shown(run), (file, name)
        file.write_text(text)


def test_a_damaged_line_of_samples_is_a_plain_error(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    for line in ("[1]", "{"):
        run.samples_file(30).write_text(line + "\n")
        with pytest.raises(ConfigError, match=re.escape(f"{run.samples_file(30)}:1")):
            main([str(run)])


def test_a_bug_of_the_page_is_not_called_a_fault_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_dist.tools.report.__main__.write_page", lambda *_: {}["bug"])
    with pytest.raises(KeyError):
        main([str(made_run(tmp_path))])


def test_a_finding_of_another_version_keeps_its_name(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    finding = {"rule": "former_rule", "text": "something", "remedy": "less"}
    change(run.summary, "verdict", "findings", value=[finding])
    change(run.summary, "exit", value=None)
    text = shown(run).casefold()
    assert [word for word in ("former_rule", "something", "less") if word not in text] == []
