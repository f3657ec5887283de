"""Rows of the same reference under other numerics: which there are, and what they serve.

Where `reference.numerics` is tolerant, they serve where the run's own numerics have no row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.sampler import Indices
from dpo_dist.distributed.world import World
from dpo_dist.errors import ReferenceModelError
from dpo_dist.model.numerics import TOLERABLE_FIELDS
from dpo_dist.reference.fill import first_of_each, missing_responses
from dpo_dist.reference.fingerprint import ReferenceFingerprint, read_fingerprint
from dpo_dist.reference.maintenance.info import fingerprint_folders
from dpo_dist.reference.store import LogpStore, list_stored

Profile = dict[str, str]

Visited = Sequence[tuple[PreferenceDataset, Indices]]


def agree_on_numerics(profile: Profile, is_tolerant: bool, world: World) -> Profile:
    """Agree on the one numerics profile under which all ranks store log-probs; collective.

    Args:
        profile: of this rank.
        is_tolerant: whether ranks may differ in `TOLERABLE_FIELDS`. Their profile then names all values, as
            the rank that computed a stored log-prob is not known when it is read.

    Raises:
        ReferenceModelError: ranks differ, and may not.
    """
    profiles = world.gather(profile)
    names = sorted({name for each in profiles for name in each})
    found = {name: sorted({each.get(name, "-") for each in profiles}) for name in names}
    differing = {name: values for name, values in found.items() if len(values) > 1}
    if differing and not (is_tolerant and TOLERABLE_FIELDS.issuperset(differing)):
        raise ReferenceModelError(
            "the processes of this run compute log-probs with different numerics",
            where=f"ranks of {world.size}",
            got="; ".join(f"{name}: {_by_ranks(name, profiles, world)}" for name in differing),
            expected="one numerics profile on all ranks: stored log-probs are addressed by it",
            remedy="run on nodes of one kind with one installation"
            + ("; or set reference.numerics=tolerant" if TOLERABLE_FIELDS.issuperset(differing) else ""),
        )
    return {name: " or ".join(values) for name, values in found.items()}


def _by_ranks(name: str, profiles: list[Profile], world: World) -> str:
    """The values of one part of the profiles, each with its ranks: "AVX2 on rank 1 (host b), ..."."""
    ranks: dict[str, list[int]] = {}
    for rank, profile in enumerate(profiles):
        ranks.setdefault(profile.get(name, "-"), []).append(rank)
    hosts = {peer.rank: peer.host for peer in world.peers}
    return ", ".join(
        f"{value} on rank {', '.join(map(str, of_value))} "
        f"({', '.join(sorted({hosts.get(rank, '-') for rank in of_value}))})"
        for value, of_value in ranks.items()
    )


def find_compatible(root: Path, space: ReferenceFingerprint) -> list[ReferenceFingerprint]:
    """The spaces below `root` whose rows may serve for `space`: those of the least differences first."""
    if not root.is_dir():
        return []
    others = [
        other for folder in fingerprint_folders(root) if (other := read_fingerprint(folder)) is not None
    ]
    kin = [
        other
        for other in others
        if other.reference == space.reference
        and other != space
        and TOLERABLE_FIELDS.issuperset(_differing(space, other))
    ]
    return sorted(kin, key=lambda other: (len(_differing(space, other)), other.name))


def difference(space: ReferenceFingerprint, other: ReferenceFingerprint) -> str:
    """How the numerics of `other` differ from those of `space`: "attention sdpa, torch 2.12"."""
    return ", ".join(f"{name} {other.profile.get(name, '-')}" for name in _differing(space, other))


def _differing(space: ReferenceFingerprint, other: ReferenceFingerprint) -> list[str]:
    names = sorted(space.profile.keys() | other.profile.keys())
    return [name for name in names if space.profile.get(name) != other.profile.get(name)]


@dataclass(frozen=True)
class Unused:
    """Rows that a run computes although kin have them: how many, and how the numerics of these differ."""

    rows: int
    differences: list[str]


def count_unused(
    root: Path, space: ReferenceFingerprint, kin: Sequence[ReferenceFingerprint], visited: Visited
) -> Unused:
    """What a strict run leaves unused of its kin."""
    if not kin:
        return Unused(0, [])
    own, others = LogpStore.open(root, space), LogpStore(root, kin, list_stored(root, kin))
    servers = np.concatenate(
        [others.sources(data.keys[missing_responses(own, data, rows)[0]]) for data, rows in visited]
    )
    serving = np.unique(servers[servers >= 0]).tolist()
    return Unused(int((servers >= 0).sum()), [difference(space, kin[number]) for number in serving])


@dataclass(frozen=True)
class Served:
    """What a run was given by its own space and by kin.

    Attributes:
        rows: distinct responses by the difference of their numerics, "own" for none.
        audited: which data set of those visited, and rows of it with values of kin; None if there are none.
    """

    rows: dict[str, int]
    audited: tuple[int, Indices] | None


def count_reused(store: LogpStore, visited: Visited) -> Served:
    """Who serves the rows of `visited`, all of which `store` has."""
    counts = np.zeros(len(store.spaces), dtype=np.int64)
    audited = None
    for number, (dataset, rows) in enumerate(visited):
        places = dataset.response_indices(rows)
        servers = store.sources(dataset.keys[places])
        counts += np.bincount(servers[first_of_each(dataset.keys[places])], minlength=len(counts))
        of_kin = np.unique(np.repeat(rows, dataset.response_counts(rows))[servers > 0])
        if audited is None and len(of_kin):
            audited = number, of_kin
    own, *kin = store.spaces
    names = ["own", *(difference(own, other) for other in kin)]
    told = {name: count for name, count in zip(names, counts.tolist(), strict=True) if count}
    return Served(told, audited)
