"""Shard a global batch across ranks and micro-batches, and collate the examples of a micro-batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dpo_dist.batching.pack import RESPONSES_OF_DUMMY, PackedBatch, Sequences, dummy_batch, pack
from dpo_dist.batching.plan import ComputeCosts, plan_micro_batches
from dpo_dist.batching.sampler import Indices
from dpo_dist.data.dataset import Keys, PreferenceDataset
from dpo_dist.data.encode import response_key
from dpo_dist.foundation.errors import DataError


@dataclass(frozen=True)
class RankBatch:
    """One rank's share of a global batch; every rank has the same number of micro-batches.

    Attributes:
        micro_batches: dataset indices of the examples of each micro-batch; an empty one becomes a dummy.
        positions: positions of these examples in the global batch.
        pairs: examples of the global batch, over all ranks; as are all that follow.
        rows_tokens: `tokens` with each prompt once for each of its responses.
        targets: completion tokens that the loss counts.
        attended: query-key pairs of attention in a layer in which tokens see all earlier ones.
        mean_chosen_tokens: mean number of targets in the chosen responses.
        sources: int64 [pairs], index in `dataset.labels` of the source of each pair; None without labels.
        forwards: for each micro-batch `PackedBatch.forwards`.
    """

    dataset: PreferenceDataset
    micro_batches: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    pairs: int
    tokens: int
    rows_tokens: int
    targets: int
    attended: int
    mean_chosen_tokens: float
    sources: Indices | None = None
    only_chosen: bool = False
    forwards: tuple[int, ...] = ()

    def batches(self) -> Iterator[PackedBatch]:
        """Collate this rank's micro-batches in order, on the host."""
        for indices, forwards in zip(self.micro_batches, self.forwards, strict=True):
            yield replace(collate(self.dataset, indices, self.only_chosen), forwards=forwards)


def shard_batch(
    dataset: PreferenceDataset,
    indices: Indices,
    rank: int,
    world_size: int,
    micro_batch_tokens: int,
    costs: ComputeCosts,
    only_chosen: bool = False,
) -> RankBatch:
    """Return the share of `rank` in the global batch `indices`, balanced by compute cost; O(batch)."""
    counts = dataset.response_counts(indices)
    responses = dataset.response_indices(indices)
    if only_chosen:
        responses, counts = responses[np.cumsum(counts) - counts], np.ones_like(counts)
    sizes = dataset.sizes(indices, responses, counts, costs, masked=True)
    plan = plan_micro_batches(sizes, world_size, micro_batch_tokens)
    positions = tuple(tuple(ranks[rank]) for ranks in plan)
    return RankBatch(
        dataset=dataset,
        micro_batches=tuple(tuple(int(indices[i]) for i in micro_batch) for micro_batch in positions),
        positions=positions,
        pairs=len(indices),
        tokens=int(sizes.tokens.sum()),
        rows_tokens=int(sizes.rows_tokens.sum()),
        targets=int(sizes.targets.sum()),
        attended=int(sizes.attended.sum()),
        mean_chosen_tokens=dataset.mean_chosen_tokens(indices),
        sources=dataset.label_numbers(indices) if dataset.labels else None,
        only_chosen=only_chosen,
        forwards=tuple(max(RESPONSES_OF_DUMMY, *(int(counts[own].sum()) for own in ranks)) for ranks in plan),
    )


def collate(dataset: PreferenceDataset, indices: Sequence[int], only_chosen: bool = False) -> PackedBatch:
    """Pack examples, or only their chosen responses, into one micro-batch; a dummy if there are none."""
    labels = dataset.labels
    if not indices:
        none = torch.zeros(1, dtype=torch.int64) if labels else None
        return replace(dummy_batch(), labels=labels, sources=none)
    selected = [0] if only_chosen else None
    ranges = [dataset.response_range(index) for index in indices]
    keys = dataset.keys[np.concatenate([range_[:1] if only_chosen else range_ for range_ in ranges])]
    sequences = [dataset.sequences(index, selected, masked=True) for index in indices]
    if not has_keys(sequences, keys):
        raise damaged_ids(dataset, indices)
    packed = pack(sequences, keys)
    return replace(
        packed,
        score_gaps=torch.from_numpy(dataset.score_gaps(indices)),
        labels=labels,
        sources=torch.from_numpy(dataset.label_numbers(indices)) if labels else None,
    )


def has_keys(sequences: Sequence[Sequences], keys: Keys) -> bool:
    """Return whether the content keys of responses, computed from their token ids, are `keys`."""
    found = (response_key(pair.prompt_ids, ids) for pair in sequences for ids in pair.responses)
    return b"".join(found) == np.ascontiguousarray(keys).tobytes()


def damaged_ids(dataset: PreferenceDataset, examples: Sequence[int]) -> DataError:
    """Return the error of a micro-batch whose token ids have other keys than when they were encoded."""
    return DataError(
        "token ids of the encoded data do not match their content key",
        where="; ".join(str(dataset.origin(example)) for example in examples[:5]),
        got=f"{len(examples)} records in micro-batches with such ids",
        expected="the ids that were encoded: these have other log-probs",
        remedy="delete the folder data.cache and start again: the data are encoded again",
    )
