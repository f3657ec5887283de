"""Print the page for coding agents: `dpo-dist agent-docs`."""

from collections.abc import Sequence

from dpo_dist.foundation.errors import Arguments, ExitCode, exit_after
from dpo_dist.foundation.installed import pages
from dpo_dist.foundation.streams import print_result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print docs/agents.md; return the exit code."""
    Arguments(prog="dpo-dist agent-docs", description=__doc__).parse_args(arguments)
    print_result((pages() / "agents.md").read_text(encoding="utf-8"))
    return ExitCode.completed


if __name__ == "__main__":
    exit_after(main)
