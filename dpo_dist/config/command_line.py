"""Run a verb with the configuration of its command line; Hydra only composes."""

import contextlib
import io
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf

import dpo_dist
from dpo_dist.config.keys import Key, all_keys, run_keys, section_meanings
from dpo_dist.config.load import HYDRA_VERSION, compose, config_dir, group_folders, resolve, to_yaml
from dpo_dist.config.losses import KINDS, LossKind, kinds_using
from dpo_dist.config.names import KEY_ALIASES, REMEDIES, alias_of, likely
from dpo_dist.config.overrides import (
    COMMAND_LINE,
    assignment,
    is_within,
    parse_overrides,
    preset_names,
    unknown_key,
    unknown_name,
    with_quoted_names,
)
from dpo_dist.config.run_folder import existing_run
from dpo_dist.config.schema import ZERO_STAGES, ConsoleStyle, RunConfig
from dpo_dist.config.user_code import (
    check_doors,
    check_not_hidden,
    check_places,
    open_doors,
    read_config,
    written_values,
)
from dpo_dist.config.verbs import TRAIN, keys_of
from dpo_dist.foundation.errors import (
    ConfigError,
    DpoDistError,
    ExitCode,
    StoppedError,
    disk_error,
    first_line,
)
from dpo_dist.foundation.process import check_launch, note_exit_code, this_rank
from dpo_dist.foundation.streams import (
    open_closed_streams,
    output_of_objects,
    print_result,
    printable_lines,
    reserve_output,
)
from dpo_dist.foundation.text import without_secrets


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


_CHOICES = ("experiment", "model", "model.path")
_NAME = "of_run_dir"


@contextlib.contextmanager
def with_former_run(arguments: Arguments, made: Collection[str] = ()) -> Iterator[Arguments]:
    """Yield the arguments with the config.yaml of `run.dir` as their experiment.

    They are yielded unchanged if they choose a model or an experiment themselves, if they have a folder of
    groups, or if the run directory has no config.yaml.

    Args:
        arguments: of a verb that evaluates a run, such as `run.dir=output/a evaluation.data=[hard.jsonl]`.
        made: the keys of folders that the verb makes.

    Raises:
        ConfigError: `run.dir` is missing or no run directory, or its config.yaml cannot be read.
    """
    values = {override.key_or_group: override.value() for override in parse_overrides(arguments.overrides)}
    is_whole = any(choice in values for choice in _CHOICES) or arguments.own_folder is not None
    named = None if is_whole else values.get("run.dir")
    if not is_whole and named is None and "--cfg" not in arguments.options:
        raise ConfigError(
            "no run is named",
            where="run.dir",
            expected="the directory of a run: run.dir=output/run-1a2b3c4d",
            remedy="set run.dir; or write the command of the run: model.path=... and its other keys",
        )
    file = None if named is None else existing_run(Path(str(named)).expanduser()).config
    if file is None or not file.is_file():
        yield arguments
        return
    text = _configuration(file, values, made)
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / "experiment" / f"{_NAME}.yaml"
        preset.parent.mkdir()
        preset.write_text(f"# @package _global_\n{text}", encoding="utf-8")
        overrides = [f"+experiment={_NAME}", *arguments.overrides]
        yield Arguments(arguments.options | {"--config-dir": folder}, overrides)


def _configuration(file: Path, given: Collection[str], made: Collection[str]) -> str:
    """Return the content of a config.yaml, which another program may have written again without comments.

    Raises:
        ConfigError: it has no keys, cannot be read, asks for code that `given` does not ask for, or
            names a new folder elsewhere.
    """
    try:
        text = read_config(file)
        written_values(text)
        content = OmegaConf.create(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            "the configuration of this run cannot be read",
            where=str(file),
            got=first_line(error),
            remedy="restore the file, or write the command of the run: model.path=... and its other keys",
        ) from error
    values: Any = OmegaConf.to_container(content)
    check_doors(values, given, file)
    check_places(values, made, given, file)
    check_not_hidden(values, file)
    # Written again: in the file a comment can be a command to Hydra, such as to move all keys to a section.
    return OmegaConf.to_yaml(content)


