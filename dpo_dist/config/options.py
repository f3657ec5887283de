"""Divide a command line into options and overrides; refuse options that would be ignored."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dpo_dist.config.aliases import KEY_ALIASES, REMEDIES, alias_of
from dpo_dist.config.keys import run_keys
from dpo_dist.config.messages import assignment, unknown_key
from dpo_dist.config.overrides import COMMAND_LINE, with_quoted_names
from dpo_dist.config.spelling import likely
from dpo_dist.errors import ConfigError


class Option(NamedTuple):
    """An option in the help text."""

    short: str
    value: str
    """Its value in the help text; in brackets if it is optional."""
    meaning: str


OPTIONS = {
    "--help": Option("-h", "[KEY]", "print this text, or explain a section or key"),
    "--version": Option("", "", "print the version of dpo_dist"),
    "--check": Option("", "", "check values, model, tokenizer, data and folders, without a GPU, and exit"),
    "--cfg": Option("-c", "job", "print the resolved configuration of the run and exit"),
    "--package": Option("-p", "KEY", "with --cfg job: print this section or key only"),
    "--config-dir": Option("-cd", "DIR", "add your own presets and experiments: DIR/experiment/NAME.yaml"),
    "--info": Option("-i", "[TOPIC]", "print how Hydra composes, e.g. --info defaults-tree"),
}
_QUESTIONS = ("--help", "--version", "--check", "--cfg", "--info")
"""Options in place of the verb's work."""
_LONG = {option.short: name for name, option in OPTIONS.items() if option.short}


@dataclass(frozen=True)
class Arguments:
    """A command line, divided into options with their values and overrides."""

    options: dict[str, str]
    overrides: list[str]

    @property
    def own_folder(self) -> Path | None:
        """The user's folder of configuration groups."""
        return Path(self.options["--config-dir"]) if "--config-dir" in self.options else None


def divide(arguments: Sequence[str], own: Collection[str] = ()) -> Arguments:
    """Divide a command line into options and overrides, in any order; errors suggest keys of `own`.

    Raises:
        ConfigError: an option does not exist, or lacks its value.
    """
    options: dict[str, str] = {}
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            overrides.append(with_quoted_names(argument))
            continue
        name, equals, value = argument.partition("=")
        option = _LONG.get(name, name)
        if option not in OPTIONS:
            raise _unknown_option(name, value if equals else "".join(rest[:1]), own)
        takes = OPTIONS[option].value
        if equals and not takes:
            raise ConfigError(
                f"{name} takes no value", where=COMMAND_LINE, got=argument, remedy=f"write {name}"
            )
        is_optional = takes.startswith("[")
        if takes and not equals and not (is_optional and _is_override_or_option(rest[:1])):
            if not rest:
                remedy = f"write {option} VALUE"
                raise ConfigError(f"{name} needs a value", where=COMMAND_LINE, got=argument, remedy=remedy)
            value = rest.pop(0)
        if option in options:
            raise ConfigError(
                f"{option} is given twice", where=COMMAND_LINE, got=argument, remedy="remove one of them"
            )
        options[option] = value
    _check_questions(options, overrides)
    _check_values(options)
    return Arguments(options, overrides)


def _is_override_or_option(following: Sequence[str]) -> bool:
    return not following or "=" in following[0] or following[0].startswith("-")


def _check_questions(options: dict[str, str], overrides: list[str]) -> None:
    """Refuse options and keys of which one would be ignored."""
    questions = [name for name in _QUESTIONS if name in options]
    if len(questions) > 1:
        raise ConfigError(
            f"{' and '.join(questions)} cannot be given together",
            where=COMMAND_LINE,
            got=" ".join(questions),
            remedy="write one of them",
        )
    further = [text for text in overrides if "=" not in text]
    if options.get("--help") and further:
        raise ConfigError(
            "--help explains one key",
            where=COMMAND_LINE,
            got=f"{options['--help']}, {', '.join(further)}",
            remedy="write --help KEY once for each",
        )


def _check_values(options: dict[str, str]) -> None:
    if options.get("--cfg", "job") != "job":
        raise ConfigError(
            "--cfg prints the configuration of the run only",
            where=COMMAND_LINE,
            got=options["--cfg"],
            expected="job",
            remedy="write --cfg job",
        )
    if "--package" in options and not {"--cfg", "--info", "--help"} & set(options):
        raise ConfigError(
            "--package has no effect without --cfg",
            where=COMMAND_LINE,
            got=f"--package {options['--package']}",
            remedy="write --cfg job --package KEY, or remove --package",
        )
    folder = options.get("--config-dir")
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            "--config-dir is no folder",
            where=COMMAND_LINE,
            got=folder,
            expected="a folder of groups: experiment/NAME.yaml, loss/NAME.yaml",
            remedy="check the path; it is relative to the working directory",
        )


def _unknown_option(name: str, value: str, own: Collection[str]) -> ConfigError:
    plain = name.lstrip("-").replace("-", "_")
    value = "" if value.startswith("-") else value
    if plain in run_keys():
        remedy = f"write {assignment(plain, value, run_keys()[plain])}"
    elif (
        alias_of(plain, KEY_ALIASES)
        or alias_of(plain, REMEDIES)
        or any(key.endswith(f".{plain}") for key in own)
    ):
        remedy = unknown_key(plain, value, own=own, is_strict=bool(own)).remedy
    elif name.startswith("--") and (found := likely(name, OPTIONS)):
        remedy = f"did you mean {found[0]}?"
    else:
        remedy = "keys have no dashes, such as loss.beta=0.2; options of the launcher come before -m"
    return ConfigError(
        f"there is no option {name}",
        where=COMMAND_LINE,
        got=name,
        expected=f"key=value, or one of {', '.join(OPTIONS)}",
        remedy=remedy,
    )
