"""`dpo-dist VERB ...`, the same as `python -m dpo_dist.VERB ...`; without a verb, the list of verbs."""

import os
import sys
from difflib import get_close_matches

import dpo_dist
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.foundation.streams import print_line

VERBS = {
    "train": "train a policy, from its last checkpoint if there is one",
    "precompute": "score the pairs of a run by the reference model, and store the log-probs",
    "evaluate": "score pairs with trained models and the reference",
    "compare": "ask several models the same prompts, side by side",
    "pairs": "make preference records, by scores, models and judges, or people",
    "doctor": "examine the data of a run, and encode them",
    "export": "write a checkpoint as a model folder; merge an adapter; average models",
    "report": "write the page of a run again, or of the difference of two",
    "store": "list, verify and clean a store of reference log-probs",
    "launch": "start a verb on several processes, with the arguments of accelerate launch",
}


def main() -> int:
    """Become the program of a verb; else print the verbs and return the exit code."""
    verb, *arguments = sys.argv[1:] or [""]
    if verb in VERBS:
        os.execv(sys.executable, [sys.executable, "-m", f"dpo_dist.{verb}", *arguments])  # noqa: S606
    if verb == "--version":
        print_line(f"dpo_dist {dpo_dist.__version__}")
        return ExitCode.completed
    guess = [f"there is no verb {verb!r}; did you mean {name}?" for name in get_close_matches(verb, VERBS, 1)]
    lines = [f"  {name:<12}{meaning}" for name, meaning in VERBS.items()]
    print_line("\n".join([*guess, "usage: dpo-dist VERB ...; dpo-dist VERB --help", "", *lines]))
    return ExitCode.completed if verb in ("-h", "--help") else ExitCode.invalid


if __name__ == "__main__":
    sys.exit(main())
