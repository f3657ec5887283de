"""Inspect, verify and clean a reference store: `python -m dpo_dist.store info|verify|gc [FOLDER]`."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from dpo_dist.foundation.errors import ConfigError, DpoDistError, ExitCode, ReferenceModelError
from dpo_dist.foundation.files import is_temporary, temporary_name
from dpo_dist.foundation.streams import open_closed_streams, print_line, print_result
from dpo_dist.foundation.text import counted, size
from dpo_dist.reference.store import (
    FINGERPRINT_FILE,
    ReferenceFingerprint,
    fingerprint_folders,
    list_shards,
    open_shard,
    read_fingerprint,
)

# A shard is written in seconds. Whether its writer is alive cannot be checked: it may run on another node.
_LEFTOVER_SECONDS = 24 * 3600


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


@dataclass(frozen=True)
class _Space:
    """Statistics of a folder; `fingerprint` is None if its `space.json` is not of this version."""

    folder: Path
    fingerprint: ReferenceFingerprint | None
    shards: int
    damaged: int
    entries: int
    tokens: int
    bytes: int
    last_used: datetime

    @classmethod
    def of(cls, folder: Path) -> "_Space":
        """Read the keys of all shards, not the values."""
        files = [folder / name for name in list_shards(folder)]
        with ThreadPoolExecutor(max_workers=8) as pool:
            shards = [shard for shard in pool.map(open_shard, files) if shard is not None]
        described = folder / FINGERPRINT_FILE
        used = (described if described.exists() else folder).stat().st_mtime
        return cls(
            folder=folder,
            fingerprint=read_fingerprint(folder),
            shards=len(shards),
            damaged=len(files) - len(shards),
            entries=sum(len(shard.keys) for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            bytes=sum(path.stat().st_size for path in folder.iterdir()),
            last_used=datetime.fromtimestamp(used, UTC),
        )

    @property
    def reference(self) -> str:
        """Digest of the model, "-" if it is unknown."""
        return self.fingerprint.reference if self.fingerprint is not None else "-"

    @property
    def label(self) -> str:
        """The model's name, or why it is unknown."""
        if self.fingerprint is None:
            return f"no {FINGERPRINT_FILE} of this version"
        return self.fingerprint.label or "unnamed"

    def __str__(self) -> str:
        damaged = f", {self.damaged} damaged" if self.damaged else ""
        return (
            f"{self.label}   reference {self.reference}   fingerprint {self.folder.name}   "
            f"{counted(self.entries, 'entry', 'entries')}, {counted(self.tokens, 'token')}, "
            f"{size(self.bytes)}, {counted(self.shards, 'shard')}{damaged}, "
            f"used {self.last_used:%Y-%m-%d %H:%M}"
        )


def _inventory(root: Path) -> list[_Space]:
    """Return all fingerprints of a store, the last used first."""
    return sorted(map(_Space.of, fingerprint_folders(root)), key=lambda space: space.last_used, reverse=True)


def _info(given: argparse.Namespace) -> int:
    found = _inventory(given.folder)
    if given.json:
        listed = [
            {
                "space": space.folder.name,
                "reference": space.fingerprint and space.fingerprint.reference,
                "label": space.label,
                "profile": space.fingerprint and space.fingerprint.profile,
                "rows": space.entries,
                "tokens": space.tokens,
                "bytes": space.bytes,
                "shards": space.shards,
                "damaged_shards": space.damaged,
                "last_used": space.last_used.isoformat(timespec="seconds"),
            }
            for space in found
        ]
        print_result(json.dumps(listed, indent=1) + "\n")
        return ExitCode.completed
    lines = []
    for space in found:
        lines.append(str(space))
        if space.fingerprint is not None:
            profile = space.fingerprint.profile.items()
            lines.append("    " + ", ".join(f"{name} {value}" for name, value in profile))
    entries, stored = sum(space.entries for space in found), sum(space.bytes for space in found)
    lines.append(
        f"{counted(len(found), 'fingerprint')}, {counted(entries, 'entry', 'entries')}, {size(stored)}"
    )
    print_result("\n".join(lines) + "\n")
    return ExitCode.completed


def _verify(given: argparse.Namespace) -> int:
    folders = fingerprint_folders(given.folder)
    files = [folder / name for folder in folders for name in list_shards(folder)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        checked = list(pool.map(_check, files))
    damage = {file: fault for file, (_, fault) in zip(files, checked, strict=True) if fault}
    for folder in folders:
        if read_fingerprint(folder) is None:
            damage[folder / FINGERPRINT_FILE] = "missing, damaged or of another version"
    for file, fault in damage.items():
        print_line(f"damaged: {file}: {fault}")
    intact = sum(count for count, _ in checked)
    print_line(
        f"{counted(len(files), 'shard')}, {counted(intact, 'valid entry', 'valid entries')}, "
        f"{counted(len(damage), 'damaged file')}"
    )
    if damage:
        print_line("runs compute damaged entries again when they need them")
    return ExitCode.invalid if damage else ExitCode.completed


def _check(file: Path) -> tuple[int, str]:
    """Return the number of intact entries of a shard, and its fault."""
    shard = open_shard(file)
    if shard is None:
        return 0, "no entry can be verified"
    damaged = shard.count_damaged()
    fault = f"{damaged} of {len(shard.keys)} entries are damaged" if damaged else ""
    return len(shard.keys) - damaged, fault


def _gc(given: argparse.Namespace) -> int:
    found = _inventory(given.folder)
    unwanted = [space for digits in given.drop for space in _with_digits(found, digits)]
    if given.unused_days is not None:
        oldest = datetime.now(UTC) - timedelta(days=given.unused_days)
        unwanted += [space for space in found if space.last_used < oldest]
    unwanted = [space for space in found if space in unwanted]
    places = [given.folder, *(space.folder for space in found)]
    temporary = (path for place in places for path in sorted(place.iterdir()) if is_temporary(path))
    leftovers = [path for path in temporary if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS]
    for space in unwanted:
        print_line(f"drop: {space}")
    for path in leftovers:
        print_line(f"remove: {path}")
    freed = size(sum(space.bytes for space in unwanted))
    what = (
        f"{counted(len(unwanted), 'fingerprint')} ({freed}) and {counted(len(leftovers), 'temporary file')}"
    )
    if given.yes:
        for path in [*(space.folder for space in unwanted), *leftovers]:
            _remove(path)
        print_line(f"{what} removed")
    elif unwanted or leftovers:
        print_line(f"nothing is removed yet; --yes removes {what}")
    else:
        print_line("nothing to remove")
    return ExitCode.completed


def _with_digits(found: Sequence[_Space], digits: str) -> list[_Space]:
    """Return the fingerprints of the one reference, or the fingerprint, whose digest begins with `digits`."""
    matching = [
        each for each in found if any(name.startswith(digits) for name in (each.folder.name, each.reference))
    ]
    if len({each.reference if each.fingerprint else each.folder.name for each in matching}) != 1:
        raise ConfigError(
            "a digest matches more than one reference" if matching else "a digest matches no reference",
            where="--drop",
            got=digits,
            remedy="python -m dpo_dist.store info lists the digests",
        )
    return matching


def _remove(path: Path) -> None:
    """Delete a file, or a folder, which is renamed first, so that no run finds it incomplete."""
    if path.is_dir():
        aside = path.rename(temporary_name(path))
        shutil.rmtree(aside, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
