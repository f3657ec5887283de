"""Inspect, verify and clean a reference store: `python -m dpo_dist.store info|verify|gc [FOLDER]`."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dpo_dist.foundation.errors import ConfigError, DpoDistError, ExitCode, ReferenceModelError
from dpo_dist.foundation.files import collect_abandoned, temporary_name
from dpo_dist.foundation.streams import open_closed_streams, print_line, print_result
from dpo_dist.foundation.text import counted, size
from dpo_dist.reference.store import (
    FINGERPRINT_FILE,
    fingerprint_folders,
    list_shards,
    open_shard,
    read_fingerprint,
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
    drop = "references or fingerprints to remove, as `info` prints them"
    gc.add_argument("--drop", nargs="+", default=[], metavar="DIGEST", help=drop)
    gc.add_argument("--unused-days", type=float, metavar="N", help="remove those not used for N days")
    gc.add_argument("--yes", action="store_true", help="remove them; without it they are only listed")
    return parser


Facts = dict[str, Any]
"""What is known of a fingerprint: a row of `info --json`."""


def _facts(folder: Path) -> Facts:
    """Read the keys of all shards in the folder of a fingerprint, not the values."""
    files = [folder / name for name in list_shards(folder)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        shards = [shard for shard in pool.map(open_shard, files) if shard is not None]
    known, described = read_fingerprint(folder), folder / FINGERPRINT_FILE
    used = (described if described.exists() else folder).stat().st_mtime
    return {
        "space": folder.name,
        "reference": known and known.reference,
        "label": (known.label or "unnamed") if known else f"no {FINGERPRINT_FILE} of this version",
        "profile": known and known.profile,
        "rows": sum(len(shard.keys) for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "shards": len(shards),
        "damaged_shards": len(files) - len(shards),
        "last_used": datetime.fromtimestamp(used, UTC).isoformat(timespec="seconds"),
    }


def _inventory(root: Path) -> list[Facts]:
    """Return the facts of all fingerprints of a store, the last used first."""
    return sorted(map(_facts, fingerprint_folders(root)), key=lambda each: each["last_used"], reverse=True)


def _line(facts: Facts) -> str:
    damaged = f", {facts['damaged_shards']} damaged" if facts["damaged_shards"] else ""
    return (
        f"{facts['label']}   reference {facts['reference'] or '-'}   fingerprint {facts['space']}   "
        f"{counted(facts['rows'], 'entry', 'entries')}, {counted(facts['tokens'], 'token')}, "
        f"{size(facts['bytes'])}, {counted(facts['shards'], 'shard')}{damaged}, "
        f"used {datetime.fromisoformat(facts['last_used']):%Y-%m-%d %H:%M}"
    )


def _info(given: argparse.Namespace) -> int:
    found = _inventory(given.folder)
    if given.json:
        print_result(json.dumps(found, indent=1) + "\n")
        return ExitCode.completed
    lines = []
    for facts in found:
        lines.append(_line(facts))
        if facts["profile"] is not None:
            lines.append("    " + ", ".join(f"{name} {value}" for name, value in facts["profile"].items()))
    entries = counted(sum(facts["rows"] for facts in found), "entry", "entries")
    stored = size(sum(facts["bytes"] for facts in found))
    lines.append(f"{counted(len(found), 'fingerprint')}, {entries}, {stored}")
    print_result("\n".join(lines) + "\n")
    return ExitCode.completed


def _verify(given: argparse.Namespace) -> int:
    folders = fingerprint_folders(given.folder)
    files = [folder / name for folder in folders for name in list_shards(folder)]

    def check(file: Path) -> tuple[int, str]:
        """Return the number of intact entries of a shard, and its fault."""
        if (shard := open_shard(file)) is None:
            return 0, "no entry can be verified"
        damaged = shard.count_damaged()
        fault = f"{damaged} of {len(shard.keys)} entries are damaged" if damaged else ""
        return len(shard.keys) - damaged, fault

    with ThreadPoolExecutor(max_workers=8) as pool:
        checked = list(pool.map(check, files))
    damage = {file: fault for file, (_, fault) in zip(files, checked, strict=True) if fault}
    for folder in folders:
        if read_fingerprint(folder) is None:
            damage[folder / FINGERPRINT_FILE] = "missing, damaged or of another version"
    for file, fault in damage.items():
        print_line(f"damaged: {file}: {fault}")
    intact = counted(sum(count for count, _ in checked), "valid entry", "valid entries")
    print_line(f"{counted(len(files), 'shard')}, {intact}, {counted(len(damage), 'damaged file')}")
    if damage:
        print_line("runs compute damaged entries again when they need them")
    return ExitCode.invalid if damage else ExitCode.completed


def _gc(given: argparse.Namespace) -> int:
    found = _inventory(given.folder)
    known = {facts[name] for facts in found for name in ("space", "reference")}
    if unknown := set(given.drop) - known:
        raise ConfigError(
            "a digest is of no reference or fingerprint in the store",
            where="--drop",
            got=", ".join(sorted(unknown)),
            remedy="python -m dpo_dist.store info lists the digests",
        )
    oldest = ""
    if given.unused_days is not None:
        oldest = (datetime.now(UTC) - timedelta(days=given.unused_days)).isoformat()
    unwanted = [
        facts
        for facts in found
        if facts["space"] in given.drop or facts["reference"] in given.drop or facts["last_used"] < oldest
    ]
    for facts in unwanted:
        print_line(f"drop: {_line(facts)}")
    what = f"{counted(len(unwanted), 'fingerprint')} ({size(sum(facts['bytes'] for facts in unwanted))})"
    if given.yes:
        for facts in unwanted:  # renamed first, so that no run finds it incomplete
            folder = given.folder / facts["space"]
            shutil.rmtree(folder.rename(temporary_name(folder)), ignore_errors=True)
        places = [given.folder, *(given.folder / facts["space"] for facts in found)]
        left = [path for place in places for path in collect_abandoned(place)]
        print_line(f"{what} and {counted(len(left), 'temporary file')} removed")
    else:
        print_line(f"nothing is removed yet; --yes removes {what}, and temporary files of dead writers")
    return ExitCode.completed


if __name__ == "__main__":
    sys.exit(main())
