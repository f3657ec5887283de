"""`python -m dpo_dist store`: info, verify and gc."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from dpo_dist.foundation.errors import DpoDistError
from dpo_dist.foundation.files import staged_file, temporary_name
from dpo_dist.foundation.text import size
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint
from dpo_dist.verbs.store import main
from tests.unit.reference.test_store import ENTRIES, keys_of, readable, values, write

FIRST = ReferenceFingerprint("aa" * 16, {"dtype": "fp32"}, "org/first@0123")
SECOND = ReferenceFingerprint("ab" * 16, {"dtype": "bf16"}, "./second")
DAY = 24 * 3600


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Shards of a store with three entries of one reference and two of another."""
    return [write(tmp_path, ENTRIES, FIRST), write(tmp_path, {1: [-9.0], 2: [-8.0]}, SECOND)]


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(verb: str, *arguments: str) -> tuple[int, str]:
        try:
            code = main([verb, str(tmp_path), *arguments])
        except DpoDistError as error:
            return error.exit_code, error.block()
        return code, capsys.readouterr().out

    return run


def test_info_lists_each_reference_with_its_counts(run: Run, shards: list[Path], tmp_path: Path) -> None:
    stamp = shards[1].parent / "space.json"
    os.utime(stamp, (time.time() - 10 * DAY,) * 2)
    first, numerics, second, _, total = run("info")[1].splitlines()
    assert first.startswith(f"org/first@0123   reference {FIRST.reference}   fingerprint {FIRST.name}")
    stored = sum(file.stat().st_size for file in shards[0].parent.iterdir())
    assert f"3 entries, 6 tokens, {size(stored)}, 1 shard, used " in first
    assert numerics == "    dtype fp32"
    assert f"used {datetime.fromtimestamp(stamp.stat().st_mtime):%Y-%m-%d}" in second
    assert total.startswith("2 fingerprints, 5 entries")
    assert run("list") == run("info"), "the help's own word"
    assert run("verify") == (0, "2 shards, 5 valid entries, 0 damaged files\n")
    LogpStore.open(tmp_path, SECOND)
    assert time.time() - stamp.stat().st_mtime < 60, "opening it is its last use"


def test_a_row_of_a_teacher_is_one_token(run: Run, tmp_path: Path) -> None:
    write(tmp_path, {1: [1.0] * 10, 2: [2.0] * 5}, replace(FIRST, width=5))
    assert "2 entries, 3 tokens, " in run("info")[1]


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--drop", FIRST.name], [SECOND]),
        (["--drop", "aa", "ab"], []),
        (["--unused-days", "30"], [FIRST]),
        (["--unused-days", "60", "--drop", "aa"], [SECOND]),
    ],
)
def test_gc_drops_named_or_unused_references(
    arguments: list[str], left: list[ReferenceFingerprint], run: Run, shards: list[Path], tmp_path: Path
) -> None:
    os.utime(shards[1].parent / "space.json", (time.time() - 40 * DAY,) * 2)
    code, printed = run("gc", *arguments)
    assert code == 0
    assert all(shard.exists() for shard in shards), "without --yes it only lists"
    dropped = [each for each in (FIRST, SECOND) if each not in left]
    assert all(each.name in printed for each in dropped)
    assert run("gc", *arguments, "--yes")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(each.name for each in left)


@pytest.mark.parametrize(("digits", "said"), [("a", "more than one reference"), ("ff", "no reference")])
def test_gc_refuses_ambiguous_digests(digits: str, said: str, run: Run, shards: list[Path]) -> None:
    code, printed = run("gc", "--drop", digits, "--yes")
    assert code == 2
    assert said in printed
    assert all(shard.exists() for shard in shards)


def test_gc_removes_temporary_files_of_dead_writers(run: Run, shards: list[Path], tmp_path: Path) -> None:
    dead, folder = temporary_name(shards[0]), temporary_name(shards[0].parent)
    dead.write_bytes(b"half")
    folder.mkdir()
    with staged_file(shards[1]) as written:
        for path in (dead, folder, written):
            os.utime(path, (time.time() - 2 * DAY,) * 2)
        assert run("gc", "--yes")[0] == 0
        assert not dead.exists()
        assert not folder.exists()
        assert all(path.exists() for path in (written, *shards))


def test_a_running_job_continues_after_its_fingerprint_was_dropped(
    run: Run, shards: list[Path], tmp_path: Path
) -> None:
    store = LogpStore.open(tmp_path, FIRST)
    assert run("gc", "--drop", "aa", "--yes")[0] == 0
    assert [entry.tolist() for entry in store.read(keys_of([4, 7]))] == [ENTRIES[4], ENTRIES[7]]
    store.write(keys_of([2]), [values(-1.0)])
    assert readable(tmp_path, [*ENTRIES, 2], FIRST) == {2: [-1.0]}


def test_encoded_data_are_never_garbage(tmp_path: Path, shards: list[Path], run: Run) -> None:
    """Their folders have names like fingerprints."""
    encoded = tmp_path / ("cd" * 16)
    encoded.mkdir()
    (encoded / "manifest.json").write_text("{}")
    code, output = run("gc", "--unused-days", "0", "--yes")
    assert (code, encoded.is_dir(), shards[0].exists()) == (0, True, False), output
    for verb in ("info", "verify", "gc"):
        code, output = run(verb)
        assert (code, encoded.is_dir()) == (2, True), output
        assert "this folder has no reference store" in output


def test_it_starts_without_torch() -> None:
    check = (
        "import dpo_dist.verbs.store, sys; "
        "sys.exit(bool({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
