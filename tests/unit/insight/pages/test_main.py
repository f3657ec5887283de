"""`python -m dpo_dist.report`: the page again, also of a run in training, the difference, and errors."""

from pathlib import Path

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.report import main
from tests.unit.insight.pages.made_run import made_run


def test_the_page_of_a_run_is_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run.report}\n"
    first = run.report.read_text()
    assert main([str(run), "--price", "1000", "--output", str(tmp_path / "other.html")]) == 0
    assert run.report.read_text() == first
    assert "4,000.00" in (tmp_path / "other.html").read_text()  # of 4 GPU-hours
    assert [file.name for file in run.path.iterdir() if "tmp" in file.name] == []


def training(folder: Path) -> RunFolder:
    """A run that was killed before its first checkpoint, while it wrote a row."""
    run = made_run(folder)
    run.summary.unlink()
    run.log_history.unlink()
    with run.metrics_table.open("a") as table:
        table.write("31,0.1,12.")
    return run


def test_a_run_in_training_has_a_page_of_its_rows_so_far(tmp_path: Path) -> None:
    run = training(tmp_path)
    assert main([str(run)]) == 0
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    page = run.report.read_text()
    assert "This run has not ended: its last metrics are of step 30." in page
    assert page.count('<figure class="curves') >= 5


def test_a_run_that_was_continued_does_not_show_its_earlier_end(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    with run.metrics_table.open("a") as table:
        table.write("40,0.1,12.0\n")
    assert main([str(run)]) == 0
    page = run.report.read_text()
    assert "its last metrics are of step 40" in page
    assert "badge completed" not in page


def test_a_page_of_two_runs_is_written_to_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = made_run(tmp_path / "a"), training(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert main([str(first), str(second)]) == 0
    name = "difference-a-qwen-sigmoid-3fa9c1d2-b-qwen-sigmoid-3fa9c1d2.html"
    assert capsys.readouterr().out == f"report: {name}\n"
    assert "This run has not ended" in (tmp_path / name).read_text()


def test_no_run_directory_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path)
    for path, found in (
        (tmp_path / "absent", "no such folder"),
        (run.config, "a file"),
        (run.metrics.parent / "logs", "no such folder"),
        (tmp_path, f"such as {run}"),
    ):
        assert main([str(path)]) == main([str(run), str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("this is no run directory") == 2
        assert found in error


def test_other_mistakes_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path)
    assert main([str(run), str(run.metrics / "..")]) == 2
    assert "both are the same run directory" in capsys.readouterr().err
    assert main([str(run), "--output", str(run.path)]) == 2
    assert "the page cannot be written" in capsys.readouterr().err
    for price in ("-1", "nan", "much"):
        with pytest.raises(SystemExit, match="2"):
            main([str(run), "--price", price])


def test_a_damaged_file_is_a_plain_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path)
    run.summary.write_text("[1,")
    assert main([str(run)]) == 2
    assert "check the files of the run" in capsys.readouterr().err


def test_a_run_may_be_written_as_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path)
    assert main([f"run.dir={run}"]) == 0
    with pytest.raises(SystemExit):
        main([str(run), "--price", "cheap"])
    assert "'cheap' is no number of at least 0" in capsys.readouterr().err
