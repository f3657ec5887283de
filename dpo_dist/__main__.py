"""`dpo-dist VERB ...`, the same as `python -m dpo_dist.VERB ...`; without a verb, the list of verbs."""

import os
import sys
from difflib import get_close_matches

import dpo_dist
from dpo_dist.config.verbs import VERBS
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.foundation.streams import print_line


def main() -> int:
    """Become the program of a verb; else print the verbs and return the exit code."""
    verb, *arguments = sys.argv[1:] or [""]
    if verb in VERBS:
        os.execv(sys.executable, [sys.executable, "-m", f"dpo_dist.{verb}", *arguments])  # noqa: S606
    if verb == "--version":
        print_line(f"dpo_dist {dpo_dist.__version__}")
        return ExitCode.completed
    guess = [f"there is no verb {verb!r}; did you mean {name}?" for name in get_close_matches(verb, VERBS, 1)]
    lines = [f"  {name:<12}{row.help}" for name, row in VERBS.items()]
    print_line("\n".join([*guess, "usage: dpo-dist VERB ...; dpo-dist VERB --help", "", *lines]))
    return ExitCode.completed if verb in ("-h", "--help") else ExitCode.invalid


if __name__ == "__main__":
    sys.exit(main())
