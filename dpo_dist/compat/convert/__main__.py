"""Translate a run of TRL, LLaMA-Factory, axolotl, ms-swift or open-instruct into a file for `dpo-dist train`.

The run is a YAML or JSON file of keys, a shell script, or a command between quotes. Comments in the new file
name every key that is not translated, and say why.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.compat.convert.reading import read
from dpo_dist.compat.convert.translate import translate_run
from dpo_dist.config.mistakes import explained
from dpo_dist.foundation.errors import Arguments, ConfigError, ExitCode, exit_after
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.streams import print_line, print_result
from dpo_dist.kit import FAILURES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    parser = Arguments(prog="dpo-dist convert", description=__doc__)
    parser.add_argument("run", metavar="FILE", help="YAML, JSON or shell script; or a command between quotes")
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", nargs="?", help="file to write; default: print it"
    )
    options = parser.parse_args(arguments)
    try:
        foreign = read(options.run)
    except FAILURES as error:
        [mistake] = explained(error, options.run)
        raise mistake from error
    text = translate_run(foreign).as_file()
    output = options.output
    if output is None:
        print_result(text)
        return ExitCode.completed
    if output.exists():
        raise ConfigError("this file exists", where=str(output), remedy="remove it, or name another")
    try:
        write_text(output, text)
    except OSError as error:
        raise ConfigError(
            "this file cannot be written", where=str(output), got=str(error.strerror), remedy="name another"
        ) from error
    print_line(f"written: {output}; next: dpo-dist train {shlex.quote(str(output))} --check")
    return ExitCode.completed


if __name__ == "__main__":
    exit_after(main)
