"""The verbs: the keys that each one needs, and those of a command line that it reads."""

from collections.abc import Iterable
from dataclasses import dataclass

from hydra.core.override_parser.types import Override

from dpo_dist.config.keys import COMMAND_LINE, Rule, check, read_by, readers, run_keys
from dpo_dist.config.schema import NO_MODEL, RunConfig
from dpo_dist.foundation.errors import ConfigError

TRAIN = "train"
NEEDS_MODEL = Rule(
    "model.path",
    lambda c: c.model.path == NO_MODEL,
    "model.path is not set",
    "set model.path to a folder or hub name, or choose a preset: model=NAME",
)
_NEEDS_DATA = Rule(
    "data.train",
    lambda c: not c.data.train,
    "no training data is given",
    "set data.train=[pairs.jsonl], or choose a preset with data=...",
)


@dataclass(frozen=True)
class Verb:
    """A verb: what it needs, and whether it takes the whole command line of a training run."""

    needs: tuple[Rule, ...]
    of_a_run: bool


VERBS = {
    TRAIN: Verb((NEEDS_MODEL, _NEEDS_DATA), of_a_run=True),
    "precompute": Verb((NEEDS_MODEL, _NEEDS_DATA), of_a_run=True),
    "evaluate": Verb((NEEDS_MODEL,), of_a_run=True),
    "export": Verb((NEEDS_MODEL,), of_a_run=True),
    "doctor": Verb((_NEEDS_DATA,), of_a_run=True),
    "pairs": Verb((_NEEDS_DATA,), of_a_run=False),  # with rounds it is
    "compare": Verb((), of_a_run=False),
}


def check_needs(config: RunConfig, verb: str) -> None:
    """Check that a configuration that no command line gave has what a verb needs."""
    check(config, VERBS[verb].needs)


def keys_of(verb: str, *, trains: bool = False) -> list[str]:
    """Return the keys that a verb reads, and their sections; `trains`: with those of a training run."""
    verbs = {verb, *([TRAIN] if trains or VERBS[verb].of_a_run else [])}
    return [name for name in run_keys() if verbs & set(readers(name))]


def not_read(overrides: Iterable[Override], verb: str, *, trains: bool) -> list[ConfigError]:
    """Return an error for each override whose key a verb does not read.

    Files and experiments may have such keys, as they serve several verbs.
    """
    own, mistakes = keys_of(verb, trains=trains), []
    for override in overrides:
        group, value = override.key_or_group, override.value()
        given = [f"{group}.{name}" for name in value] if isinstance(value, dict) else [group]
        for key in (name.partition("[")[0] for name in given):
            if key == "reference":  # a preset, which is about the mode
                key = "reference.mode"  # noqa: PLW2901
            if key in own or key not in run_keys():  # `experiment` is no key
                continue
            same = [name for name in own if "." in name and name.split(".")[-1] == key.rpartition(".")[2]]
            expected = " or ".join(same)
            remedy = f"did you mean {expected}?" if same else "remove it:"
            mistakes.append(
                ConfigError(
                    f"{verb} does not read {key}",
                    where=f"{COMMAND_LINE}: {override.input_line}",
                    expected=expected,
                    remedy=f"{remedy} {read_by(key)}",
                )
            )
    return mistakes
