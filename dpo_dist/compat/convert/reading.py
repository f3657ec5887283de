"""Read a run of another trainer from a file of keys, from the command that starts it, or from a script."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from dpo_dist.compat.other_trainers import trainer_of
from dpo_dist.config.compose import read_keys
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import HIDDEN
from dpo_dist.kit import run_keys

_PROGRAMS = (
    ("open-instruct", r"(.*/)?open_instruct/dpo\w*\.py", ""),
    ("axolotl", r"axolotl\.cli\.train", ""),
    ("axolotl", r"(.*/)?axolotl", "train"),
    ("ms-swift", r"(.*/)?swift", "rlhf|sft"),
    ("LLaMA-Factory", r"(.*/)?(llamafactory-cli|lmf)", "train"),
    ("TRL", r"(.*/)?trl", r"[a-z_]+"),
    ("TRL", r"(.*/)?(run_)?(dpo|kto|orpo|cpo|simpo)(_vlm)?\.py|trl\.scripts\.\w+", ""),
)
"""Each trainer with its program and the word after it, as regular expressions."""
_PROCESSES = re.compile(r"(?i)(?:num.processes|nproc.per.node|num.gpus)[= ](\d+)")
"""Matches the number of processes of a node, as accelerate, torchrun, ms-swift and DeepSpeed write it."""
_PIXELS = re.compile(r"\bMAX_PIXELS=(\d+)")
"""Matches ms-swift's environment variable for the largest image."""
_SHELL = re.compile(
    r"""(?P<kept>'[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?P<computed>\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`)"""
    r"|(?P<end>\n|;|&&|\|\|?)"
    r"|(?<!\S)\#[^\n]*|\d?&?>>?\s*(?:&\d|[^\s;|&]+)",  # comments and redirections
    re.DOTALL,
)
_SECRET = re.compile(
    r"(?i).*((api|access|auth|private|secret|hub|hf|wandb)_?key|secrets?|passw\w*|credentials?|webhook\w*)"
    r"|(?!(pad|eos|bos|unk|stop)_).*token"
)
"""Names of keys whose values are secret."""
_ASSIGNED_SECRET = re.compile(r"(?i)(\b\w*(?:key|token|secret|passw\w*)=)\S+")


class ForeignRun(NamedTuple):
    """Another trainer's run in that trainer's keys, without secrets; `name`: the file or command."""

    trainer: str
    keys: dict[str, Any]
    name: str


def read(source: str) -> ForeignRun:
    """Read a file, or a command given as one text; raise one of `FAILURES` if no trainer is recognised."""
    file = Path(source)
    name = file.name
    trainer = None
    keys = dict[str, Any]()
    if " " in source and not os.path.exists(source):  # noqa: PTH110 (no error: a command is long)
        name = "the command"
        trainer, keys = _started(source, name)
    elif file.suffix in (".yaml", ".yml", ".json"):
        keys = read_keys(file)
        if keys and keys.keys() <= run_keys().keys():
            remedy = f"dpo-dist train {shlex.quote(source)} --check"
            raise ConfigError("this is a file of dpo-dist", where=source, remedy=remedy)
        trainer = trainer_of(keys)
    else:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".py":
            trainer, keys = _started(text, source)
    if not trainer:
        raise ConfigError(
            "this is not a run of a trainer that dpo-dist knows",
            where=source,
            expected="three or more keys of TRL, LLaMA-Factory, axolotl, ms-swift or open-instruct, or a "
            "command that starts one of them",
            remedy="write the run's options (such as those of its DPOConfig) as keys into a YAML file, and "
            "convert that; for single options, dpo-dist train KEY=VALUE says what to write",
        )
    return ForeignRun(trainer, _public(keys), name)


