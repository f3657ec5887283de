"""Read a run of another trainer: a file of its keys, or the command that starts it, or a script with it."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_dist.config.keys import run_keys
from dpo_dist.config.load import FAILURES, read_keys
from dpo_dist.config.mistakes import trainer_of
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import HIDDEN

_SUFFIXES = (".yaml", ".yml", ".json")
_PROGRAMS = (
    ("open-instruct", r"(.*/)?open_instruct/dpo\w*\.py", ""),
    ("axolotl", r"axolotl\.cli\.train", ""),
    ("axolotl", r"(.*/)?axolotl", "train"),
    ("ms-swift", r"(.*/)?swift", "rlhf|sft"),
    ("LLaMA-Factory", r"(.*/)?(llamafactory-cli|lmf)", "train"),
    ("TRL", r"(.*/)?trl", r"[a-z_]+"),
    ("TRL", r"(.*/)?(run_)?(dpo|kto|orpo|cpo|simpo)\.py|trl\.scripts\.\w+", ""),
)
"""Trainer, its program, and the word after it."""
_PROCESSES = ("nproc_per_node", "NPROC_PER_NODE", "num_gpus")
"""Processes of a node, in the words of torchrun, of ms-swift and of DeepSpeed."""
_SHELL = re.compile(
    r"""('[^']*'|"(?:\\.|[^"\\])*"|\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`|\\.)"""  # kept
    r"|(\n|;|&&|\|\|?)"  # ends a command
    r"|(?<!\S)\#[^\n]*|\d?&?>>?\s*(?:&\d|[^\s;|&]+)",  # dropped: comments, redirections
    re.DOTALL,
)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})")
_QUOTIENT = re.compile(r"\$\(+(?:expr)?(\d+(?:[*/]\d+)*)\)+")
_SECRET = re.compile(
    r"(?i).*((api|access|auth|private|secret|hub|hf|wandb)_?key|secrets?|passw\w*|credentials?|webhook\w*)"
    r"|(?!(pad|eos|bos|unk|stop)_).*token"
)
"""Names of keys whose values are secret."""
_ASSIGNED_SECRET = re.compile(r"(?i)(\b\w*(?:key|token|secret|passw\w*)=)\S+")


class Foreign(NamedTuple):
    """A run of another trainer, by its own keys, without values of secret ones; `name` says what was read."""

    trainer: str
    keys: dict[str, Any]
    name: str


def read(given: str) -> Foreign:
    """Return what a file or a command, given as one text, says; raise one of `FAILURES` if unknown."""
    file, keys = Path(given), dict[str, Any]()
    is_command = " " in given and not os.path.exists(given)  # noqa: PTH110 (no error: a command is long)
    if is_command and (found := _started(given, Path(), "the command")):
        return found
    if file.suffix in _SUFFIXES:
        keys = read_keys(file)
    elif not is_command and file.suffix != ".py":
        if found := _started(file.read_text(encoding="utf-8"), file.parent, given):
            return found
        with contextlib.suppress(*FAILURES):
            keys = read_keys(file)
    if keys and keys.keys() <= run_keys().keys():
        remedy = f"dpo-dist train {shlex.quote(given)} --check"
        raise ConfigError("this is a file of dpo-dist", where=given, remedy=remedy)
    if (trainer := trainer_of(keys)) is None:
        remedy = "of single keys: dpo-dist train KEY=VALUE says what to write"
        if file.suffix == ".py":
            arguments = "the arguments of its DPOConfig, model_name_or_path and dataset_name"
            remedy = f"write {arguments} as keys of a YAML file, and convert that"
        raise ConfigError(
            "this is no run of a trainer that is known here",
            where=given,
            expected="three or more keys of TRL, LLaMA-Factory, axolotl, ms-swift or open-instruct, or a "
            "command that starts one of them",
            remedy=remedy,
        )
    return Foreign(trainer, _without_secrets(keys), file.name)


