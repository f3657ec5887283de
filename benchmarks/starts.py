"""Measure what a start of a run costs, by the number of its records: generated, short, and encoded already.

For each number of records a run with a tiny model starts three times, from its command to its second step,
with a store that has all log-probs of the reference: the `first` time, when only the encoded records and the
store's shards are there; when it goes on from its checkpoint (`resume`); and as a new run (`again`). The
table has the figures of the `base`, and by how much those of more records are larger: seconds to the first
step, CPU seconds of all ranks to their ends, and memory of the largest rank, private (anonymous, sampled
every 50 ms) and resident (with mapped files). A slope is that of a million records between the base and the
most records. Files take up to 1 kB a record.
"""

import contextlib
import dataclasses
import json
import shutil
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.generated import KINDS, built_files, overrides, prepare, remove_others, write_model
from benchmarks.measured_start import Start, measure
from benchmarks.options import Benchmark, Json, markdown
from benchmarks.runs import in_fork

_FIGURES = {"seconds": "seconds", "cpu_seconds": "CPU s", "private": "private MB", "resident": "resident MB"}

Row = dict[str, float]


def run(options: Namespace) -> Json:
    """Measure each kind of records on each number of ranks."""
    figures: Json = {}
    for kind in options.kind:
        with _folder(options) as folder:
            model, found = folder / "model", dict[tuple[int, str, int], Row]()
            in_fork(partial(write_model, model))
            # This run scores the evaluation data, which are the same beside any number of training records.
            in_fork(partial(prepare, folder / "scored", model, kind, 16))
            _start(folder / "scored", model, kind, "scored", 1)
            for records in (options.base, *options.records):
                inputs = folder / str(records)
                print(f"\n{records:,} {kind}: {inputs}", file=sys.stderr)
                in_fork(partial(prepare, inputs, model, kind, records, folder / "scored" / "store"))
                for ranks in options.ranks:
                    for name, start in _starts(inputs, model, kind, ranks, records).items():
                        found[ranks, name, records] = _row(start)
                if not options.keep:
                    shutil.rmtree(inputs)
        figures[kind] = _by_ranks(found, options)
        print(f"\n{kind}\n\n{markdown(_table(figures[kind]))}")
    return figures


@contextlib.contextmanager
def _folder(options: Namespace) -> Iterator[Path]:
    """Yield a new folder, which stays with `--keep`."""
    folder = Path(tempfile.mkdtemp(dir=options.work))
    try:
        yield folder
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def _starts(inputs: Path, model: Path, kind: str, ranks: int, records: int) -> dict[str, Start]:
    """Start a run for the first time, from its checkpoint, and as a new run; then remove what they wrote."""
    pristine = built_files(inputs)
    runs = {"first": "one", "resume": "one", "again": "another"}
    starts: dict[str, Start] = {}
    for name, run in runs.items():
        starts[name] = _start(inputs, model, kind, run, ranks)
        print(f"{ranks} ranks, {name}: {starts[name]}", file=sys.stderr)
    remove_others(inputs, pristine)
    for name in set(runs.values()):
        summary = json.loads((inputs / name / "dpo_metrics" / "summary.json").read_text())
        found = summary["data"]["train"]["kept"], summary["reference"]["computed"]
        assert found == (records, 0), f"(records, scored responses) are {found}: other inputs were read"
        shutil.rmtree(inputs / name)
    return starts


def _start(inputs: Path, model: Path, kind: str, name: str, ranks: int) -> Start:
    own = [f"run.dir={inputs / name}", "trainer.stop_after_steps=2"]
    return measure([*overrides(inputs, model, kind), *own], ranks)


def _row(start: Start) -> Row:
    return {**dataclasses.asdict(start), "private": max(start.private), "resident": max(start.resident)}


def _by_ranks(found: dict[tuple[int, str, int], Row], options: Namespace) -> Json:
    """Return the rows by ranks, start and records, with the differences from the base, and the slopes."""
    figures: Json = {}
    for (ranks, name, records), row in found.items():
        base = found[ranks, name, options.base]
        more = row if records == options.base else {figure: row[figure] - base[figure] for figure in row}
        figures.setdefault(f"{ranks}", {}).setdefault(name, {})[f"{records}"] = more
    for starts in figures.values():
        for rows in starts.values():
            millions = (max(options.records) - options.base) / 1e6
            most = rows[f"{max(options.records)}"]
            rows["slope"] = {figure: most[figure] / millions for figure in most}
    return figures


def _table(figures: Json) -> list[list[str]]:
    rows = [["ranks", "start", "records", *_FIGURES.values()]]
    for ranks, starts in figures.items():
        for name, by_records in starts.items():
            for number, (records, row) in enumerate(by_records.items()):
                sign = "+" if number else ""
                shown = f"{int(records):,}" if records.isdecimal() else "a million more"
                rows.append([ranks, name, shown, *(f"{row[figure]:{sign},.1f}" for figure in _FIGURES)])
    return rows


def _own_options(parser: ArgumentParser) -> None:
    add = partial(parser.add_argument, type=int, nargs="+")
    add("--records", default=[1_000_000], help="numbers of records")
    parser.add_argument("--base", type=int, default=1_000, help="number of records that the others exceed")
    add("--ranks", default=[1, 4], help="numbers of ranks")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--keep", action="store_true", help="keep the files, and print where they are")


BENCHMARK = Benchmark(
    run, own=_own_options, smoke={"records": [200], "base": 100, "ranks": [1], "kind": ["labelled"]}
)
