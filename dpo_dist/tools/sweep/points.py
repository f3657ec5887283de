"""The points of a sweep: several values for a key, in Hydra's grammar, and all their combinations."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from functools import partial
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from dpo_dist.config.compose import Composition, names_chosen
from dpo_dist.config.keys import group_folders, preset_names
from dpo_dist.config.load import load_command
from dpo_dist.foundation.errors import ConfigError, DpoDistError, raise_all
from dpo_dist.foundation.fields import plain
from dpo_dist.foundation.remedies import COMMAND_LINE, Typed, to_write
from dpo_dist.foundation.text import first_few
from dpo_dist.foundation.user_code import find_function
from dpo_dist.kit import (
    FAILURES,
    RunConfig,
    fits,
    parse_overrides,
    run_keys,
    value_at,
)

Points: TypeAlias = dict[tuple[str, ...], RunConfig]
"""The runs of a sweep by the overrides in which they differ: `("loss.beta=0.1", "loss.kind=ipo")`."""
_MOST_POINTS = 1000
_SWEEP_IN_FILE = re.compile(r"(choice|float|int|interval|range|shuffle|sort|tag)\(.*\)", re.DOTALL)
"""Several values for a key in a file, where a comma may be that of a text."""


class Dimension(NamedTuple):
    """The values of a swept key."""

    key: str
    texts: Sequence[str]


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
    find_function.cache_clear()
    all_mistakes = list[DpoDistError](mistakes)
    folders = group_folders(own_folder)
    command = partial(Composition, folders=folders, verb="sweep")
    fixed = list[str]()
    keys = set[str]()
    for word in words:
        overrides, _ = parse_overrides([word])  # one; none of a word that is no override
        keys.update(override.key_or_group for override in overrides)
        if not any(override.is_sweep_override() for override in overrides):
            fixed.append(word)
    values = _values(command(fixed))
    words = [*words, *(word for word in _swept_in_files(values) if word.partition("=")[0] not in keys)]
    points = Points()
    dimensions = _dimensions(words, folders, all_mistakes)
    choices = []
    for word in words:
        dimension = dimensions.get(word)
        options = [word]
        if dimension:
            options = [f"{dimension.key}={text}" for text in dimension.texts]
        choices.append(options)
    refused = dict[tuple[str, ...], ConfigError]()
    point_of_run = dict[str | None, tuple[str, ...]]()
    for choice in product(*choices):
        point = tuple(each for each, word in zip(choice, words, strict=True) if word in dimensions)
        try:
            config = load_command(command(choice), "sweep")
        except ConfigError as error:
            refused[point] = error
            continue
        same = point_of_run.setdefault(config.run.dir, point)
        is_repeated = same != point or point in points
        if is_repeated and config.run.dir != str(config.identity.default_dir):
            remedy = "add run.dir=null"
            remedy += ": each point has a folder of its own below run.root"
            message = "run.dir is given, so all points would be one run"
            all_mistakes.append(ConfigError(message, where="run.dir", remedy=remedy))
            break
        if is_repeated:
            message = f"this point is the same run as {' '.join(same)}"
            remedy = "sweep only keys that define the result of a run"
            all_mistakes.append(ConfigError(message, where=" ".join(point), remedy=remedy))
        points[point] = config
    all_mistakes += _at_some_points(refused, points)
    if () in points:
        remedy = "write several values, such as loss.beta=0.05,0.1, or train this one: dpo-dist train"
        all_mistakes.append(ConfigError("no key has several values", where=COMMAND_LINE, remedy=remedy))
    raise_all(all_mistakes)
    return points


def _values(command: Composition) -> Any:
    """Return the values of the words and files without several values; none if they have a mistake."""
    try:
        return OmegaConf.create(command.compose())
    except FAILURES:
        return OmegaConf.create()  # every point has the mistake


def _swept_in_files(values: Any) -> Iterator[str]:
    """Yield an override for each key for which a file has several values."""
    for key in run_keys():
        value = OmegaConf.select(values, key)
        if isinstance(value, str) and _SWEEP_IN_FILE.fullmatch(value):
            yield f"{key}={value}"


def _dimensions(
    words: Sequence[str], folders: Sequence[Path], before: Iterable[DpoDistError]
) -> dict[str, Dimension]:
    """Return the values of each swept word.

    Raises:
        ConfigError: they cannot be listed; also the mistakes found `before`.
    """
    dimensions = dict[str, Dimension]()
    counts = dict[str, float]()
    mistakes = list[ConfigError]()
    for override in parse_overrides(words)[0]:
        key = override.key_or_group
        word = str(override.input_line)
        message = ""
        remedy = ""
        if override.is_interval_sweep():
            message = "an interval has no points to train"
            remedy = f"list its values: {key}=0.1,0.2 or '{key}=range(1,4)'"
        elif override.is_sweep_override():
            try:
                counts[word], dimensions[word] = _dimension(override)
            except (ArithmeticError, ValueError, HydraException):
                message = "this range has no values"
                remedy = "write range(3) or range(0,9,3)"
        elif _is_in_brackets(override, folders):
            message = "several values of a sweep are written without brackets"
            remedy = to_write(f"{key}={','.join(names_chosen(override))}")
        if message:
            mistakes.append(ConfigError(message, where=Typed(word), remedy=remedy))
    if mistakes:
        raise_all([*mistakes, *before])
    count = prod(counts.values())
    if count > _MOST_POINTS:
        raise ConfigError(
            f"a sweep has at most {_MOST_POINTS:,} points",
            where=COMMAND_LINE,
            got=f"{' '.join(word for word, values in counts.items() if values > 1)}: {count:,.0f}",
            remedy="sweep fewer values, or divide them among several sweeps",
        )
    return dimensions


def _dimension(override: Override) -> tuple[float, Dimension]:
    """Return the number of a sweep's values, and the values: of a range with too many none.

    Raises:
        ArithmeticError, ValueError, HydraException: there are no values.
    """
    key = override.get_key_element()
    sweep = override.value()
    count = 0.0
    if isinstance(sweep, RangeSweep):
        start, stop, step = (Decimal(each or 0) for each in (sweep.start, sweep.stop, sweep.step))
        count = float(((stop - start) / step).to_integral_value(ROUND_CEILING))
    texts = list(override.sweep_string_iterator()) if count <= _MOST_POINTS else []
    count = count or len(texts)
    if count <= 0:
        raise ValueError
    return count, Dimension(key, texts)


def _is_in_brackets(override: Override, folders: Sequence[Path]) -> bool:
    """Return whether a list is given to a key that takes one value."""
    key = override.key_or_group
    values = override.value()
    presets = preset_names(key, folders)
    if key not in run_keys() or not isinstance(values, list) or not values or fits(key, values):
        return False
    return all(str(value) in presets if presets else fits(key, value) for value in values)


def _at_some_points(refused: Mapping[tuple[str, ...], ConfigError], points: Points) -> list[DpoDistError]:
    """Return the points' mistakes, each once; if only some points have one, its error names their values."""
    by_mistake = dict[tuple[str, str], dict[tuple[str, ...], DpoDistError]]()
    for words, error in refused.items():
        for part in error.parts or (error,):
            by_mistake.setdefault((part.message, part.where), {})[words] = part
    mistakes = list[DpoDistError]()
    for (message, where), broken in by_mistake.items():
        mistake = next(iter(broken.values()))
        others = [words for words in (*points, *refused) if words not in broken]
        words_of_others = set(chain.from_iterable(others))
        words_of_broken = dict.fromkeys(chain.from_iterable(broken))
        names_value = any(where == Typed(word) for word in words_of_broken)
        if words_of_others and not names_value:
            alone = [word for word in words_of_broken if word not in words_of_others]
            values = first_few(alone or [" ".join(words) for words in broken])
            what = values if alone else "one of these values"
            remedy = f"take {what} out of this sweep; in a command of its own {mistake.remedy}"
            mistake = ConfigError(message, where=values, got=mistake.got, remedy=remedy)
        mistakes.append(mistake)
    return mistakes
