"""From a verb's command line to its exit code.

A command line is Hydra's: overrides and options, in any order. Hydra only composes; `--help`, `--info` and
other questions about itself are passed on to it.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf

from dpo_dist.config.aliases import IN_OTHER_WORDS, SAME_MEANING, alias_of
from dpo_dist.config.keys import run_keys
from dpo_dist.config.load import HYDRA_VERSION, compose, config_dir, resolve, to_yaml
from dpo_dist.config.parse import parse_overrides
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.suggest import likely, unknown_key, written
from dpo_dist.errors import ConfigError, DpoDistError, ExitCode, disk_error

_RANK_0_SECONDS = 60
# Options by the word that they are known by here, and whether a value follows.
_OPTIONS = {
    "--help": False,
    "--hydra-help": False,
    "--version": False,
    "--resolve": False,
    "--info": False,
    "--check": False,
    "--multirun": False,
    "--cfg": True,
    "--package": True,
    "--config-dir": True,
    "--config-name": True,
}
_SHORT = {
    "-h": "--help",
    "-m": "--multirun",
    "-i": "--info",
    "-c": "--cfg",
    "-p": "--package",
    "-cd": "--config-dir",
    "-cn": "--config-name",
}
_HYDRAS_OWN = ("--help", "--hydra-help", "--version", "--info")
_WHERE = "command line"


@dataclass(frozen=True)
class Arguments:
    """A command line, divided."""

    options: dict[str, str]
    overrides: list[str]

    @property
    def own_folder(self) -> Path | None:
        """The user's folder of configuration groups."""
        return Path(self.options["--config-dir"]) if "--config-dir" in self.options else None


def run_verb(main: Callable[[RunConfig], int], check: Callable[[RunConfig], int] | None = None) -> NoReturn:
    """Run `main` with the configuration that the command line describes, and end with its exit code.

    A `DpoDistError` is printed as one block, by one rank only; other exceptions keep their traceback.

    Args:
        main: the verb.
        check: what `--check` runs in its place, on the first rank only.
    """
    try:
        exit_code = _run(main, check)
        sys.stdout.flush()
    except DpoDistError as error:
        _print(error)
        exit_code = error.exit_code
    except BrokenPipeError:
        # Who reads the output has closed it: --help | head.
        os._exit(0)
    except Exception as fault:  # whatever it is, this process must not hang at exit
        told = disk_error(fault)
        if told is not None:
            _print(told)
        else:
            traceback.print_exc()
        exit_code = ExitCode.failed if told is None else told.exit_code
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    # All is written, and at interpreter exit threads of communication libraries may still abort the process.
    os._exit(exit_code)


def _print(error: DpoDistError) -> None:
    """Print `error` if this process is the one that does.

    Before the processes have joined, most errors come up in all of them. The launcher ends the others once
    rank 0 has printed its own and left; a rank that it does not end is alone with its error.
    """
    if error.reporting_rank is None and _rank() > 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(error.exit_code))
        time.sleep(_RANK_0_SECONDS)
    if error.reporting_rank in (None, _rank()):
        sys.stderr.write(error.block() + "\n")


def _run(main: Callable[[RunConfig], int], check: Callable[[RunConfig], int] | None) -> int:
    arguments = divide(sys.argv[1:])
    if any(option in arguments.options for option in _HYDRAS_OWN) or arguments.options.get("--cfg") in (
        "hydra",
        "all",
    ):
        _ask_hydra(arguments)
        return 0
    composed = compose(
        arguments.overrides, arguments.own_folder, name=arguments.options.get("--config-name", "config")
    )
    if "--cfg" in arguments.options:
        return _show(composed, arguments)
    config = resolve(composed, arguments.overrides, arguments.own_folder)
    if "--check" not in arguments.options:
        return main(config)
    if check is None:
        raise ConfigError("this verb has no --check", where=_WHERE, remedy="remove --check")
    return check(config) if _rank() == 0 else 0


