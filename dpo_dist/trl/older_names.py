"""Arguments of older scripts of TRL, up from 0.7, in today's words: `DPOConfig`, `KTOConfig`, trainers.

A name with the same meaning today is written anew, one without an effect is left out, both with a line. For
those that are gone one error says what to write.
"""

import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import TrainingArguments

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.process import this_rank

log = logging.getLogger(__name__)

_TABLE = own_table(Path(__file__).with_suffix(".yaml"))
_RENAMED: Mapping[str, str] = _TABLE["renamed"]
_WITHOUT_EFFECT: Sequence[str] = _TABLE["without_effect"]
_GONE: Mapping[str, str] = _TABLE["gone"]
LONGEST_PROMPT = "max_prompt_length"
_OFF = (None, False, "", 0)
_REWRITTEN: dict[str, Callable[[Any, Mapping[str, Any]], dict[str, Any]]] = {
    # Steps, where both are set, as it was.
    "warmup_ratio": lambda value, given: {} if given.get("warmup_steps") else {"warmup_steps": value},
    "rpo_alpha": lambda value, given: {
        "loss_type": [*_as_list(given.get("loss_type", "sigmoid")), "sft"],
        "loss_weights": [*(given.get("loss_weights") or [1.0]), value],
    },
    "group_by_length": lambda _, __: {"train_sampling_strategy": "group_by_length"},
    "adafactor": lambda _, __: {"optim": "adafactor"},
    "include_inputs_for_metrics": lambda _, __: {"include_for_metrics": ["inputs"]},
}
"""Arguments of today by the value that is not off, and the other arguments."""
_LOGGING_DIR = "TENSORBOARD_LOGGING_DIR"


def _as_list(value: Any) -> list[Any]:
    return [*value] if isinstance(value, list | tuple) else [value]


class ArgumentError(ConfigError, TypeError):
    """Arguments that today's TRL does not have; scripts catch a TypeError, and find the name in its words."""

    def __init__(self, where: str, faults: Mapping[str, str], got: str = "") -> None:
        """Make it of what to write for each name."""
        super().__init__(
            f"{where}.__init__() got an unexpected keyword argument {next(iter(faults))!r}",
            got=got or ", ".join(faults),
            expected=f"arguments of TRL {trl.__version__}",
            remedy="; ".join(f"{name}: {words}" for name, words in faults.items()),
        )

    def __str__(self) -> str:
        return self.block().removeprefix(f"{self.title}: ")


def _todays(options: Mapping[str, Any], names: set[str], where: str) -> dict[str, Any]:
    """Return options with the names of today, `names`; say what was changed."""
    older = {name: value for name, value in options.items() if name not in names}
    today = {name: value for name, value in options.items() if name in names}
    lines, faults = list[str](), dict[str, str]()
    for name, value in older.items():
        is_off = any(value is off or value == off for off in _OFF)
        if name in _RENAMED:
            written = {_RENAMED[name]: value}
        elif name in _REWRITTEN and not is_off:
            written = _REWRITTEN[name](value, today)
        elif name in _WITHOUT_EFFECT or (is_off and name in {*_REWRITTEN, *_GONE, "logging_dir"}):
            lines.append(f"{name} is left out: it has no effect")
            continue
        elif name == "logging_dir":
            os.environ[_LOGGING_DIR] = str(value)
            lines.append(f"logging_dir is now the variable {_LOGGING_DIR} of the environment")
            continue
        else:
            faults[name] = _GONE.get(name, "TRL has no such argument")
            continue
        words = ", ".join(f"{key}={new!r}" for key, new in written.items() if "token" not in key)
        lines.append(f"{name} is now {words or 'another name'}" if written else f"{name} is left out")
        today |= written
    if faults.keys() == {LONGEST_PROMPT}:  # a trainer leaves it out if no prompt is longer
        today[LONGEST_PROMPT] = older[LONGEST_PROMPT]
    elif faults:
        raise ArgumentError(where, faults)
    for line in lines:
        _say(f"{where}: {line}")
    return today


