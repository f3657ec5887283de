"""Write a run's report page again from the run's files, or a page that compares several runs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.foundation.console import console_on
from dpo_dist.foundation.errors import Arguments, ConfigError, ExitCode, exit_after
from dpo_dist.foundation.files import remove_abandoned
from dpo_dist.foundation.streams import print_line
from dpo_dist.foundation.text import first_few, pluralize
from dpo_dist.kit import RunFolder, RunHistory, existing_run, strip_key
from dpo_dist.tools.pages.charts import draw_curves
from dpo_dist.tools.report.run import PageFacts, write_page
from dpo_dist.tools.report.runs import compare_runs


def _runs(paths: Sequence[str]) -> list[RunFolder]:
    """Return the run directories; of several paths, as of `output/*`, say which are without a run."""
    runs = list[RunFolder]()
    others = list[str]()
    for path in paths:
        try:
            runs.append(existing_run(Path(path).expanduser()))
        except ConfigError:
            if len(paths) == 1 or not Path(path).expanduser().exists():
                raise
            others.append(path)
    if not runs:
        raise ConfigError(
            "none of these is a run directory",
            where=first_few(others),
            expected="a folder with config.yaml, which a run writes before its first step",
            remedy="name the run.dir of a run",
        )
    if others:
        print_line(f"{pluralize(len(others), 'path')} without a run: {first_few(others)}", sys.stderr)
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    parser = Arguments(prog="dpo-dist report", description=__doc__)
    help_text = "run directory, which may still be training; several are compared"
    parser.add_argument("runs", type=strip_key, metavar="RUN", nargs="+", help=help_text)
    output = "page to write; default: report.html in RUN, or for several runs.html in this folder"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)
    options = parser.parse_args(arguments)
    try:
        runs = _runs(options.runs)
        if len(runs) > 1:
            path = options.output or Path("runs.html")
            for line in compare_runs(runs, path):
                print_line(line)
        else:
            [run] = runs
            path = options.output or run.report
            history = RunHistory(run)
            rows = history.rows()
            write_page(run, path, rows)
            if options.output is None and rows:
                draw_curves(rows, run.curves, run.path.name)
                print_line(f"curves: {run.curves}")
                history.write_csv()
            remove_abandoned(run.metrics)  # a start that was killed may have left half a picture
        results = []
        for run in runs:
            facts = PageFacts(run)
            result = {
                "run_dir": str(run),
                "outcome": facts.summary.get("exit"),
                "final": facts.section("final"),
                "verdict": facts.section("verdict"),
            }
            results.append(result)
    except OSError as error:
        remedy = "check the files of the run, permissions and free space, or set --output page.html"
        where = str(options.output or options.runs[0])
        raise ConfigError("the page cannot be written", where=where, got=str(error), remedy=remedy) from error
    content = {"page": str(path), "runs": results}
    console_on(sys.stdout, "plain").result("report", content, [f"report: {path}"])
    return ExitCode.completed


if __name__ == "__main__":
    exit_after(main)
