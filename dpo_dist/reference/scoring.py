"""Score one round of a fill: pack this rank's micro-batches and return their log-probs by content key."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_dist.data.dataset import Keys, PreferenceDataset
from dpo_dist.data.encode import response_key
from dpo_dist.data.packing import PackedBatch, dummy_batch, pack
from dpo_dist.distributed.world import World
from dpo_dist.errors import DataError
from dpo_dist.prefetch import prefetch
from dpo_dist.reference.fill_rounds import Round, Work
from dpo_dist.reference.shard import Values

Scorer = Callable[[PackedBatch], Tensor]

_BATCHES_AHEAD = 2


def score_round(
    dataset: PreferenceDataset, part: Round, score: Scorer, world: World, told: Callable[[float], None]
) -> tuple[Keys, list[Values]]:
    """Score this rank's share of a round: keys uint64 [n, 2] and their values. Collective.

    On every rank as many micro-batches (law L2).
    """
    batches_of_all = max(world.gather(len(part.micro_batches)))
    dummies = batches_of_all - len(part.micro_batches)
    damaged: list[int] = []
    packed = _packed(dataset, part.work, part.micro_batches + [[]] * dummies, damaged, world.device)
    keys: list[Keys] = [np.empty((0, 2), dtype=np.uint64)]
    rows: list[Values] = []
    last: _ScoredBatch | None = None
    with prefetch(packed, _BATCHES_AHEAD) as batches:
        for number, batch in enumerate(batches, start=1):
            scored = _ScoredBatch.of(batch, score(batch.to(world.device)))
            keys.append(batch.keys)
            # Read one batch late: the device has the next one to compute while this one's values arrive.
            rows += last.rows() if last is not None else []
            last = scored
            told(number / batches_of_all)
    rows += last.rows() if last is not None else []
    world.together(lambda: _check_encoded(dataset, damaged))
    return np.concatenate(keys), rows


def _packed(
    dataset: PreferenceDataset,
    work: Work,
    micro_batches: Iterable[list[int]],
    damaged: list[int],
    device: torch.device,
) -> Iterator[PackedBatch]:
    """The micro-batches; one whose ids are not those of its keys becomes a dummy, its pairs `damaged`.

    Ranks learn of it at the end of the round: until then all of them score equally many batches.
    """
    for numbers in micro_batches:
        batch = _pack([work.part(number, number + 1) for number in numbers], dataset)
        if numbers and not np.array_equal(keys_of_ids(batch), batch.keys):
            damaged += [int(work.rows[number]) for number in numbers]
            batch = dummy_batch()
        yield batch.pinned() if device.type == "cuda" else batch


def _pack(pairs: Sequence[Work], dataset: PreferenceDataset) -> PackedBatch:
    """A micro-batch of these works of one pair each."""
    if not pairs:
        return dummy_batch()
    sequences = [dataset.sequences(int(pair.rows[0]), pair.which.tolist()) for pair in pairs]
    return pack(sequences, dataset.keys[np.concatenate([pair.places for pair in pairs])])


def keys_of_ids(batch: PackedBatch) -> Keys:
    """Compute the content keys of a batch's responses from the token ids in it; uint64 [responses, 2]."""
    inputs, targets = (ids.numpy().astype(np.int32) for ids in (batch.input_ids, batch.targets))
    keys = []
    start = first = 0
    for prompt_tokens, *laid_out in batch.layout:
        prompt = inputs[start : start + prompt_tokens]
        start += prompt_tokens + sum(laid_out)
        for tokens in laid_out:
            stop = first + tokens + 1
            keys.append(response_key(prompt, targets[first:stop]))
            first = stop
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2)


def _check_encoded(dataset: PreferenceDataset, damaged: list[int]) -> None:
    if damaged:
        raise DataError(
            "token ids of the encoded data are not those that their content key was computed from",
            where="; ".join(str(dataset.origin(row)) for row in damaged[:5]),
            got=f"{len(damaged)} records in micro-batches with such ids",
            expected="the ids that were encoded; their log-probs would be stored for another response",
            remedy="remove the folder data.cache and start again: the data are encoded anew",
        )


@dataclass(frozen=True)
class _ScoredBatch:
    """A micro-batch and its log-probs, which may still be on their way to the host until `arrived`."""

    batch: PackedBatch
    logps: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, batch: PackedBatch, logps: Tensor) -> "_ScoredBatch":
        """Start the copy; the host does not wait for the device."""
        if logps.device.type != "cuda":
            return cls(batch, logps, None)
        on_host = torch.empty(logps.shape, dtype=logps.dtype, pin_memory=True)
        on_host.copy_(logps, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return cls(batch, on_host, arrived)

    def rows(self) -> list[Values]:
        """The values of each response; none of a dummy."""
        if not len(self.batch.keys):
            return []
        if self.arrived is not None:
            self.arrived.synchronize()
        ends = np.cumsum(self.batch.response_tokens.numpy())
        return np.split(self.logps.numpy(), ends[:-1])
