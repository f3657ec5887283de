"""Which pairs make up optimizer step s: a pure function of seed, data set and batch size (law L1)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import TrainerConfig
from dpo_dist.errors import ConfigError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """The rows ``start <= row < stop`` of one source, seen `weight` times an epoch."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class BatchSampler:
    """The order of training: epochs follow each other without a gap, step s takes the next batch.

    World size, token budget and accumulation do not appear here, so they cannot change the order. Batches may
    span an epoch's end; the last batch of a run holds what is left.
    """

    spans: tuple[Span, ...]
    global_batch_pairs: int
    seed: int
    total_pairs: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.total_pairs / self.global_batch_pairs)

    @property
    def pairs_per_epoch(self) -> int:
        """Rows drawn in one epoch, weights included."""
        return sum(_drawn(span) for span in self.spans)

    def indices(self, step: int) -> Indices:
        """Rows of the global batch of `step` (0-based), int64 [pairs]."""
        start = step * self.global_batch_pairs
        stop = min(start + self.global_batch_pairs, self.total_pairs)
        return np.concatenate([np.empty(0, dtype=np.int64), *self._parts(start, stop)])

    def visited_indices(self) -> Indices:
        """Every row that the run visits, once, in ascending order."""
        visited = np.zeros(max((span.stop for span in self.spans), default=0), dtype=np.bool_)
        for part in self._parts(0, self.total_pairs):
            visited[part] = True
        return np.flatnonzero(visited)

    def epoch(self, step: int) -> float:
        """Epochs completed after `step` (0-based)."""
        return min((step + 1) * self.global_batch_pairs, self.total_pairs) / self.pairs_per_epoch

    def _parts(self, start: int, stop: int) -> Iterator[Indices]:
        """The rows of these places in the run's order, epoch after epoch."""
        per_epoch = self.pairs_per_epoch
        while start < stop:
            epoch, offset = divmod(start, per_epoch)
            count = min(per_epoch - offset, stop - start)
            yield _epoch_order(self.spans, self.seed, epoch)[offset : offset + count]
            start += count


def make_sampler(spans: Sequence[Span], config: TrainerConfig) -> BatchSampler:
    """The schedule of a run over `spans`, `config.epochs` long or `config.max_steps` if that is given.

    Raises:
        ConfigError: an epoch has no pair of a source.
    """
    for number, span in enumerate(spans):
        if not _drawn(span):
            raise ConfigError(
                "the weight of a source leaves none of its pairs",
                where=f"data.train[{number}].weight",
                got=f"{span.weight:g} of {span.stop - span.start} pairs an epoch",
                expected="at least one pair",
                remedy="raise the weight, or take the source out",
            )
    per_epoch = sum(_drawn(span) for span in spans)
    total = round(config.epochs * per_epoch)
    if config.max_steps is not None:
        total = config.max_steps * config.global_batch_pairs
    return BatchSampler(tuple(spans), config.global_batch_pairs, config.seed, max(1, total))


def _drawn(span: Span) -> int:
    return round(span.weight * (span.stop - span.start))


@lru_cache(maxsize=2)
def _epoch_order(spans: tuple[Span, ...], seed: int, epoch: int) -> Indices:
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    parts = []
    for span in spans:
        rows = np.arange(span.start, span.stop, dtype=np.int64)
        whole, rest = divmod(_drawn(span), len(rows)) if len(rows) else (0, 0)
        parts.append(np.tile(rows, whole))
        parts.append(generator.choice(rows, size=rest, replace=False) if rest else rows[:0])
    return generator.permutation(np.concatenate(parts))
