"""Print the page for coding agents: `dpo-dist agent-docs`."""

from collections.abc import Sequence
from pathlib import Path

import dpo_dist
from dpo_dist.foundation.errors import Arguments, ExitCode, exit_after
from dpo_dist.foundation.streams import print_result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print docs/agents.md of a source checkout, or its copy in a wheel; return the exit code."""
    Arguments(prog="dpo-dist agent-docs", description=__doc__).parse_args(arguments)
    package = Path(dpo_dist.__file__).parent
    page = package / "agents.md"
    if not page.is_file():
        page = package.parent / "docs" / page.name
    print_result(page.read_text(encoding="utf-8"))
    return ExitCode.completed


if __name__ == "__main__":
    exit_after(main)
