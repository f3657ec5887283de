"""Interface of a benchmark to the runner, and the options that several benchmarks share."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.setting import REAL_DATA, SHAPES

Json = dict[str, Any]

SHARED: dict[str, Json] = {
    "model": {"choices": SHAPES, "help": "shape of the model"},
    "data": {"choices": (*REAL_DATA, "synthetic"), "help": "slice of real data, or invented pairs"},
    "pairs": {"type": int, "help": "pairs of a run"},
    "batch_pairs": {"type": int, "help": "pairs of an optimizer step"},
    "max_length": {"type": int, "help": "tokens of a prompt with one response"},
    "micro_batch_tokens": {"type": int, "help": "tokens of a micro-batch of dpo_dist"},
    "dtype": {"choices": ("fp32", "bf16"), "help": "precision of the policy"},
    "rounds": {"type": int, "help": "repetitions of each run; runs take turns"},
    "threads": {"type": int, "help": "threads of all processes of a run together"},
    "processes": {"type": int, "nargs": "+", "help": "numbers of processes to measure"},
    "trl_micro_pairs": {"type": int, "help": "micro-batch of TRL with its defaults (its own default: 8)"},
    "trl_best_micro_pairs": {"type": int, "nargs": "+", "help": "micro-batches of TRL at its best"},
}


def _no_options(_parser: ArgumentParser) -> None:
    return


def _no_fault(_options: Namespace) -> str:
    return ""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        run: measures and prints; returns the figures. `trainers_agree: False` among them is exit code 1.
        shared: the names of the options of `SHARED` that it uses, with their defaults.
        own: adds its own options.
        smoke: defaults of options with `--smoke`.
        fault: returns what is wrong with the options, or nothing.
    """

    run: Callable[[Namespace], Json]
    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Callable[[ArgumentParser], None] = _no_options
    smoke: Mapping[str, Any] = field(default_factory=dict)
    fault: Callable[[Namespace], str] = _no_fault


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the first row is its head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
