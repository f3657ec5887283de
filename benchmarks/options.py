"""The interface of a benchmark, and options that several benchmarks share."""

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
    "rounds": {"type": int, "help": "repetitions of each run, in alternating order"},
    "threads": {"type": int, "help": "threads of all processes of a run in total"},
    "processes": {"type": int, "nargs": "+", "help": "numbers of processes to measure"},
    "trl_micro_pairs": {"type": int, "help": "pairs of a micro-batch of TRL with its defaults"},
    "trl_best_micro_pairs": {
        "type": int,
        "nargs": "+",
        "help": "pairs of a micro-batch of TRL with its fastest options",
    },
}


def _no_options(_parser: ArgumentParser) -> None:
    return


def _no_fault(_options: Namespace) -> str:
    return ""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        run: measures, prints and returns the figures; `trainers_agree: False` among them gives exit code 1.
        shared: names and defaults of the options in `SHARED` that the benchmark uses.
        own: adds options of this benchmark only.
        smoke: other defaults, used with `--smoke`.
        fault: returns what is wrong with the options, or "".
    """

    run: Callable[[Namespace], Json]
    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Callable[[ArgumentParser], None] = _no_options
    smoke: Mapping[str, Any] = field(default_factory=dict)
    fault: Callable[[Namespace], str] = _no_fault


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is the heading."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