def _started(text: str, folder: Path, where: str) -> Foreign | None:
    """Return the run that a shell script starts, or None; raise a ConfigError if it starts several."""
    if not (found := [start for words in _commands(text) if (start := _start(words))]):
        return None
    if len(found) > 1:
        remedy = "write the command of one of them into a file of its own"
        raise ConfigError(f"this script starts {len(found)} runs", where=where, remedy=remedy)
    trainer, launcher, arguments = found[0]
    keys, files = _flags(arguments)
    files += [str(keys.pop("config"))] if trainer == "TRL" and "config" in keys else []
    for name in files:
        if "$" in name:
            remedy = "write its words out, or convert the file of keys that it names"
            raise ConfigError("only a shell knows a word of this command", got=name, remedy=remedy)
        # Paths are relative to where the command is typed, often the folder of the script.
        file = next((place for place in (Path(name), folder / name) if place.exists()), Path(name))
        keys = read_keys(file) | keys
    options, _ = _flags(launcher)
    for name in ("deepspeed_config_file", "zero_stage", "config_file", "use_deepspeed", "use_fsdp"):
        if name in options:
            keys.setdefault("deepspeed", f"{name} {options[name]}")
    if isinstance(count := next((options[name] for name in _PROCESSES if name in options), None), int):
        nodes = options.get("nnodes", options.get("NNODES", 1))
        options["num_processes"] = count * nodes if isinstance(nodes, int) else f"{count} x {nodes}"
    if "num_processes" in options:
        keys.setdefault("num_processes", options["num_processes"])
    return Foreign(trainer, _without_secrets(keys), Path(where).name) if keys.keys() - {"rl"} else None


def _start(words: Sequence[str]) -> tuple[str, list[str], list[str]] | None:
    """Return the trainer that a command starts, the words before its program, and those after."""
    for at, word in enumerate(words):
        for trainer, program, verb in _PROGRAMS:
            rest = list(words[at + 1 :])
            if re.fullmatch(program, word) and re.fullmatch(verb, rest[0] if verb and rest else ""):
                method = rest.pop(0) if verb else re.split(r"[/._]", word.removesuffix(".py"))[-1]
                says = trainer == "TRL" or method == "sft"
                return trainer, list(words[:at]), [*rest, *([f"--rl={method}"] if says else [])]
    return None


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell script; a variable has its value if the script gives one."""
    variables: dict[str, str] = {}

    def kept(part: re.Match[str]) -> str:
        if part[2]:
            return "\0"
        # One word without spaces.
        return re.sub(r"\s", "", part[1]) if (part[1] or "")[:1] in ("$", "`") else part[1] or ""

    for command in _SHELL.sub(kept, text.replace("\\\r\n", "\\\n")).replace("\\\n", " ").split("\0"):
        line = _VARIABLE.sub(lambda name: variables.get(name[1] or name[2], name[3] or name[0]), command)
        line = _QUOTIENT.sub(_quotient, line)
        try:
            words = shlex.split(line)
        except ValueError:  # prose
            continue
        if words[:1] == ["for"] and len(words) == 4:  # for LR in 1e-6
            words = [f"{words[1]}={words[3]}"]
        for name, equals, value in (word.partition("=") for word in words):
            if equals and name.isidentifier():
                variables[name] = value
            elif name not in ("export", "local", "declare", "readonly", "env"):
                break
        yield words


def _quotient(part: re.Match[str]) -> str:
    """Return the value of `$((128/8/2))` or `$(expr 16 / 2)`, as batches are computed."""
    value = 1
    for sign, digits in re.findall(r"(\D?)(\d+)", part[1]):
        if sign == "/" and not int(digits):
            return part[0]
        value = value // int(digits) if sign == "/" else value * int(digits)
    return str(value)


def _flags(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of `--name value ...`, `--name=value` and `name=value`, and the files of keys."""
    texts, files, name = dict[str, list[str]](), list[str](), ""
    for word in words:
        if word in ("$@", "$*"):  # more words may be given
            continue
        if flag := re.fullmatch(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", word, re.DOTALL):
            name = flag[1].replace("-", "_")
            texts[name] = [] if flag[2] is None else [flag[2]]
        elif name:
            texts[name].append(word)
        elif pair := re.fullmatch(r"([A-Za-z]\w*)=(.*)", word, re.DOTALL):
            texts[pair[1]] = [pair[2]]
        elif word.endswith(_SUFFIXES) or (word.startswith("$") and not files):
            files.append(word)
    keys: dict[str, Any] = {}
    for name, values in texts.items():
        if not values and name.startswith("no_"):
            keys[name.removeprefix("no_")] = False
        else:
            read = [_scalar(value) for value in values]
            keys[name] = read[0] if len(read) == 1 else read or True
    return keys, files


def _scalar(text: str) -> Any:
    """Return a word of a command as YAML reads it; 5e-7 is a number, too."""
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE):
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    return value if isinstance(value, bool | list | dict) else None if text in ("null", "None") else text


def _without_secrets(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_secrets(entry) for entry in value]
    if isinstance(value, str):
        return _ASSIGNED_SECRET.sub(rf"\g<1>{HIDDEN}", value)
    if not isinstance(value, Mapping):
        return value
    return {
        " ".join(str(name).split()): HIDDEN
        if _SECRET.fullmatch(str(name)) and inner and inner is not True
        else _without_secrets(inner)
        for name, inner in value.items()
    }
