"""`dpo-dist VERB ...`, the same as `python -m dpo_dist VERB ...`; without a verb, the list of verbs."""

import argparse
import os
import shlex
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import dpo_dist
from dpo_dist.foundation.errors import ConfigError, ErrorPrinter, ExitCode, exit_after
from dpo_dist.foundation.installed import pages
from dpo_dist.foundation.process import is_launched, this_rank
from dpo_dist.foundation.remedies import Typed
from dpo_dist.foundation.streams import print_line

DEVICES = Path("/dev")


def main() -> int:
    """Replace this process by the verb's program; without a verb, print the list and return the exit code."""
    verb, *arguments = sys.argv[1:] or [""]
    if verb == "--version":
        print_line(f"dpo_dist {dpo_dist.__version__}")
        return ExitCode.completed
    from dpo_dist.config.verbs import OWN, VERBS  # noqa: PLC0415  (slow: it reads the keys of tools)

    if verb == "train" and not {"-m", "--multirun"}.isdisjoint(arguments):  # as a program with Hydra sweeps
        verb = "sweep"
        arguments = [word for word in arguments if word not in ("-m", "--multirun")]
    if verb in VERBS:
        # RANK is not enough to know that a launcher started this process: some pods set RANK for all
        # programs.
        if VERBS[verb].is_one_process and this_rank() > 0 and "TORCHELASTIC_RUN_ID" in os.environ:
            return ExitCode.completed
        python = [sys.executable, *_python_options()]
        module = VERBS[verb].module
        if not VERBS[verb].is_one_process and not is_launched(os.environ):
            processes, arguments = _take_processes(arguments)
            if processes > 1 and {"-h", "--help"}.isdisjoint(arguments):
                module = VERBS["launch"].module
                arguments = ["--num_processes", str(processes), verb, *arguments]
        os.execv(sys.executable, [*python, "-m", module, *arguments])  # noqa: S606
    is_asked = verb in ("help", "-h", "--help")
    is_mistake = verb != "" and not is_asked
    if is_mistake and ErrorPrinter().is_document:
        exit_after(lambda: _refuse(verb))
    tools = {name: row for name, row in VERBS.items() if name not in OWN}
    lines = ["usage: dpo-dist VERB ...; dpo-dist VERB --help"]
    for title, verbs in (("train, and what a run needs", OWN), ("look at data, models and runs", tools)):
        lines += ["", f"{title}:", *(f"  {name:<12}{row.help}" for name, row in verbs.items())]
    lines += ["", f"pages: {pages()}; agents.md there is for coding agents"]
    if is_mistake:  # last, as the list fills a screen
        lines.append(f"\nthere is no verb {verb!r}; {_suggest(verb)}")
    print_line("\n".join(lines))
    return ExitCode.completed if is_asked else ExitCode.invalid


def _take_processes(arguments: list[str]) -> tuple[int, list[str]]:
    """Return how many processes to start, by `--processes N` or one for each GPU, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", nargs="?")
    option, others = parser.parse_known_args(arguments)
    if "--processes" in arguments or option.processes is not None:
        is_number = (option.processes or "").isdecimal() and int(option.processes) > 0
        return (int(option.processes), others) if is_number else (1, arguments)  # the verb refuses it
    if len(list(DEVICES.glob("nvidia[0-9]*"))) < 2:  # else each command would import torch here
        return 1, arguments
    import torch  # noqa: PLC0415  (slow)

    return torch.cuda.device_count(), arguments


def _python_options() -> list[str]:
    """Return Python's own options before `-m dpo_dist`, such as a launcher's `-u`."""
    before = sys.orig_argv[1 : -len(sys.argv)]
    return before[:-1] if before[-1:] == ["-m"] else []


def _refuse(verb: str) -> NoReturn:
    raise ConfigError(f"there is no verb {verb!r}", where=Typed(verb), remedy=_suggest(verb))


def _suggest(verb: str) -> str:
    """Return what to write for a verb that does not exist."""
    from dpo_dist.config.extensions import meanings_of  # noqa: PLC0415  (slow)
    from dpo_dist.config.verbs import VERBS  # noqa: PLC0415  (slow)

    answers = meanings_of(verb, "methods")
    if answers:
        return str(answers[0])
    if verb.startswith(("-", "+")) or "=" in verb or verb.endswith((".yaml", ".yml")):
        return f"write the verb first: dpo-dist train {shlex.quote(verb)}"
    commands = meanings_of(verb, "verbs")
    if commands:
        return f"write dpo-dist {commands[0]}"
    guesses = get_close_matches(verb.removeprefix("dpo_dist."), VERBS, 1)
    if guesses:
        return f"did you mean {guesses[0]}?"
    return "dpo-dist without a verb lists the verbs"


if __name__ == "__main__":
    sys.exit(main())
