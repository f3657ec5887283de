"""Translate a file of keys of TRL, LLaMA-Factory, axolotl or others into a file for `dpo-dist train`.

The file is YAML or JSON. Comments in the new one name every key that is not translated, and say why.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.compat.convert.translate import translate
from dpo_dist.foundation.errors import Arguments, ConfigError, ExitCode, exit_after, raise_all
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.streams import print_line, print_result
from dpo_dist.kit import FAILURES, explained, read_keys, run_keys


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    parser = Arguments(prog="dpo-dist convert", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML or JSON file of another trainer")
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", nargs="?", help="file to write; default: print it"
    )
    options = parser.parse_args(arguments)
    file: Path = options.file
    output: Path | None = options.output
    if file.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(
            "this is no file of keys",
            where=str(file),
            expected="a YAML or JSON file",
            remedy="write the options of the command or script as keys into a YAML file: beta: 0.1",
        )
    try:
        keys = read_keys(file)
    except FAILURES as error:
        raise_all(explained(error, str(file)))
    if keys and keys.keys() <= run_keys().keys():
        remedy = f"dpo-dist train {shlex.quote(str(file))} --check"
        raise ConfigError("this is a file of dpo-dist", where=str(file), remedy=remedy)
    text = translate(keys).as_file()
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
