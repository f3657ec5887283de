"""Inspect, verify, clean and publish a reference store: `dpo-dist store info|verify|gc|push [FOLDER]`."""

import argparse
import itertools
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dpo_dist.foundation.errors import Arguments, ConfigError, ExitCode, exit_after
from dpo_dist.foundation.files import remove_abandoned, temporary_name
from dpo_dist.foundation.remote import is_url
from dpo_dist.foundation.streams import print_line, print_result
from dpo_dist.foundation.text import pluralize, size
from dpo_dist.reference.behind import Behind
from dpo_dist.reference.index import forget_whole
from dpo_dist.reference.published import ENTRY, push
from dpo_dist.reference.store import (
    FINGERPRINT_FILE,
    find_fingerprint_folders,
    list_shards,
    open_shard,
    read_fingerprint,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="dpo-dist store", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    for (verb, *others), run, text in (
        (["info", "list"], _info, "list the references with their entries, sizes and dates of last use"),
        (["verify"], _verify, "read every entry; the exit code is 2 if a file is damaged"),
        (["gc", "clean"], _gc, "remove references by digest or age, and files that killed jobs have left"),
        (["push", "publish"], _push, "publish intact entries, which others fetch by reference.behind"),
    ):
        of_verb = verbs.add_parser(verb, aliases=others, help=text, description=text)
        of_verb.set_defaults(run=run)
        if run is _push:
            of_verb.add_argument("folder", type=Path)
            of_verb.add_argument("target", help="folder or URL; its list is replaced")
            only = "references or fingerprints to publish; all by default"
            of_verb.add_argument("--license", default="", metavar="TEXT", help="terms that the list names")
            of_verb.add_argument("--only", nargs="+", default=[], metavar="DIGEST", help=only)
        else:
            kind = str if run is _info else Path
            of_verb.add_argument("folder", type=kind, nargs="?", default=kind("output/reference"))
    gc = verbs.choices["gc"]
    drop = "references or fingerprints to remove"
    gc.add_argument("--drop", nargs="+", default=[], metavar="DIGEST", help=drop)
    gc.add_argument("--unused-days", type=float, metavar="N", help="remove references not used for N days")
    gc.add_argument("--yes", action="store_true", help="remove; without it, only list what would be removed")
    return parser


@dataclass(frozen=True)
class _Listing:
    """Facts of a fingerprint's folder; `digests`: of the fingerprint and of its reference."""

    folder: Path
    digests: list[str]
    used: float
    entries: int
    bytes: int
    line: str


def _list_store(root: Path) -> list[_Listing]:
    """Return the facts of a store's folders, the last used first, without reading values."""
    return sorted(map(_list_folder, find_fingerprint_folders(root)), key=lambda each: each.used, reverse=True)


def _list_folder(folder: Path) -> _Listing:
    files = [folder / name for name in list_shards(folder)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        shards = [shard for shard in pool.map(open_shard, files) if shard is not None]
    fingerprint = read_fingerprint(folder)
    described = folder / FINGERPRINT_FILE
    used = (described if described.exists() else folder).stat().st_mtime
    entries = sum(len(shard.keys) for shard in shards)
    stored = sum(file.stat().st_size for file in folder.iterdir())
    damaged = f", {len(files) - len(shards)} damaged" if len(files) > len(shards) else ""
    digests = [folder.name]
    reference = "-"
    label = f"no readable {FINGERPRINT_FILE}"
    tokens = sum(shard.tokens for shard in shards)
    if fingerprint is not None:
        reference = fingerprint.reference
        digests.append(reference)
        label = fingerprint.label or "unnamed"
        tokens //= fingerprint.width
    line = (
        f"{label}   reference {reference}   fingerprint {folder.name}   "
        f"{pluralize(entries, 'entry', 'entries')}, "
        f"{pluralize(tokens, 'token')}, {size(stored)}, {pluralize(len(shards), 'shard')}{damaged}, "
        f"used {datetime.fromtimestamp(used):%Y-%m-%d %H:%M}"
    )
    return _Listing(folder, digests, used, entries, stored, line)


def _info(options: argparse.Namespace) -> int:
    if is_url(options.folder):
        return _info_of_url(options.folder)
    listings = _list_store(Path(options.folder))
    lines = []
    for listing in listings:
        lines.append(listing.line)
        fingerprint = read_fingerprint(listing.folder)
        if fingerprint is not None:
            lines.append("    " + ", ".join(f"{name} {value}" for name, value in fingerprint.profile.items()))
    entries = pluralize(sum(listing.entries for listing in listings), "entry", "entries")
    stored = size(sum(listing.bytes for listing in listings))
    lines.append(f"{pluralize(len(listings), 'fingerprint')}, {entries}, {stored}")
    print_result("\n".join(lines) + "\n")
    return ExitCode.completed


def _info_of_url(url: str) -> int:
    """List what a published store has, from its list alone."""
    spaces = Behind(url).spaces()
    for fingerprint, space in spaces:
        print_line(
            f"{fingerprint.label or 'unnamed'}   reference {fingerprint.reference}   "
            f"fingerprint {fingerprint.name}   "
            f"{pluralize(space.bytes // ENTRY.itemsize, 'entry', 'entries')}, "
            f"{pluralize(space.numbers // fingerprint.width, 'token')}, {size(4 * space.numbers)}, "
            f"{pluralize(len(space.shards), 'shard')}"
        )
        for facts in (fingerprint.profile, {**space.recipe, "license": space.license or "not given"}):
            known = [f"{name} {value}" for name, value in facts.items() if value is not None]
            print_line("    " + ", ".join(known))
    print_line(f"{pluralize(len(spaces), 'fingerprint')}; for a run: reference.behind=[{url}]")
    return ExitCode.completed


def _push(options: argparse.Namespace) -> int:
    listings = _list_store(options.folder)
    if options.only:
        chosen = (_find_by_digest(listings, digits, "--only") for digits in options.only)
        listings = [*itertools.chain.from_iterable(chosen)]
    pushed = push(sorted({listing.folder for listing in listings}), options.target, options.license)
    for each in pushed:
        left_out = f", {pluralize(each.damaged, 'damaged shard')} left out" if each.damaged else ""
        if each.unconfirmed:
            left_out += (
                f", {pluralize(each.unconfirmed, 'fetched shard')} left out, not compared with the model"
            )
        entries = pluralize(each.entries, "entry", "entries")
        print_line(f"{each.label or 'unnamed'}: {entries}, {size(each.bytes)}{left_out}")
    number = pluralize(sum(each.entries > 0 for each in pushed), "fingerprint")
    print_line(f"{options.target} has {number}; for a run: reference.behind=[{options.target}]")
    return ExitCode.completed


def _verify(options: argparse.Namespace) -> int:
    folders = find_fingerprint_folders(options.folder)
    files: list[Path] = []
    for folder in folders:
        files += [folder / name for name in list_shards(folder)]

    def check(file: Path) -> tuple[int, str]:
        """Return the number of a shard's intact entries, and its fault, if it has one."""
        shard = open_shard(file)
        if shard is None:
            return 0, "no entry can be verified"
        damaged = shard.count_damaged()
        fault = f"{damaged} of {len(shard.keys)} entries are damaged" if damaged else ""
        return len(shard.keys) - damaged, fault

    with ThreadPoolExecutor(max_workers=8) as pool:
        checked = list(pool.map(check, files))
    damage = {file: fault for file, (_, fault) in zip(files, checked, strict=True) if fault}
    for folder in folders:
        if any(file.parent == folder for file in damage):
            forget_whole(folder)
        if read_fingerprint(folder) is None:
            damage[folder / FINGERPRINT_FILE] = "missing, damaged or written by another version"
    for file, fault in damage.items():
        print_line(f"damaged: {file}: {fault}")
    intact = pluralize(sum(count for count, _ in checked), "valid entry", "valid entries")
    print_line(f"{pluralize(len(files), 'shard')}, {intact}, {pluralize(len(damage), 'damaged file')}")
    if damage:
        print_line("runs compute damaged entries again when they need them")
    return ExitCode.invalid if damage else ExitCode.completed


def _gc(options: argparse.Namespace) -> int:
    listings = _list_store(options.folder)
    unwanted: dict[Path, _Listing] = {}
    for digits in options.drop:
        unwanted |= {listing.folder: listing for listing in _find_by_digest(listings, digits)}
    if options.unused_days is not None:
        oldest = time.time() - options.unused_days * 24 * 3600
        unwanted |= {listing.folder: listing for listing in listings if listing.used < oldest}
    for listing in unwanted.values():
        print_line(f"drop: {listing.line}")
    freed = size(sum(listing.bytes for listing in unwanted.values()))
    what = f"{pluralize(len(unwanted), 'fingerprint')} ({freed})"
    if not options.yes:
        print_line(f"nothing is removed yet; --yes removes {what}, and files that killed jobs have left")
        return ExitCode.completed
    for folder in unwanted:  # renamed first: a run must not find half of its shards
        shutil.rmtree(folder.rename(temporary_name(folder)), ignore_errors=True)
    for place in (
        options.folder,
        *(listing.folder for listing in listings if listing.folder not in unwanted),
    ):
        for left in remove_abandoned(place):
            print_line(f"removed: {left}")
    print_line(f"{what} removed")
    return ExitCode.completed


def _find_by_digest(listings: Sequence[_Listing], digits: str, option: str = "--drop") -> list[_Listing]:
    """Return the folders of the one fingerprint or reference whose digest begins with `digits`."""
    matching = [each for each in listings if any(name.startswith(digits) for name in each.digests)]
    if len({each.digests[-1] for each in matching}) != 1:
        number = "more than one" if matching else "no"
        raise ConfigError(
            f"a digest matches {number} reference",
            where=option,
            got=digits,
            remedy="dpo-dist store info lists the digests",
        )
    return matching


if __name__ == "__main__":
    exit_after(main)
