"""Numerics of stored log-probs: those of a run's ranks, and stored ones that a tolerant run may use too."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_dist.batching.sampler import Indices
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.model.numerics import TOLERABLE_FIELDS
from dpo_dist.reference.fingerprint import ReferenceFingerprint, fingerprint_folders, read_fingerprint
from dpo_dist.reference.store import LogpStore, first_of_each

Profile = dict[str, str]
OWN_NUMERICS = "own"


def agree_on_numerics(profile: Profile, is_tolerant: bool, world: World) -> Profile:
    """Return the one numerics profile under which all ranks store log-probs; collective.

    Tolerant ranks may differ in `TOLERABLE_FIELDS`. The profile then lists all their values, because a reader
    of an entry does not know which rank computed it.
    """
    profiles = world.gather(profile)
    names = sorted({name for each in profiles for name in each})
    found = {name: sorted({each.get(name, "-") for each in profiles}) for name in names}
    differing = [name for name, values in found.items() if len(values) > 1]
    is_tolerable = TOLERABLE_FIELDS.issuperset(differing)
    if differing and not (is_tolerant and is_tolerable):
        raise ReferenceModelError(
            "the processes of this run compute log-probs with different numerics",
            where=f"ranks of {world.size}",
            got="; ".join(f"{name}: {_by_ranks(name, profiles, world)}" for name in differing),
            remedy="run on nodes of one kind with one installation"
            + ("; or set reference.numerics=tolerant" if is_tolerable else ""),
        )
    return {name: " or ".join(values) for name, values in found.items()}


def _by_ranks(name: str, profiles: Sequence[Profile], world: World) -> str:
    """Return the values of one field, each with its first rank: "AVX2 on rank 1 (host b), ..."."""
    first: dict[str, str] = {}
    for rank, profile in enumerate(profiles):
        first.setdefault(profile.get(name, "-"), f"rank {rank} ({world.peers[rank].host})")
    return ", ".join(f"{value} on {rank}" for value, rank in first.items())


def find_compatible(root: Path, own: ReferenceFingerprint) -> list[ReferenceFingerprint]:
    """Return the fingerprints in the store `root` that a tolerant run may use, most similar first."""
    if not root.is_dir():
        return []
    found = [read_fingerprint(folder) for folder in fingerprint_folders(root)]
    compatible = [
        other
        for other in found
        if other is not None
        and other.reference == own.reference
        and other != own
        and TOLERABLE_FIELDS.issuperset(_differing_fields(own, other))
    ]
    return sorted(compatible, key=lambda other: (len(_differing_fields(own, other)), other.name))


def difference(own: ReferenceFingerprint, other: ReferenceFingerprint) -> str:
    """Return the numerics of `other` that differ from `own`: "attention sdpa, torch 2.12"."""
    return ", ".join(f"{name} {other.profile.get(name, '-')}" for name in _differing_fields(own, other))


def _differing_fields(own: ReferenceFingerprint, other: ReferenceFingerprint) -> list[str]:
    return sorted({name for name, _ in own.profile.items() ^ other.profile.items()})


@dataclass(frozen=True)
class Reused:
    """Number of distinct responses by difference of their numerics (`OWN_NUMERICS` for none).

    `audited`: index in `visited` of a dataset, and its pairs with compatible entries; None if none has.
    """

    entries: dict[str, int]
    audited: tuple[int, Indices] | None


def count_reused(store: LogpStore, visited: Sequence[tuple[PreferenceDataset, Indices]]) -> Reused:
    """Count the entries of the pairs that a run visits, all of them in `store`, by their numerics."""
    counts = np.zeros(len(store.fingerprints), dtype=np.int64)
    audited = None
    for number, (dataset, indices) in enumerate(visited):
        keys = dataset.keys[dataset.response_indices(indices)]
        sources = store.sources(keys)
        counts += np.bincount(sources[first_of_each(keys)], minlength=len(counts))
        of_compatible = np.unique(np.repeat(indices, dataset.response_counts(indices))[sources > 0])
        if audited is None and len(of_compatible):
            audited = number, of_compatible
    own, *compatible = store.fingerprints
    names = [OWN_NUMERICS, *(difference(own, other) for other in compatible)]
    return Reused({name: n for name, n in zip(names, counts.tolist(), strict=True) if n}, audited)
