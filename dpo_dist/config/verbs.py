"""The verbs: the keys that each one needs and reads."""

from dataclasses import dataclass

from dpo_dist.config.keys import readers, run_keys
from dpo_dist.config.rules import Rule, check
from dpo_dist.config.schema import NO_MODEL, RunConfig

TRAIN = "train"
_NEEDS_MODEL = Rule(
    f"model.path={NO_MODEL}",
    "model.path is not set",
    "set model.path to a folder or hub name, or choose a preset: model=NAME",
)
_NEEDS_DATA = Rule(
    "data.train=[]",
    "no training data is given",
    "set data.train=[pairs.jsonl], or choose a preset with data=...",
)

_NEEDS_STORE = Rule(
    "reference.mode!=cached loss",
    "only a stored reference can be precomputed",
    "set reference=cached, with a loss that uses a reference model",
)


@dataclass(frozen=True)
class Verb:
    """A verb."""

    needs: tuple[Rule, ...]
    of_a_run: bool = True
    """It takes the whole command line of a training run."""
    of_former_run: bool = False
    """It is about a run that exists: its configuration may be that of `run.dir`."""


VERBS = {
    TRAIN: Verb((_NEEDS_MODEL, _NEEDS_DATA)),
    "precompute": Verb((_NEEDS_MODEL, _NEEDS_DATA, _NEEDS_STORE)),
    "evaluate": Verb((_NEEDS_MODEL,), of_former_run=True),
    "export": Verb((_NEEDS_MODEL,), of_former_run=True),
    "doctor": Verb((_NEEDS_DATA,)),
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
