"""Translate a run of TRL, LLaMA-Factory, axolotl, ms-swift or open-instruct into a file for `dpo-dist train`.

The run is a YAML or JSON file of keys, a shell script, or a command between quotes. Comments in the new file
name every key that is not translated, and say why.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config.compose import FAILURES
from dpo_dist.config.mistakes import composition_error
from dpo_dist.foundation.errors import Arguments, ConfigError, ExitCode, exit_after
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.streams import print_line, print_result
from dpo_dist.tools.convert.reading import read
from dpo_dist.tools.convert.translate import translate_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    parser = Arguments(prog="dpo-dist convert", description=__doc__)
    parser.add_argument("run", metavar="FILE", help="YAML, JSON or shell script; or a command between quotes")
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", nargs="?", help="file to write; default: print it"
    )
    options = parser.parse_args(arguments)
    try:
        text = translate_run(read(options.run)).as_file()
        if options.output is None:
            print_result(text)
            return ExitCode.completed
        if options.output.exists():
            raise ConfigError(
                "this file exists", where=str(options.output), remedy="remove it, or name another"
            )
        write_text(options.output, text)
        print_line(
            f"written: {options.output}; next: dpo-dist train {shlex.quote(str(options.output))} --check"
        )
        return ExitCode.completed
    except FAILURES as error:
        raise composition_error(error, []) from error


if __name__ == "__main__":
    exit_after(main)
