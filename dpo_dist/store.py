"""Look after a store of reference log-probs: `python -m dpo_dist.store info|verify|gc [FOLDER]`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from dpo_dist.errors import DpoDistError, ExitCode, ReferenceModelError
from dpo_dist.reference.maintenance.garbage import find_garbage, remove
from dpo_dist.reference.maintenance.info import FingerprintInfo, take_inventory
from dpo_dist.reference.maintenance.verify import repair, verify_store


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dpo_dist.store", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, told in (
        ("info", "which references it holds, how much of each, and when they were used"),
        ("verify", "read every row; ends with 2 if a file is damaged"),
        ("gc", "remove references that nobody wants, and what dead writers left"),
    ):
        own = verbs.add_parser(verb, help=told, description=told)
        own.add_argument("folder", type=Path, nargs="?", default=Path("output/reference"))
    verbs.choices["info"].add_argument("--json", action="store_true", help="print JSON")
    verbs.choices["verify"].add_argument("--repair", action="store_true", help="keep the rows that hold only")
    gc = verbs.choices["gc"]
    gc.add_argument("--drop", nargs="+", default=[], metavar="DIGEST", help="references or spaces that go")
    gc.add_argument("--keep", nargs="+", default=[], metavar="DIGEST", help="those that stay; others go")
    gc.add_argument("--unused-days", type=float, metavar="N", help="what no run opened for so long goes")
    gc.add_argument("--yes", action="store_true", help="do it; otherwise it is only told")
    given = parser.parse_args(arguments)
    try:
        match given.verb:
            case "info":
                _info(given)
            case "verify":
                return _verify(given)
            case "gc":
                _gc(given)
        return ExitCode.completed
    except DpoDistError as error:
        fault = error
    except (OSError, SafetensorError) as error:
        fault = ReferenceModelError(
            "the store cannot be read or changed", where=str(given.folder), got=str(error)
        )
    sys.stderr.write(fault.block() + "\n")
    return fault.exit_code


def _info(given: argparse.Namespace) -> None:
    spaces = take_inventory(given.folder)
    if given.json:
        print(json.dumps([space.as_dict() for space in spaces], indent=1))
        return
    for space in spaces:
        print(_line(space))
        if space.space is not None:
            print("    " + ", ".join(f"{name} {value}" for name, value in space.space.profile.items()))
    total = sum(space.rows for space in spaces), sum(space.bytes for space in spaces)
    print(f"{len(spaces)} spaces, {total[0]:,} rows, {_size(total[1])}")


def _verify(given: argparse.Namespace) -> int:
    found = verify_store(given.folder)
    unmended = 0
    for damage in found.damage:
        print(f"damaged: {damage.file}: {damage.fault}")
        if given.repair:
            mended, told = repair(damage)
            unmended += not mended
            print(f"    {told}")
    for kind, files in (
        ("not of the store, passed over", found.foreign),
        ("left by a writer, or being written", found.leftovers),
        ("of another version, serves no run", found.outdated),
    ):
        for file in files:
            print(f"{kind}: {file}")
    print(
        f"{found.shards} shards, {found.rows:,} rows that hold, {found.duplicates:,} of them twice, "
        f"{len(found.damage)} files damaged"
    )
    if found.damage and not given.repair:
        print("runs compute what they need of the damaged rows again; --repair keeps the rows that hold only")
    return ExitCode.invalid if (unmended if given.repair else found.damage) else ExitCode.completed


def _gc(given: argparse.Namespace) -> None:
    garbage = find_garbage(given.folder, given.drop, given.keep, given.unused_days)
    for space in garbage.spaces:
        print(f"drop: {_line(space)}")
    for path in garbage.leftovers:
        print(f"remove: {path}")
    size = _size(sum(space.bytes for space in garbage.spaces))
    if given.yes:
        remove(garbage)
        print(f"{len(garbage.spaces)} spaces ({size}) and {len(garbage.leftovers)} leftovers removed")
    elif garbage.spaces or garbage.leftovers:
        print(
            f"nothing is removed yet; --yes removes these {len(garbage.spaces)} spaces ({size}) and leftovers"
        )
    else:
        print("nothing to remove")


def _line(space: FingerprintInfo) -> str:
    reference = space.space.reference if space.space is not None else "-"
    damaged = f", {space.damaged} damaged" if space.damaged else ""
    return (
        f"{space.label}   reference {reference}   space {space.name}   {space.rows:,} rows, "
        f"{space.tokens:,} tokens, {_size(space.bytes)}, {space.shards} shards{damaged}, "
        f"used {space.last_used:%Y-%m-%d %H:%M}"
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


if __name__ == "__main__":
    sys.exit(main())
