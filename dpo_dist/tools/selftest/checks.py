"""The checks of this machine, as lines of a table and as entries of selftest.json."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

_NOT_INSTALLED = ("not installed", "needs Triton")
_NO_ROOM = ("memory is exhausted", "has no room", "cannot be written", "No space left")


class Check(NamedTuple):
    """A check: `passed`, `failed`, `skipped`, or `measured`, with what was seen, in words and in values."""

    name: str
    outcome: str
    seen: str
    values: Mapping[str, Any] = MappingProxyType({})


def failed_check(name: str, error: str) -> Check:
    """Return the check of an error: `skipped` where the machine lacks a package, or room for a speed."""
    lacks = _NOT_INSTALLED + _NO_ROOM * name.startswith("speed")
    return Check(name, "skipped" if any(lack in error for lack in lacks) else "failed", error)


def check_without_faults(name: str, faults: Sequence[str], seen: str) -> Check:
    """Return the check that failed by these faults, or passed with what was seen."""
    return Check(name, "failed" if faults else "passed", "; ".join(faults) or seen, {"faults": len(faults)})
