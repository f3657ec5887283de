"""A rule between the values of a run, and the functions that check rules."""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from functools import reduce
from operator import getitem
from typing import Any

from dpo_dist.config.keys import all_keys, as_written
from dpo_dist.config.mistakes import SCHEMA, raise_all
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.remedies import Remedy

Condition = Callable[[RunConfig], bool]
LOSS = "loss"
"""A rule's key for the loss: it means `loss.kind`, or `loss.terms` if the loss has terms."""


@dataclass(frozen=True)
class Rule:
    """A rule between values: a configuration breaks it if all parts of `when`, and `also`, are true.

    A part is `KEY=VALUE`, `KEY=VALUE|VALUE`, `KEY!=VALUE` or a bare KEY; the keys give an error's `where` and
    `got`. In `why` `{model.attention}` stands for the value of that key. If the command sets the
    key `resets` but not the first key of `when`, the first key goes back to its default.
    """

    when: str
    why: str
    remedy: str | Remedy | Callable[[RunConfig], Remedy]
    also: Condition = lambda _: True
    resets: str = ""

    def is_broken(self, config: RunConfig) -> bool:
        """Return whether a configuration breaks the rule."""
        return all(_holds(config, part) for part in self.when.split()) and self.also(config)

    def error(self, config: RunConfig) -> ConfigError:
        """Return the error of a configuration that breaks the rule."""
        loss_key = "loss.terms" if config.loss.terms else "loss.kind"
        keys = re.findall(r"(?:^| )([\w.]+)", self.when)
        names = [loss_key if key == LOSS else key for key in keys]
        values = [
            "+".join(config.loss.kinds) if key == LOSS else as_written(value_at(config, key)) for key in keys
        ]
        remedy = self.remedy(config) if callable(self.remedy) else self.remedy
        why = self.why.format(**vars(config))
        return ConfigError(why, where=", ".join(names), got=", ".join(values), remedy=remedy)


def _holds(config: RunConfig, part: str) -> bool:
    key, equals, values = part.partition("=")
    is_listed = as_written(value_at(config, key.rstrip("!"))) in values.split("|") if equals else True
    return is_listed is not key.endswith("!")


def unused(key: str, unless: str, remedy: str | Remedy = "", works: Condition = lambda _: False) -> Rule:
    """Return the rule that refuses a key without effect: the key is set, and `unless` and `works` are false.

    An `unless` without a value, such as LOSS, is only named in the error.
    """
    default, other = all_keys()[key].default, unless.partition("=")[0].rstrip("!")
    return Rule(
        f"{key} {other}",
        f"{key} has no effect with this {other}",
        Remedy.to_remove(key)
        + f", or {remedy or 'set ' + unless.replace('|', ' or ').replace('!=null', '=...')}",
        lambda c: (
            value_at(c, key, default) != default
            and not (other != unless and _holds(c, unless))
            and not works(c)
        ),
        resets="" if other == LOSS else other,  # loss=NAME gives all options of the loss
    )


def reset_unused(config: RunConfig, given: Collection[str], rules: Iterable[Rule]) -> RunConfig:
    """Reset a preset's options if a key of the command (`given`) takes their effect away."""
    for rule in rules:
        key = rule.when.partition(" ")[0]
        if rule.resets in given and key not in given and rule.is_broken(config):
            *sections, name = key.split(".")
            reduce(getitem, sections, values := asdict(config))[name] = all_keys()[key].default
            config, given = SCHEMA.validate_python(values), {*given, key}
    return config


def check_rules(config: RunConfig, rules: Iterable[Rule]) -> None:
    """Raise one error with every rule that a configuration breaks."""
    raise_all([rule.error(config) for rule in rules if rule.is_broken(config)])


def value_at(config: RunConfig, key: str, absent: Any = None) -> Any:
    """Return the value of a key; `absent` for a key of a section that is null, such as `model.adapter`."""
    if key == LOSS:
        return None
    *sections, name = key.split(".")
    section = reduce(getattr, sections, config)
    return absent if section is None else getattr(section, name)
