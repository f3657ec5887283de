"""The state of a translation: the other trainer's keys that are left, our keys, and comments.

In names and comments "theirs" is the other trainer's, "ours" is dpo_dist's.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.config.compose import parse_overrides
from dpo_dist.config.fields import as_written
from dpo_dist.config.keys import run_keys, verb_keys
from dpo_dist.config.mistakes import as_tree, fits
from dpo_dist.config.other_trainers import advice_on, equivalents, find_advice, is_switch
from dpo_dist.foundation.text import without_secrets
from dpo_dist.tools.convert.reading import ForeignRun

EMPTY: tuple[Any, ...] = (None, "", [], {})
_KEYS = {"loss": "loss.kind", "parallelism": "parallelism.kind", "reference": "reference.mode"}
_KEYS |= {"optim": "optim.kind", "tracking": "tracking.to"}
"""The key that the name of a preset sets; presets of losses set other keys too, as in their papers."""
_LONGEST = 60
_TRAINERS: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("trainers.yaml").read_text(encoding="utf-8")
)


class Translation:
    """A translation: their keys that are `left`, the `values` of our keys, `comments` on keys left out.

    `about`: lines about the whole run; `reasons`: why a key of theirs is left out, by its name; `unused`: the
    reasons of options that have no effect there, but would have one here.
    """

    def __init__(self, foreign: ForeignRun) -> None:
        self.trainer, keys, self.name = foreign
        self.facts = _TRAINERS[self.trainer]
        self.left, self.values, self.comments = dict(keys), dict[str, Any](), list[str]()
        self.about, self.reasons, self.unused = list[str](), dict[str, str](), dict[str, str]()
        self.unneeded: set[str] = set()
        """Their keys that are left out without a change of the run."""
        self.origins: dict[str, tuple[str, Any]] = {}
        """For each of our keys: the key of theirs from which it comes, with its value there."""
        self.not_default: set[str] = set()
        """Our keys that must not get the other trainer's default."""
        if isinstance(keys.get("model"), str):
            self.left["model_name_or_path"] = self.left.pop("model")
        for name in (
            "lr_scheduler_kwargs",
            "model_init_kwargs",
            "trl",
        ):  # the keys in these mappings have other names than all keys outside them
            if isinstance(inner := keys.get(name), dict):
                self.left |= inner
                del self.left[name]
        self.computed = {
            key
            for key, value in self.left.items()
            if re.search(r"\$[\w({]|^`", as_written(value)) and "template" not in key
        }
        """Their keys whose values only a shell can compute."""
        for key in sorted(self.computed):
            self.comment(key, self.left.pop(key), "the shell computes it: write the value")

    def take(self, *keys: str, default: Any = None) -> Any:
        """Remove and return the value of the first of these keys that has one of the default's type."""
        kind: Any = object if default is None else type(default)
        kind = (int, float) if kind in (int, float) else kind
        keys_with_value = [
            key for key in keys if self.left.get(key) not in EMPTY and isinstance(self.left[key], kind)
        ]
        value = self.left.pop(keys_with_value[0]) if keys_with_value else default
        for key in keys_with_value[1:]:
            if (other := self.left.pop(key)) != value:
                self.comment(key, other, f"{keys_with_value[0]} overrides it")
        return value

    def comment(self, key: str, value: Any, reason: str, *, is_needed: bool = True) -> None:
        """Add a comment that says why a key of theirs is left out; `is_needed`: it has an effect there."""
        text = " ".join(as_written(value).split())
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        self.comments.append(f"{key}: {text} — {reason}")
        self.reasons[key] = reason
        if not is_needed:
            self.unneeded.add(key)

    def set(self, target: str, value: Any, key: str, written: Any) -> None:
        """Set a key of ours from a key of theirs, if the value fits and ours is not set yet."""
        if not fits(target, value):
            self.comment(key, written, f"{target} cannot have this value")
        elif target not in self.values:
            self.values[target], self.origins[target] = value, (key, written)
        elif self.values[target] != value:
            self.comment(key, written, f"{target} is already {as_written(self.values[target])}")

    def translate(self, key: str, value: Any) -> None:
        """Set our keys for a key of theirs, or comment why it is left out."""
        text, name = as_written(value), "optimizer" if key == "optim" else key
        exact, general = find_advice(name, text), advice_on(name, text)
        known = [] if general else [ours for ours in verb_keys("train") if "." in ours]
        unsectioned = [ours for ours in known if name in (ours, ours.rpartition(".")[2])]
        targets = [_KEYS.get(target, target) for target in equivalents(name, "keys") or unsectioned]
        words = [
            text.lower(),
            *equivalents(text, "values"),
            [word.strip() for word in text.split(",")],
            [value],
        ]
        words = [] if isinstance(value, dict) else value[:1] if isinstance(value, list) else words
        fitting = [(to, form) for to in targets for form in (value, *words) if fits(to, form)]
        advice = next(iter((*exact, *general)), None)
        has_value = general != advice_on(name, "")  # the words have the user's value
        if fitting and not exact:
            self.set(*fitting[0], key, value)
        elif advice and (exact or value is True or has_value) and (written := _keys_of(advice.write)):
            for to, kept in written.items():
                self.set(to, kept, key, value)
        elif advice and advice.drops:
            self.comment(key, value, advice.text, is_needed=False)
        elif advice and value is False and is_switch(name):
            self.comment(key, value, "not needed: it is off", is_needed=False)
        elif advice:
            self.comment(key, value, advice.text)
        else:
            unfit = f"{targets[0]} cannot have this value" if targets else "no counterpart is known"
            self.comment(key, value, unfit)

    def as_file(self) -> str:
        """Return the content of a file for `train`, without secrets; comments name what is not translated."""
        lines = [*self.about, *(["Not translated:"] if self.comments else []), *self.comments]
        comments = "".join(f"# {' '.join(line.split())}\n" for line in lines)
        comments = "".join(letter for letter in comments if letter.isprintable() or letter == "\n")
        order = list(run_keys())
        keys = as_tree({key: self.values[key] for key in sorted(self.values, key=order.index)})
        return str(without_secrets(comments + yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)))


def _keys_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the keys that words set; none if one is unknown or does not fit."""
    overrides, unread = parse_overrides(words)
    given = ((override.key_or_group, override.value()) for override in overrides)
    written = {_KEYS.get(key, key): value for key, value in given}
    is_whole = not unread and all(key in run_keys() and fits(key, value) for key, value in written.items())
    return written if is_whole else {}


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, the values of a mapping, or the names in a text with commas."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [entry for entry in values if entry is not None]


def finite_number(value: Any) -> float | None:
    """Return a finite number, also if it is written as text; None for anything else."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
