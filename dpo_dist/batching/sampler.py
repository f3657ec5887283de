"""Sampler: the batch of optimizer step s as a pure function of seed, dataset and batch size (law L1)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import TrainerConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import pluralize

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SourceSpan:
    """The examples ``start <= index < stop`` of one source, drawn `weight` times an epoch."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class BatchSampler:
    """Order of training: shuffled epochs in sequence, cut into consecutive global batches.

    World size, token budget and accumulation are not inputs, so they cannot change the order. A batch may
    span the end of an epoch; the last batch of a run may be smaller.
    """

    spans: tuple[SourceSpan, ...]
    global_batch_pairs: int
    seed: int
    total_pairs: int

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the run."""
        return math.ceil(self.total_pairs / self.global_batch_pairs)

    @property
    def pairs_per_epoch(self) -> int:
        """Number of examples drawn in one epoch, by the weights of the sources."""
        return sum(map(_draws, self.spans))

    def indices(self, step: int) -> Indices:
        """Return the dataset indices of the global batch of `step` (0-based), int64 [pairs]."""
        start = step * self.global_batch_pairs
        stop = min(start + self.global_batch_pairs, self.total_pairs)
        return np.concatenate([np.empty(0, dtype=np.int64), *self._parts(start, stop)], dtype=np.int64)

    def visited_indices(self) -> Indices:
        """Return the index of every example that the run visits, ascending, each once."""
        visited = np.zeros(max((span.stop for span in self.spans), default=0), dtype=np.bool_)
        for part in self._parts(0, self.total_pairs):
            visited[part] = True
            if visited.all():  # a run may have any number of epochs
                break
        return np.flatnonzero(visited)

    def epoch(self, step: int) -> float:
        """Return the epochs completed after `step` (0-based)."""
        return min((step + 1) * self.global_batch_pairs, self.total_pairs) / self.pairs_per_epoch

    def _parts(self, start: int, stop: int) -> Iterator[npt.NDArray[np.integer[Any]]]:
        """Yield the indices at positions ``start <= position < stop`` of the run's order, by epoch."""
        per_epoch = self.pairs_per_epoch
        while start < stop:
            epoch, offset = divmod(start, per_epoch)
            count = min(per_epoch - offset, stop - start)
            yield _epoch_order(self.spans, self.seed, epoch)[offset : offset + count]
            start += count


def make_sampler(spans: Sequence[SourceSpan], config: TrainerConfig) -> BatchSampler:
    """Return the sampler of a run over `spans`: `config.max_steps` steps if set, else `config.epochs` epochs.

    A span is empty if all records of its source are held out for evaluation.
    """
    for number, span in enumerate(spans):
        if span.start < span.stop and not _draws(span):
            raise ConfigError(
                "no pair of a source would be drawn",
                where=f"data.train[{number}].weight",
                got=f"{span.weight:g} of {span.stop - span.start} pairs an epoch",
                expected="at least one pair an epoch",
                remedy="raise the weight, or remove the source",
            )
    per_epoch = sum(map(_draws, spans))
    batch = config.global_batch_pairs
    # The default alone: of data and configuration only, so that all ranks and each resume have the same.
    if batch == TrainerConfig.global_batch_pairs and batch > per_epoch:
        batch = _usual_batch(per_epoch)
    total = round(config.epochs * per_epoch)
    if config.max_steps is not None:
        total = config.max_steps * batch
    return BatchSampler(tuple(spans), batch, config.seed, max(1, total))


def _usual_batch(pairs: int) -> int:
    """Return the pairs of a step for few pairs an epoch: a power of two, eight steps or more if it can."""
    return min(max(1, pairs), max(2, 1 << (max(1, pairs // 8).bit_length() - 1)))


def _draws(span: SourceSpan) -> int:
    return round(span.weight * (span.stop - span.start))


@lru_cache(maxsize=2)
def _epoch_order(spans: tuple[SourceSpan, ...], seed: int, epoch: int) -> npt.NDArray[np.integer[Any]]:
    """Return the order of an epoch, in integers as small as the indices allow: every rank holds it."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    dtype = np.min_scalar_type(max((span.stop for span in spans), default=0))
    parts = []
    for span in spans:
        indices = np.arange(span.start, span.stop, dtype=dtype)
        passes, rest = divmod(_draws(span), len(indices)) if len(indices) else (0, 0)
        parts += [indices] * passes
        parts.append(generator.choice(indices, size=rest, replace=False) if rest else indices[:0])
    order = np.concatenate(parts)
    del parts
    generator.shuffle(order)
    return order


def check_batch(sampler: BatchSampler, unit: str = "pair") -> None:
    """Raise ConfigError if a step has more examples than the data."""
    pairs = sampler.pairs_per_epoch
    batch = sampler.global_batch_pairs
    if batch > pairs:
        raise ConfigError(
            f"a step has more {unit}s than the training data",
            where="trainer.global_batch_pairs",
            got=f"{batch:,}, and {pluralize(pairs, unit)} an epoch",
            expected=f"at most {pairs:,}",
            remedy=f"set trainer.global_batch_pairs={_usual_batch(pairs)}",
        )


def batch_note(sampler: BatchSampler, config: TrainerConfig, unit: str = "pair") -> str:
    """Return a line on steps that are smaller than the default; "" if they are not."""
    batch = sampler.global_batch_pairs
    if batch == config.global_batch_pairs:
        return ""
    return (
        f"steps of {pluralize(batch, unit)}, as an epoch has {sampler.pairs_per_epoch:,}: the default of "
        f"trainer.global_batch_pairs is {config.global_batch_pairs}"
    )


def short_run_warnings(sampler: BatchSampler, unit: str = "pair") -> list[str]:
    """Return a warning if the dataset is small for the batch size, else none."""
    if sampler.steps > 1:
        return []
    return [
        f"the whole run is 1 step: {pluralize(sampler.total_pairs, unit)} with "
        f"trainer.global_batch_pairs={sampler.global_batch_pairs}; lower it or raise trainer.epochs"
    ]


def steps_in_words(sampler: BatchSampler, unit: str = "pair") -> str:
    """Return the length of a run: `20 steps of 8 pairs`."""
    return f"{pluralize(sampler.steps, 'step')} of {pluralize(sampler.global_batch_pairs, unit)}"
