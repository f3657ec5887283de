"""Results of checks: the lines of the table and the entries of selftest.json."""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

_SHARED_VERSIONS = ("python", "torch", "deepspeed", "transformers", "CUDA", "NCCL", "driver")
_NOT_INSTALLED = ("not installed", "needs Triton", "in torch before")
_NO_ROOM = ("memory is exhausted", "has no room", "cannot be written", "No space left")


class Check(NamedTuple):
    """A check that `passed`, `failed`, was `skipped` or only `measured`; the result in words and values."""

    name: str
    outcome: str
    seen: str
    values: Mapping[str, Any] = MappingProxyType({})


def shared_facts(date: str, checks: Sequence[Check]) -> dict[str, Any]:
    """Return what one machine tells others: devices, versions, speeds, exactness; no name, path or error."""
    values = {check.name: check.values for check in checks}
    names = [facts["name"] for name, facts in values.items() if name.startswith("GPU ")]
    versions = {name: values.get("versions", {}).get(name) for name in _SHARED_VERSIONS}
    speeds = {
        check.name.removeprefix("speed of "): {key: check.values[key] for key in ("pairs_per_second", "mfu")}
        for check in checks
        if check.name.startswith("speed of ") and check.outcome == "measured"
    }
    outcomes = {
        outcome: [check.name for check in checks if check.outcome == outcome]
        for outcome in ("passed", "failed", "skipped")
    }
    devices = [f"{number} x {name}" for name, number in Counter(names or ["CPU"]).items()]
    return {"date": date, "device": ", ".join(devices), "versions": versions, "speeds": speeds, **outcomes}


def failed_check(name: str, error: str) -> Check:
    """Return a check that ended with an error, `skipped` for want of a package, a newer torch or room."""
    lacks = _NOT_INSTALLED + _NO_ROOM * name.startswith("speed")
    return Check(name, "skipped" if any(lack in error for lack in lacks) else "failed", error)


def check_without_faults(name: str, faults: Sequence[str], seen: str) -> Check:
    """Return a check that failed with these faults, or, without any, passed with the result `seen`."""
    return Check(name, "failed" if faults else "passed", "; ".join(faults) or seen, {"faults": len(faults)})