def _started(text: str, where: str) -> tuple[str | None, dict[str, Any]]:
    """Return trainer and keys of the run that a script starts, if any; raise if it starts several."""
    starts = list(filter(None, map(_start, _commands(text))))
    if not starts:
        return None, {}
    if len(starts) > 1:
        remedy = "write the command of one of them into a file of its own"
        raise ConfigError(f"this script starts {len(starts)} runs", where=where, remedy=remedy)
    [(trainer, launcher, arguments)] = starts
    keys, files = _flags(arguments)
    if "config" in keys:
        files.append(str(keys.pop("config")))
    for name in files:
        keys = {**read_keys(Path(name)), **keys}
    if re.search("config.file|deepspeed|zero|fsdp", launcher):
        keys.setdefault("deepspeed", launcher)
    # With several nodes, torchrun's number counts the processes of one node only.
    has_nodes = re.search(r"(?i)nnodes[= ](?!1(?:\s|$))", launcher)
    count = _PROCESSES.search(launcher)
    if count and not has_nodes:
        keys.setdefault("num_processes", int(count[1]))
    pixels = _PIXELS.search(text)
    if pixels:
        keys.setdefault("max_pixels", int(pixels[1]))
    return trainer if keys.keys() - {"rl"} else None, keys


def _start(words: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """Return the trainer that a command starts, the text before its program, and the words after it."""
    for at, word in enumerate(words):
        for trainer, program, verb in _PROGRAMS:
            rest = list(words[at + 1 :])
            next_word = rest[0] if verb and rest else ""
            if re.fullmatch(program, word) and re.fullmatch(verb, next_word):
                method = re.split(r"[/._]", re.sub(r"(_vlm)?\.py$", "", word))[-1]
                if verb:
                    method = rest.pop(0)
                if trainer == "TRL" or method == "sft":
                    rest.append(f"--rl={method}")
                return trainer, " ".join(words[:at]), rest
    return None


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command in a shell script, with variables that the script sets filled in."""
    variables: dict[str, str] = {}

    def marked(part: re.Match[str]) -> str:
        return part["kept"] or (part["computed"] and "$(...)") or (part["end"] and "\0") or ""

    for command in _SHELL.sub(marked, text).replace("\\\n", " ").split("\0"):
        try:
            words = shlex.split(Template(command).safe_substitute(variables))
        except ValueError:  # a quote that is not closed: this is not a command
            continue
        for name, equals, value in (word.partition("=") for word in words if word != "export"):
            if not equals or not name.isidentifier():
                break
            variables[name] = value
        yield words


def _flags(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of `--name value ...`, `--name=value` and `name=value`, and the words before them."""
    texts = dict[str, list[str]]()
    files = list[str]()
    name = ""
    for word in words:
        if word in ("$@", "$*"):  # words of the script's caller
            continue
        flag = re.fullmatch(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", word, re.DOTALL)
        if flag:
            name = flag[1].replace("-", "_")
            texts[name] = [] if flag[2] is None else [flag[2]]
        elif name:
            texts[name].append(word)
        elif "=" in word:
            key, _, value = word.partition("=")
            texts[key] = [value]
        else:
            files.append(word)
    keys: dict[str, Any] = {}
    for name, values in texts.items():
        if not values and name.startswith("no_"):
            keys[name.removeprefix("no_")] = False
        else:
            words_of_flag = list(map(_value, values))
            keys[name] = words_of_flag[0] if len(values) == 1 else words_of_flag or True
    return keys, files


def _value(text: str) -> Any:
    """Return a word parsed as JSON, or as Python's True, False or None; any other word is a text."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def _public(value: Any) -> Any:
    """Return a value without secrets, of the types that JSON has: YAML has dates, bytes, other keys."""
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if not isinstance(value, Mapping):
        return _ASSIGNED_SECRET.sub(rf"\g<1>{HIDDEN}", str(value))
    public = {}
    for name, inner in value.items():
        is_secret = _SECRET.fullmatch(str(name)) and inner and inner is not True
        public[str(name)] = HIDDEN if is_secret else _public(inner)
    return public
