"""Inspect, verify and clean a reference store: `python -m dpo_dist.store info|verify|gc [FOLDER]`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.foundation.errors import DpoDistError, ExitCode, ReferenceModelError
from dpo_dist.foundation.streams import open_closed_streams, print_line, print_result
from dpo_dist.foundation.text import counted, size
from dpo_dist.reference.maintenance import (
    FingerprintInfo,
    find_garbage,
    remove,
    take_inventory,
    verify_store,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    open_closed_streams()
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except DpoDistError as error:
        fault = error
    except OSError as error:
        fault = ReferenceModelError(
            "the store cannot be read or changed",
            where=str(given.folder),
            got=str(error),
            remedy="check the path, its permissions and the free space",
        )
    print_line(fault.block(), sys.stderr)
    return fault.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dpo_dist.store", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    for verb, run, text in (
        ("info", _info, "list the references with their entries, sizes and dates of last use"),
        ("verify", _verify, "read every entry; the exit code is 2 if a file is damaged"),
        ("gc", _gc, "remove references by name or age, and temporary files of dead writers"),
    ):
        own = verbs.add_parser(verb, help=text, description=text)
        own.add_argument("folder", type=Path, nargs="?", default=Path("output/reference"))
        own.set_defaults(run=run)
    verbs.choices["info"].add_argument("--json", action="store_true", help="print JSON")
    gc = verbs.choices["gc"]
    gc.add_argument(
        "--drop", nargs="+", default=[], metavar="DIGEST", help="references or fingerprints to remove"
    )
    gc.add_argument("--unused-days", type=float, metavar="N", help="remove those not used for N days")
    gc.add_argument("--yes", action="store_true", help="remove them; without it they are only listed")
    return parser


def _info(given: argparse.Namespace) -> int:
    found = take_inventory(given.folder)
    if given.json:
        print_result(json.dumps([info.as_dict() for info in found], indent=1) + "\n")
        return ExitCode.completed
    lines = []
    for info in found:
        lines.append(_line(info))
        if info.fingerprint is not None:
            profile = info.fingerprint.profile.items()
            lines.append("    " + ", ".join(f"{name} {value}" for name, value in profile))
    entries, stored = sum(info.entries for info in found), sum(info.bytes for info in found)
    lines.append(
        f"{counted(len(found), 'fingerprint')}, {counted(entries, 'entry', 'entries')}, {size(stored)}"
    )
    print_result("\n".join(lines) + "\n")
    return ExitCode.completed


def _verify(given: argparse.Namespace) -> int:
    shards, entries, damage = verify_store(given.folder)
    for file, fault in damage.items():
        print_line(f"damaged: {file}: {fault}")
    print_line(
        f"{counted(shards, 'shard')}, {counted(entries, 'valid entry', 'valid entries')}, "
        f"{counted(len(damage), 'damaged file')}"
    )
    if damage:
        print_line("runs compute damaged entries again when they need them")
    return ExitCode.invalid if damage else ExitCode.completed


def _gc(given: argparse.Namespace) -> int:
    unwanted, leftovers = find_garbage(given.folder, given.drop, given.unused_days)
    for info in unwanted:
        print_line(f"drop: {_line(info)}")
    for path in leftovers:
        print_line(f"remove: {path}")
    freed = size(sum(info.bytes for info in unwanted))
    found = (
        f"{counted(len(unwanted), 'fingerprint')} ({freed}) and {counted(len(leftovers), 'temporary file')}"
    )
    if given.yes:
        remove([*(given.folder / info.name for info in unwanted), *leftovers])
        print_line(f"{found} removed")
    elif unwanted or leftovers:
        print_line(f"nothing is removed yet; --yes removes {found}")
    else:
        print_line("nothing to remove")
    return ExitCode.completed


def _line(info: FingerprintInfo) -> str:
    reference = info.fingerprint.reference if info.fingerprint is not None else "-"
    damaged = f", {info.damaged} damaged" if info.damaged else ""
    return (
        f"{info.label}   reference {reference}   fingerprint {info.name}   "
        f"{counted(info.entries, 'entry', 'entries')}, {counted(info.tokens, 'token')}, {size(info.bytes)}, "
        f"{counted(info.shards, 'shard')}{damaged}, "
        f"used {info.last_used:%Y-%m-%d %H:%M}"
    )


if __name__ == "__main__":
    sys.exit(main())