def usage(
    command: str, about: str, options: Mapping[str, str], folders: Sequence[Path], own: Collection[str]
) -> str:
    """Return the text of `--help`.

    Args:
        command: the beginning of the command line: `accelerate launch -m dpo_dist.train`.
        about: text about the verb, with an example.
        options: each option with its meaning.
        folders: the folders of configuration groups.
        own: keys and sections that the verb reads.
    """
    groups = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
    chosen = {"experiment": "run", "reference": "reference.mode"}  # a key that tells whether a preset is read
    groups = [group for group in groups if chosen.get(group, group) in own]
    presets = {group: ", ".join(preset_names(group, folders)) for group in groups}
    return "\n".join(
        [
            f"usage: {command} [KEY=VALUE ...] [GROUP=PRESET ...] [+experiment=NAME] [OPTION ...]",
            *([f"\n{about.strip()}"] if about else []),
            "\nsections (--help SECTION lists its keys, --help KEY explains one, e.g. --help loss.beta):",
            *_columns(
                {name: text for name, text in section_meanings().items() if name in own and "." not in name}
            ),
            "\npresets (GROUP=PRESET, +experiment=NAME):",
            *(f"  {group}: {names}" for group, names in presets.items() if names),
            "\noptions:",
            *_columns(options),
            "\nexit codes: 0 completed, 1 bug or findings of the doctor, 2 configuration or data error,",
            "3 diverged; the same command resumes after 69 lost process, 75 stopped with a checkpoint\n",
        ]
    )


def explain(key: str, folders: Sequence[Path], own: Collection[str] = ()) -> str:
    """Return the text of `--help KEY` for a key, a section or a group of presets.

    Args:
        key: `loss.beta`, `loss`, `data.train.weight` (also `data.train[0].weight`), `experiment`.
        folders: the folders of configuration groups.
        own: keys that are suggested first.

    Raises:
        ConfigError: there is no such key.
    """
    name = re.sub(r"\[\d*\]", "", key.removeprefix("+"))
    keys = {full.replace("[]", ""): row for full, row in all_keys().items()}
    below = {full: row for full, row in keys.items() if full != name and is_within(full, name)}
    presets = preset_names(name, folders) if re.fullmatch(r"\w+", name) else []
    if name not in keys and not below and not presets:
        mapping, _, last_part = name.rpartition(".")
        kind = keys[mapping].of if mapping in keys else None
        raise unknown_key(name, own=own) if kind is None else unknown_name(last_part, mapping, kind)
    lines = (
        _facts(keys[name])
        if name in keys
        else [f"{name}: {section_meanings().get(name, 'a group of presets')}"]
    )
    if below:
        lines += [
            "",
            f"keys of {name} (default):",
            *_columns({row.name: _short(row) for row in below.values()}),
        ]
    if presets:
        plus = "+" if name == "experiment" else ""
        lines += ["", f"presets: {plus}{name}=" + "|".join(presets)]
    return "\n".join(lines) + "\n"


def _facts(row: Key) -> list[str]:
    facts = {
        "meaning": row.meaning,
        "type": row.type_words,
        "default": row.default_words or "none, it must be set",
        "verbs": ", ".join(row.verbs),
        "digest": "part of the run's digest: another value is another run"
        if row.defines_result
        else "not part of the run's digest: a run can be resumed with another value",
    }
    section, _, option = row.name.rpartition(".")
    kinds = kinds_using(option) if section == "loss" else []
    if kinds:
        facts["kinds"] = "all" if len(kinds) == len(KINDS) else ", ".join(kinds)
    lines = [row.name, *(f"  {label + ':':<10}{text}" for label, text in facts.items())]
    if row.type is LossKind:
        lines += ["", "kinds (formulas in the notation of docs/losses.md):"]
        lines += _columns({kind: f"{facts.source}: {facts.formula}" for kind, facts in KINDS.items()})
    return lines


def _short(row: Key) -> str:
    return f"{row.meaning} ({row.default_words or 'must be set'})"


def _columns(rows: Mapping[str, str]) -> list[str]:
    width = max(len(name) for name in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows.items()]


_RANK_0_SECONDS = 60
_BY_SIGNAL = 128
_ABSENT = object()
_OF_ONE_PROCESS = ("doctor", "export")


