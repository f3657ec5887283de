"""Results of checks: the lines of the table and the entries of selftest.json."""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

_NOT_INSTALLED = ("not installed", "needs Triton", "in torch before")
_NO_ROOM = ("memory is exhausted", "has no room", "cannot be written", "No space left")


class Check(NamedTuple):
    """A check that `passed`, `failed`, was `skipped` or only `measured`; the result in words and values."""

    name: str
    outcome: str
    seen: str
    values: Mapping[str, Any] = MappingProxyType({})


def shared_facts(date: str, checks: Sequence[Check]) -> dict[str, Any]:
    """Return what one machine tells others: devices, versions, speeds, outcomes; no name, path or error."""
    values = {check.name: check.values for check in checks}
    gpus = Counter(facts["name"] for name, facts in values.items() if name.startswith("GPU "))
    device = ", ".join(f"{number} x {name}" for name, number in gpus.items()) or "CPU"
    speeds = {name: facts for name, facts in values.items() if name.startswith("speed of ") and facts}
    facts = {"date": date, "device": device, "versions": values.get("versions", {}), "speeds": speeds}
    return {**facts, "checks": {check.name: check.outcome for check in checks}}


def failed_check(name: str, error: str) -> Check:
    """Return a check that ended with an error, `skipped` for want of a package, a newer torch or room."""
    lacks = _NOT_INSTALLED + _NO_ROOM * name.startswith("speed")
    return Check(name, "skipped" if any(lack in error for lack in lacks) else "failed", error)


def check_without_faults(name: str, faults: Sequence[str], seen: str) -> Check:
    """Return a check that failed with these faults, or, without any, passed with the result `seen`."""
    return Check(name, "failed" if faults else "passed", "; ".join(faults) or seen, {"faults": len(faults)})