def _fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config) if field.init}


class _OlderNames:
    """Takes older names, too; the fields are those of TRL's class."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        today = _todays(options, _fields(type(self)), type(self).__name__)
        if today.get("bf16") and "use_cpu" not in today and not torch.accelerator.is_available():
            today["use_cpu"] = True  # else transformers refuses bf16
            _say(f"{type(self).__name__}: use_cpu is True, because there is no accelerator")
        limits = {LONGEST_PROMPT: today.pop(LONGEST_PROMPT)} if LONGEST_PROMPT in today else {}
        super().__init__(*arguments, **today)
        vars(self).update(limits)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be of TRL's class in files: others open `training_args.bin` without this package."""
        kind = {DPOConfig: trl.DPOConfig, KTOConfig: trl.KTOConfig}.get(type(self), type(self))
        return object.__new__, (kind,), vars(self)


class DPOConfig(_OlderNames, trl.DPOConfig):  # type: ignore[misc]
    """TRL's `DPOConfig`, which takes older names of its arguments, too."""

    __init__ = functools.wraps(trl.DPOConfig.__init__)(_OlderNames.__init__)


class KTOConfig(_OlderNames, trl.KTOConfig):  # type: ignore[misc]
    """TRL's `KTOConfig`, which takes older names of its arguments, too."""

    __init__ = functools.wraps(trl.KTOConfig.__init__)(_OlderNames.__init__)


def trainer_arguments(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a trainer with today's names.

    Those that are arguments of its configuration today are set there.
    """
    base = trl.KTOTrainer if issubclass(kind, trl.KTOTrainer) else trl.DPOTrainer
    config = KTOConfig if base is trl.KTOTrainer else DPOConfig
    own = set(inspect.signature(base.__init__).parameters)
    today = {name: value for name, value in options.items() if name in own}
    older = {name: value for name, value in options.items() if name not in own}
    if "tokenizer" in older:
        today["processing_class"] = older.pop("tokenizer")
        _say(f"{kind.__name__}: tokenizer is now processing_class")
    moved = _todays(older, _fields(config), kind.__name__)
    args = today.get("args")
    is_plain = isinstance(args, TrainingArguments) and not isinstance(args, trl.DPOConfig | trl.KTOConfig)
    if is_plain or (moved and args is None):
        given = {name: getattr(args, name) for name in _fields(TrainingArguments)} if is_plain else {}
        today["args"] = config(**{**given, **moved})
        _say(f"{kind.__name__}: its arguments are now a {config.__name__}")
    else:
        for name, value in moved.items():
            is_list = isinstance(getattr(args, name, None), list)
            setattr(args, name, _as_list(value) if is_list else value)
            if name != LONGEST_PROMPT:
                _say(f"{kind.__name__}: {name} is now an argument of {config.__name__}")
    return today


def check_prompts(args: Any, prepared: Any) -> None:
    """Say that a limit of prompts is left out; an `ArgumentError` if one of a data set may be longer."""
    limit = getattr(args, LONGEST_PROMPT, None)
    if limit is None:
        return
    words = "prompts of an unknown length"
    if isinstance(prepared, Dataset):
        longest = max(map(len, prepared["prompt_ids"]), default=0)
        words = f"a prompt of {longest} tokens" if longest > limit else ""
    if words:
        raise ArgumentError(
            type(args).__name__,
            {LONGEST_PROMPT: _GONE[LONGEST_PROMPT]},
            f"{LONGEST_PROMPT}={limit}, and {words}",
        )
    _say(f"{LONGEST_PROMPT}={limit} is left out: no prompt is longer")


def _say(line: str) -> None:
    if this_rank() == 0:
        log.warning("dpo_dist: %s", line)


say_once = functools.cache(_say)
