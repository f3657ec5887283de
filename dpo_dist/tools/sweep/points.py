"""The points of a sweep: several values for a key, in Hydra's grammar, and all their combinations."""

from collections.abc import Iterable, Sequence
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from dpo_dist.foundation.errors import ConfigError, DpoDistError, raise_all
from dpo_dist.foundation.fields import plain
from dpo_dist.foundation.remedies import COMMAND_LINE, Typed
from dpo_dist.kit import Rule, RunConfig, load_run_config, parse_overrides, run_keys, value_at
from dpo_dist.tools.sweep.extension import SweepConfig

Points: TypeAlias = dict[tuple[str, ...], RunConfig]
"""The runs of a sweep by the overrides in which they differ: `("loss.beta=0.1", "loss.kind=ipo")`."""
_MOST_POINTS = 1000


def point_settings(words: Iterable[str], config: RunConfig) -> dict[str, Any]:
    """Return a point's swept keys with their values, as text where a value is no number, word or null."""
    settings = dict[str, Any]()
    for word in words:
        key, _, text = word.lstrip("+").partition("=")
        value: Any = text
        if "." in key and key in run_keys():
            value = plain(value_at(config, key))
        settings[key] = value if value is None or isinstance(value, bool | int | float | str) else text
    return settings


def load_points(
    words: Sequence[str], own_folder: Path | None = None, *, mistakes: Iterable[ConfigError] = ()
) -> Points:
    """Return the checked configuration of each point of a sweep: all combinations of the swept overrides.

    Swept overrides follow Hydra's grammar: `loss.beta=0.1,0.2`, `trainer.seed=range(3)`, `loss=choice(ipo)`.

    Raises:
        ConfigError: all mistakes of all points, as in `load_run_config`; or two points are the same run.
    """
    choices = [_choices(word) for word in words]
    swept = [place for place, options in enumerate(choices) if options != [words[place]]]
    count = prod(map(len, choices))
    if count > _MOST_POINTS:
        raise ConfigError(
            f"a sweep has at most {_MOST_POINTS:,} points",
            where=COMMAND_LINE,
            got=" ".join(words[place] for place in swept),
            remedy="sweep fewer values, or divide them among several sweeps",
        )
    if not swept:
        raise ConfigError(
            "no key has several values",
            where=COMMAND_LINE,
            remedy="write several values, such as loss.beta=0.05,0.1, or train this one: dpo-dist train",
        )
    points = Points()
    found = dict[tuple[str, ...], DpoDistError]()  # each mistake once
    point_of_run = dict[str | None, tuple[str, ...]]()
    for choice in product(*choices):
        point = tuple(choice[place] for place in swept)
        try:
            config = load_run_config(choice, own_folder, verb="sweep", mistakes=mistakes)
        except ConfigError as error:
            for part in error.parts or (error,):
                found.setdefault((part.message, part.where, part.got), part)
            continue
        same = point_of_run.setdefault(config.run.dir, point)
        if same != point or point in points:
            found["same", *point] = ConfigError(
                f"this point is the same run as {' '.join(same)}",
                where=" ".join(point),
                remedy="sweep keys that define the result of a run, each value once; if run.dir is given, "
                "add run.dir=null: each point has a folder of its own below run.root",
            )
        points[point] = config
    raise_all(list(found.values()))
    return points


def _choices(word: str) -> list[str]:
    """Return a word for each value of a swept one, of too many only the first; else the word itself."""
    overrides, _ = parse_overrides([word])
    if not overrides or not overrides[0].is_sweep_override():
        return [word]
    [override] = overrides
    message = "this range has no values"
    remedy = "write range(3) or range(0,9,3)"
    if override.is_interval_sweep():
        message = "an interval has no points to train"
        remedy = f"list its values: {override.key_or_group}=0.1,0.2 or '{override.key_or_group}=range(1,4)'"
    elif texts := _texts(override):
        return [f"{override.get_key_element()}={text}" for text in texts]
    raise ConfigError(message, where=Typed(word), remedy=remedy)


def _texts(override: Override) -> list[str]:
    try:
        return list(islice(override.sweep_string_iterator(), _MOST_POINTS + 1))
    except (ArithmeticError, ValueError, HydraException):
        return []


def _has_no_such_part(config: RunConfig) -> bool:
    index, parts = config.section_of(SweepConfig).share
    return index >= parts


def rules_of_verb(_verb: str) -> list[Rule]:
    """Return the rule, which is the same for every verb."""
    remedy = "set sweep.part to I/N with I from 1 to N"
    return [Rule("sweep.part", "there is no such part", remedy, _has_no_such_part)]
