"""Examine preference data: stream all sources and return the doctor's report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_dist.config.data_schema import DataConfig
from dpo_dist.diagnostics.findings import DoctorReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int], None]
"""Called with the number of newly examined records."""


def examine(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    thresholds: Mapping[str, float] | None = None,
    benchmarks: Sequence[Path] = (),
    seed: int = 0,
    progress: Progress = lambda _records: None,
) -> DoctorReport:
    """Read `config.train` and `config.eval` once, as a stream, and check them.

    Args:
        config: sources, limits of lengths, number of processes.
        tokenizer: of the policy; None: nothing is counted in tokens, and no check needs token ids.
        thresholds: other thresholds of rules, by name of the rule.
        benchmarks: files of benchmark prompts, .jsonl or .txt.
        seed: of the samples.
        progress: for a progress bar.

    Raises:
        DataError: a source or a benchmark file cannot be read.
        ConfigError: a threshold names no rule, or encoding is impossible with this tokenizer.
    """
    raise NotImplementedError
