"""Write the report page of a run again, or a page about the difference of two runs, from their files."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.errors import ConfigError, DpoDistError, ExitCode
from dpo_dist.report.run_page.difference import names_of, write_difference
from dpo_dist.report.run_page.page import write_page

_MOST_SUGGESTED = 3
_NAME_CHARACTERS = 80


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    given = _parser().parse_args(arguments)
    try:
        folders = [_run_folder(path) for path in (given.run, given.other) if path is not None]
        path = _write(folders, given.output, given.price)
    except DpoDistError as error:
        fault = error
    except OSError as error:
        fault = ConfigError(
            "the page cannot be read or written",
            where=str(error.filename or given.output or given.run),
            got=error.strerror or str(error),
            remedy="check permissions and free space, or write it elsewhere with --output FILE",
        )
    else:
        sys.stdout.write(f"report: {path}\n")
        return ExitCode.completed
    sys.stderr.write(fault.block() + "\n")
    return fault.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dpo_dist.report", description=__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run directory, also of a run that is training"
    )
    parser.add_argument("other", type=Path, metavar="OTHER", nargs="?", help="the run to compare it with")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page; default: report.html in RUN, or difference-RUN-OTHER.html in this folder",
    )
    parser.add_argument(
        "--price",
        type=_price,
        metavar="NUMBER",
        help="price of a GPU for an hour, in place of tracking.price_per_gpu_hour",
    )
    return parser


def _price(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is no price: a number >= 0 is expected")
    return value


def _run_folder(path: Path) -> RunFolder:
    """Return a run directory.

    Raises:
        ConfigError: `path` is none.
    """
    folder = RunFolder(path)
    if any(file.is_file() for file in (folder.config, folder.log_history, folder.metrics_table)):
        return folder
    below = sorted(file.parent for file in path.glob("*/config.yaml"))[:_MOST_SUGGESTED]
    raise ConfigError(
        "this is no run directory",
        where=str(path),
        got="a file"
        if path.is_file()
        else "a folder without a run's files"
        if path.exists()
        else "no such folder",
        expected="a folder with config.yaml, which a run writes at its start",
        remedy=f"name one run, such as {' or '.join(map(str, below))}"
        if below
        else "name the run.dir of a run",
    )


def _write(folders: Sequence[RunFolder], output: Path | None, price: float | None) -> Path:
    if output is not None and output.is_dir():
        raise ConfigError(
            "--output is a folder", where=str(output), expected="the file to write, such as page.html"
        )
    if len(folders) == 1:
        return write_page(folders[0], price, output)
    first, second = folders
    if first.path.resolve() == second.path.resolve():
        raise ConfigError(
            "both are the same run directory",
            where=str(first.path.resolve()),
            remedy="name two runs, or one for its own page",
        )
    path = output or Path(f"difference-{'-'.join(map(_short, names_of((first, second))))}.html")
    write_difference((first, second), path, price)
    return path


def _short(name: str) -> str:
    return name.replace("/", "-")[-_NAME_CHARACTERS:]


if __name__ == "__main__":
    sys.exit(main())
