"""Run a verb with the configuration of its command line; Hydra only composes."""

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf

import dpo_dist
from dpo_dist.config.console_schema import ConsoleStyle
from dpo_dist.config.foreign_code import open_doors
from dpo_dist.config.former_run import with_former_run
from dpo_dist.config.help import explain, usage
from dpo_dist.config.load import HYDRA_VERSION, compose, config_dir, group_folders, resolve, to_yaml
from dpo_dist.config.messages import unknown_key
from dpo_dist.config.options import OPTIONS, Arguments, divide
from dpo_dist.config.overrides import COMMAND_LINE, parse_overrides
from dpo_dist.config.schema import ZERO_STAGES, RunConfig
from dpo_dist.config.verbs import TRAIN, keys_of
from dpo_dist.errors import (
    ConfigError,
    DpoDistError,
    ExitCode,
    StoppedError,
    disk_error,
    first_line,
)
from dpo_dist.launch_environment import check_launch, this_rank
from dpo_dist.progress_file import note_exit_code
from dpo_dist.safe_stream import (
    open_closed_streams,
    output_of_objects,
    print_result,
    printable_lines,
    reserve_output,
)
from dpo_dist.secret_text import without_secrets

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
