"""Write the report page of a run again, or a page about the difference of two runs, from their files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config.run_folder import existing_run
from dpo_dist.foundation.errors import ConfigError, DpoDistError, ExitCode
from dpo_dist.foundation.streams import open_closed_streams, print_error, print_line
from dpo_dist.insight.pages.charts import draw_curves
from dpo_dist.insight.pages.run import write_difference, write_page
from dpo_dist.training.metrics_log import read_latest_rows


def _run(text: str) -> Path:
    return Path(text.removeprefix("run.dir=")).expanduser()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    open_closed_streams()
    parser = argparse.ArgumentParser(prog="python -m dpo_dist.report", description=__doc__)
    parser.add_argument("run", type=_run, metavar="RUN", help="run directory, also of a run that is training")
    parser.add_argument("other", type=_run, metavar="OTHER", nargs="?", help="run to compare it with")
    output = "page to write; default: report.html in RUN, or difference-RUN-OTHER.html in this folder"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)
    given = parser.parse_args(arguments)
    try:
        run = existing_run(given.run)
        if given.other is None:
            path = write_page(run, given.output)
            if given.output is None and (rows := read_latest_rows(run)):
                draw_curves(rows, run.curves, run.path.name)
                print_line(f"curves: {run.curves}")
        else:
            path = write_difference((run, existing_run(given.other)), given.output)
        print_line(f"report: {path}")
        return ExitCode.completed
    except DpoDistError as error:
        return print_error(error)
    except (OSError, ValueError) as error:
        remedy = "check the files of the run, permissions and free space, or set --output page.html"
        where = str(given.output or given.run)
        return print_error(
            ConfigError("the page cannot be written", where=where, got=str(error), remedy=remedy)
        )


if __name__ == "__main__":
    sys.exit(main())