def run_verb(
    main: Callable[[RunConfig], int],
    check: Callable[[RunConfig], int] | None = None,
    *,
    verb: str = TRAIN,
    of_run: bool = False,
    made: Collection[str] = (),
    about: str | None = None,
) -> NoReturn:
    """Run `main` with the configuration of the command line, and exit with its exit code.

    A `DpoDistError` is printed as one block, by one rank only; an interrupt by the user in one line. Other
    exceptions keep their traceback.

    Args:
        main: the verb.
        check: the function of `--check`, called in place of `main`, on the first rank only.
        verb: its name, a row of `verbs.VERBS`.
        of_run: whether the verb is about a run that exists: its configuration may be that of `run.dir`.
        made: with `of_run`, the keys of folders that the verb makes.
        about: the docstring of the verb's module, which `--help` prints.
    """
    open_closed_streams()
    errors = _Errors(_asks_for_json(sys.argv[1:]))
    try:
        completed = partial(with_former_run, made=made) if of_run else contextlib.nullcontext
        exit_code = _run(main, check, verb, completed, errors, about or "")
    except DpoDistError as error:
        _print(error, errors)
        exit_code = error.exit_code
    except KeyboardInterrupt:
        exit_code = ExitCode.interrupted
        if this_rank() == 0:
            errors.print("interrupted", {"message": "interrupted", "exit_code": int(exit_code)})
    except SystemExit as ended:
        exit_code, words = _end_of(ended)
        if words and this_rank() == 0:
            errors.print(words, {"message": words, "exit_code": exit_code})
    except Exception as bug:  # any exception: the process must not hang at exit
        error_of_disk = disk_error(bug)
        exit_code = ExitCode.failed if error_of_disk is None else error_of_disk.exit_code
        if error_of_disk is not None:
            _print(error_of_disk, errors)
        else:
            message = {"message": first_line(bug), "exit_code": int(exit_code)}
            errors.print(traceback.format_exc().rstrip(), {"title": "bug", **message})
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    note_exit_code(exit_code)
    # At interpreter exit, threads of communication libraries could still abort the process.
    os._exit(exit_code)


def _end_of(ended: SystemExit) -> tuple[int, str]:
    """Return the exit code of a `SystemExit`, and the line to print: a text that it has, or its signal."""
    if not isinstance(ended.code, int):
        return (ExitCode.completed, "") if ended.code is None else (ExitCode.failed, str(ended.code))
    number = ended.code - _BY_SIGNAL
    is_signal = number in {*signal.Signals}
    return ended.code, f"ended by {signal.Signals(number).name}" if is_signal else ""


@dataclass
class _Errors:
    """Prints errors without secrets: as text to standard error, or as JSON objects to standard output."""

    is_json: bool

    def print(self, text: str, content: Mapping[str, Any]) -> None:
        """Print one error; `content` is for programs. A stream that fails is ignored."""
        text, content = without_secrets([text, content])
        with contextlib.suppress(OSError):
            if self.is_json:
                now = datetime.now().astimezone().isoformat(timespec="seconds")
                output = output_of_objects()
                output.write(json.dumps({"kind": "error", "time": now, **content}) + "\n")
                output.flush()
            else:
                sys.stderr.write(printable_lines(text) + "\n")
                sys.stderr.flush()


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Return whether a command line that has not been read yet asks for JSON."""
    styles = [text.lstrip("+") for text in arguments if text.lstrip("+").startswith("console.style=")]
    return bool(styles) and styles[-1] == f"console.style={ConsoleStyle.json}"


def _print(error: DpoDistError, errors: _Errors) -> None:
    """Print `error` if this process is the one that reports it.

    Before the processes have joined, most errors occur in all of them. The launcher ends the others when
    rank 0 has printed its error and exited; a rank that is not ended has an error that rank 0 does not have.
    A stop by a signal is printed by rank 0 only, which gets one of the launcher.
    """
    if error.is_printed:
        return
    if error.reporting_rank is None and this_rank() > 0:
        if isinstance(error, StoppedError):
            return
        signal.signal(signal.SIGTERM, lambda *_: os._exit(error.exit_code))
        time.sleep(_RANK_0_SECONDS)
    if error.reporting_rank in (None, this_rank()):
        errors.print(error.block(), error.as_dict())


def _run(
    main: Callable[[RunConfig], int],
    check: Callable[[RunConfig], int] | None,
    verb: str,
    completed: Callable[[Arguments], contextlib.AbstractContextManager[Arguments]],
    errors: _Errors,
    about: str,
) -> int:
    own = keys_of(verb, trains=verb == "pairs")  # with rounds it trains
    arguments = divide(sys.argv[1:], own)
    if (text := _answer(arguments, verb, about, own, has_check=check is not None)) is not None:
        if this_rank() == 0:
            print_result(text)
        return ExitCode.completed
    if "--info" in arguments.options:
        _ask_hydra(arguments)
        return ExitCode.completed
    with completed(arguments) as whole:
        composed = compose(whole.overrides, whole.own_folder, verb)
        if "--cfg" in whole.options:
            return _show(composed, whole, verb)
        config = resolve(composed, whole.overrides, whole.own_folder, verb)
    errors.is_json = config.console.style is ConsoleStyle.json
    if errors.is_json:
        reserve_output()
    check_launch(os.environ, _repeated(config))
    if this_rank() == 0:
        doors = without_secrets(open_doors(config))
        sys.stderr.write("".join(f"{printable_lines(line)}\n" for line in doors))
    if "--check" not in arguments.options:
        return main(config)
    if check is None:
        raise ConfigError("this verb has no --check", where=COMMAND_LINE, remedy="remove --check")
    return check(config) if this_rank() == 0 else ExitCode.completed


def _repeated(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Return settings that a launcher may repeat, by the names of its variables."""
    kind, trainer, name = config.parallelism.kind, config.trainer, "ACCELERATE_DEEPSPEED_"
    optimizer, weights = config.parallelism.offload_optimizer, config.parallelism.offload_parameters
    norm = config.optim.max_grad_norm
    return {
        "ACCELERATE_MIXED_PRECISION": (f"model.dtype={config.model.dtype}", config.model.dtype),
        f"{name}ZERO_STAGE": (f"parallelism.kind={kind}", str(ZERO_STAGES[kind])),
        f"{name}OFFLOAD_OPTIMIZER_DEVICE": (f"parallelism.offload_optimizer={optimizer}", optimizer),
        f"{name}OFFLOAD_PARAM_DEVICE": (f"parallelism.offload_parameters={weights}", weights),
        "ACCELERATE_GRADIENT_CLIPPING": (f"optim.max_grad_norm={norm}", str(norm)),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            f"trainer.global_batch_pairs={trainer.global_batch_pairs}, from which accumulation follows",
            "1",
        ),
    }