def divide(arguments: Sequence[str]) -> Arguments:
    """Options and overrides of a command line, wherever they are on it.

    Raises:
        ConfigError: an option that does not exist, or one without its value.
    """
    options: dict[str, str] = {}
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        # "-" alone would be no option, and "~key" is Hydra's way to delete one.
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        name, equals, value = argument.partition("=")
        option = _SHORT.get(name, name)
        if equals and option in _OPTIONS and not _OPTIONS[option] and option != "--info":
            raise ConfigError(f"{name} takes no value", where=_WHERE, got=argument, remedy=f"write {name}")
        if option not in _OPTIONS:
            raise _unknown_option(name, value if equals else (rest[0] if rest else ""))
        if _OPTIONS[option] and not equals:
            if not rest:
                remedy = f"write {option} VALUE"
                raise ConfigError(f"{name} needs a value", where=_WHERE, got=argument, remedy=remedy)
            value = rest.pop(0)
        if option == "--info" and rest and "=" not in rest[0] and not rest[0].startswith("-"):
            value = rest.pop(0)
        options[option] = value
    _check_options(options, overrides)
    return Arguments(options, overrides)


def _check_options(options: dict[str, str], overrides: Sequence[str]) -> None:
    mode = next((line for line in overrides if "hydra.mode=" in line), None)
    if "--multirun" in options or mode is not None:
        raise ConfigError(
            "one command is one run",
            where=_WHERE,
            got=mode or "--multirun",
            remedy="to sweep, launch one process group (one job) for each value",
        )
    cfg = options.get("--cfg", "job")
    if cfg not in ("job", "hydra", "all"):
        raise ConfigError(
            "--cfg shows one of three configurations",
            where=_WHERE,
            got=cfg,
            expected="job, hydra or all",
            remedy="write --cfg job",
        )
    folder = options.get("--config-dir")
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            "--config-dir is no folder",
            where=_WHERE,
            got=folder,
            expected="a folder that holds groups: experiment/NAME.yaml, loss/NAME.yaml",
            remedy="check the path; it is relative to where you are",
        )


def _unknown_option(name: str, value: str) -> ConfigError:
    plain = name.lstrip("-").replace("-", "_")
    value = "" if value.startswith("-") else value
    found = likely(name, _OPTIONS) if name.startswith("--") else []
    if plain in run_keys():
        remedy = f"write {written(plain, value, run_keys()[plain])}"
    elif alias_of(plain, SAME_MEANING) or alias_of(plain, IN_OTHER_WORDS):
        remedy = unknown_key(plain, value).remedy
    elif found:
        remedy = f"did you mean {found[0]}?"
    else:
        remedy = (
            "keys are written without dashes, such as loss.beta=0.2; options of the launcher come before -m"
        )
    return ConfigError(
        f"there is no option {name}",
        where=_WHERE,
        got=name,
        expected=f"key=value, or one of {', '.join(_OPTIONS)}",
        remedy=remedy,
    )


def _show(composed: DictConfig, arguments: Arguments) -> int:
    """Print what a run would be made of, wrong values too; these are then said."""
    try:
        text = to_yaml(resolve(composed, arguments.overrides, arguments.own_folder))
    except DpoDistError:
        if _rank() == 0:
            sys.stdout.write(OmegaConf.to_yaml(composed))
            sys.stdout.flush()
        raise
    if _rank() == 0:
        sys.stdout.write(_part(text, arguments.options.get("--package")))
    return 0


def _part(text: str, package: str | None) -> str:
    if package is None:
        return text
    part = OmegaConf.select(OmegaConf.create(text), package)
    if part is None:
        raise unknown_key(package, where="--package")
    return OmegaConf.to_yaml(part) if OmegaConf.is_config(part) else f"{part}\n"


def _ask_hydra(arguments: Arguments) -> None:
    """Have Hydra answer what only it can; it exits with 1 on its own faults."""
    parse_overrides(arguments.overrides)
    options = [text for name, value in arguments.options.items() for text in (name, value) if text]
    sys.argv[1:] = (
        [*options, *arguments.overrides] if "--info" not in options else [*arguments.overrides, *options]
    )
    if _rank() == 0:
        hydra.main(version_base=HYDRA_VERSION, config_path=str(config_dir()), config_name="config")(print)()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