def _answer(
    arguments: Arguments, verb: str, about: str, own: Collection[str], *, has_check: bool
) -> str | None:
    """Return the text of --help or --version; None without these options."""
    if "--version" in arguments.options:
        return f"dpo_dist {dpo_dist.__version__}\n"
    key = arguments.options.get("--help")
    folders = group_folders(arguments.own_folder)
    if key:
        return explain(key, folders, own)
    options = {
        f"{name}{f', {option.short}' if option.short else ''} {option.value}": option.meaning
        for name, option in OPTIONS.items()
        if has_check or name != "--check"
    }
    command = f"{'python' if verb in _OF_ONE_PROCESS else 'accelerate launch'} -m dpo_dist.{verb}"
    return None if key is None else usage(command, about, options, folders, own)


def _show(composed: DictConfig, arguments: Arguments, verb: str) -> int:
    """Print the resolved configuration; one with wrong values is printed as composed, before its error."""
    try:
        config = resolve(composed, arguments.overrides, arguments.own_folder, verb)
        text = to_yaml(config)
    except DpoDistError:
        if this_rank() == 0:
            print_result(OmegaConf.to_yaml(composed))
        raise
    if this_rank() == 0:
        print_result(_part(text, arguments.options.get("--package")))
    return ExitCode.completed


def _part(text: str, package: str | None) -> str:
    if package is None:
        return text
    part = OmegaConf.select(OmegaConf.create(text), package, default=_ABSENT)
    if part is _ABSENT:
        raise unknown_key(package, where="--package")
    if OmegaConf.is_config(part):
        return OmegaConf.to_yaml(part)
    return f"{json.dumps(part) if part is None or isinstance(part, bool) else part}\n"


def _ask_hydra(arguments: Arguments) -> None:
    """Print Hydra's own answer; it exits with 1 on an error of its own."""
    parse_overrides(arguments.overrides)
    options = [text for name, value in arguments.options.items() for text in (name, value) if text]
    sys.argv[1:] = [*arguments.overrides, *options]
    if this_rank() > 0:
        return
    answer = io.StringIO()
    try:
        with contextlib.redirect_stdout(answer):
            hydra.main(version_base=HYDRA_VERSION, config_path=str(config_dir()), config_name="config")(
                print
            )()
    finally:
        print_result(answer.getvalue())
