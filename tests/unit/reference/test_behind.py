"""Published stores: the same bytes again, single entries of them from anywhere, and those of liars."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from dpo_dist.foundation.errors import ConfigError, DataError, DpoDistError, ReferenceModelError
from dpo_dist.foundation.files import write_json
from dpo_dist.objective.distillation import SparseRows
from dpo_dist.reference import behind as module
from dpo_dist.reference.behind import Behind, fault_of_logps
from dpo_dist.reference.published import ENTRY, LIST, push, values_digest
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint, list_shards
from dpo_dist.verbs.store import main
from tests.support.file_server import file_server
from tests.unit.data.test_urls import bucket  # noqa: F401  (a fixture)

KEPT = SparseRows(k=3, drawn=2, temperature=1.0, vocabulary=50)
TEACHER = ReferenceFingerprint("aa" * 16, {"dtype": "fp32"}, "org/teacher@0123", KEPT.width)
REFERENCE = ReferenceFingerprint("ab" * 16, {"dtype": "fp32"}, "org/reference@0123")
RECIPE = {"data.max_length": 1024, "data.train": ["org/pairs@main"]}
ENTRIES = 300
_RANDOM = np.random.default_rng(0)
KEYS = _RANDOM.integers(0, 2**63, (ENTRIES, 2), dtype=np.uint64)
KEYS[7, 0] = KEYS[8, 0]  # two keys with the same first word
TOKENS = _RANDOM.integers(1, 30, ENTRIES)


def rows(tokens: int) -> Any:
    """Invented rows of a teacher."""
    largest = [_RANDOM.permutation(50)[:3], [0.5, 0.3, 0.1], [7, 9], [0.05, 1.2]]
    return np.array([np.concatenate(largest) for _ in range(tokens)], dtype=np.float32)


ROWS = [rows(tokens) for tokens in TOKENS]
LOGPS = [-_RANDOM.random(tokens, dtype=np.float32) for tokens in TOKENS]
VALUES = {TEACHER.name: ROWS, REFERENCE.name: LOGPS}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a teacher and a reference, in several shards, and what is published of it."""
    folder = tmp_path_factory.mktemp("behind")
    for fingerprint, values in ((TEACHER, ROWS), (REFERENCE, LOGPS)):
        (folder / "store" / fingerprint.name).mkdir(parents=True)
        store = LogpStore.open(folder / "store", fingerprint)
        for start in range(0, ENTRIES, 128):
            store.write(KEYS[start : start + 128], values[start : start + 128])
        write_json(store.folder / "recipe.json", RECIPE)
    assert main(["push", str(folder / "store"), str(folder / "public"), "--license", "CC-BY"]) == 0
    return folder


@pytest.fixture
def public(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "public", tmp_path / "public"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def found_in(
    place: str, fingerprint: ReferenceFingerprint = TEACHER, tokens: Any = TOKENS, which: Any = slice(None)
) -> tuple[dict[int, Any], Behind]:
    """What a store has of the entries `which`; each is checked to be that of its key."""
    behind = Behind(place)
    fault = KEPT.fault_of_others if fingerprint is TEACHER else fault_of_logps
    found = dict[int, Any]()
    for of, row, values in behind.find(fingerprint, KEYS[which], tokens[which], fault, RECIPE):
        assert of == fingerprint
        found[row] = values
    numbers = np.arange(ENTRIES)[which]
    for row, values in found.items():
        assert np.array_equal(values, VALUES[fingerprint.name][numbers[row]])
    return found, behind


def test_a_published_store_is_published_again_with_the_same_bytes(root: Path, tmp_path: Path) -> None:
    for source in (root / "store", root / "public"):
        assert main(["push", str(source), str(tmp_path / "again"), "--license", "CC-BY"]) == 0
        assert contents(tmp_path / "again") == contents(root / "public")
    assert not list(tmp_path.rglob("*tmp*"))


def test_only_intact_entries_of_chosen_references_are_published(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(root / "store", tmp_path / "store"))
    folder = store / REFERENCE.name
    first, second, _ = (folder / name for name in list_shards(folder))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.write_bytes(b"")
    assert main(["push", str(store), str(tmp_path / "public"), "--only", "ab"]) == 0
    assert "2 damaged shards left out" in capsys.readouterr().out
    spaces = Behind(str(tmp_path / "public")).spaces()
    [(fingerprint, space)] = spaces
    assert fingerprint == REFERENCE
    entries = space.bytes // ENTRY.itemsize
    found, behind = found_in(str(tmp_path / "public"), REFERENCE)
    assert 128 < len(found) == entries < ENTRIES - 1
    assert behind.left_out == 0
    with pytest.raises(ConfigError, match="no reference"):
        main(["push", str(store), str(tmp_path / "public"), "--only", "ff"])
    for name in list_shards(folder):
        (folder / name).write_bytes(b"")
    with pytest.raises(ReferenceModelError, match="no intact entry"):
        push([folder], str(tmp_path / "empty"))
    assert not (tmp_path / "empty" / LIST).exists()


def test_what_was_fetched_and_not_compared_is_not_published(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(root / "store", tmp_path / "store"))
    first, *others = list_shards(store / REFERENCE.name)
    (store / REFERENCE.name / first).with_suffix(".fetched").write_text("https://elsewhere")
    assert main(["push", str(store), str(tmp_path / "public"), "--only", "ab"]) == 0
    [(_, space)] = Behind(str(tmp_path / "public")).spaces()
    assert set(space.shards) == set(others)
    assert "1 fetched shard left out" in capsys.readouterr().out
    for name in others:
        (store / REFERENCE.name / name).with_suffix(".fetched").write_text("https://elsewhere")
    with pytest.raises(ReferenceModelError) as raised:
        push([store / REFERENCE.name], str(tmp_path / "empty"))
    assert "fetched" in raised.value.got
    assert "a run that has the model" in raised.value.remedy


FEW = np.array([7, 8, 60, 250])


@pytest.mark.parametrize("fingerprint", [TEACHER, REFERENCE])
def test_entries_of_a_folder_and_an_object_store(
    root: Path, public: Path, fingerprint: ReferenceFingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GAP", 0)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    push(sorted((root / "store").iterdir()), "memory://bucket/store", "CC-BY")
    for place in (str(public), "memory://bucket/store"):
        assert len(found_in(place, fingerprint)[0]) == ENTRIES
        found, behind = found_in(place, fingerprint, which=FEW)
        assert len(found) == len(FEW)
        listed = len((public / LIST).read_bytes()) + ENTRIES * ENTRY.itemsize
        assert behind.bytes_read == listed + sum(VALUES[fingerprint.name][row].nbytes for row in FEW)
        other = ReferenceFingerprint("ff" * 16, {}, "unknown")
        assert not list(Behind(place).find(other, KEYS, TOKENS, fault_of_logps, RECIPE))
        assert not list(Behind(place).find(fingerprint, KEYS + 1, TOKENS, fault_of_logps, RECIPE))
    memory.store.clear()


@pytest.mark.parametrize("ranges", [True, False])
def test_entries_of_a_web_server(public: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason="https:// needs aiohttp")
    monkeypatch.setattr(module, "_GAP", 100)
    with file_server(public, ranges=ranges) as (url, asked):
        assert len(found_in(url)[0]) == ENTRIES
        asked.clear()
        assert len(found_in(url, which=FEW)[0]) == len(FEW)
        of_shards = [each for each in asked if each.name.endswith(".safetensors")]
        if ranges:
            ends = [each.range.removeprefix("bytes=").split("-") for each in of_shards]
            assert sum(int(last) + 1 - int(first) for first, last in ends) == sum(
                ROWS[row].nbytes for row in FEW
            )
        else:
            assert len(of_shards) == len({each.name for each in of_shards}), "each shard once"
            monkeypatch.setattr(module, "_LARGEST_WHOLE", 1000)
            with pytest.raises(ReferenceModelError, match="sends whole files only"):
                found_in(url)


def test_a_download_that_ends_early_is_a_missing_entry(public: Path) -> None:
    pytest.importorskip("aiohttp", reason="https:// needs aiohttp")
    with file_server(public, cut=".safetensors") as (url, _):
        found, behind = found_in(url)
        assert (len(found), behind.left_out) == (0, ENTRIES)
    with file_server(public, cut=".entries") as (url, _), pytest.raises(DpoDistError):
        found_in(url)


def test_entries_of_a_bucket(root: Path, bucket: Any) -> None:  # noqa: F811
    push(sorted((root / "store").iterdir()), "s3://bucket/store")
    assert len(found_in("s3://bucket/store")[0]) == ENTRIES
    found, _ = found_in("s3://bucket/store", REFERENCE, which=FEW)
    assert len(found) == len(FEW)


def test_large_parts_are_divided(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("_GAP", 0), ("_REQUEST", 500), ("_THREADS", 2)):
        monkeypatch.setattr(module, name, size)
    assert len(found_in(str(public))[0]) == ENTRIES


def test_info_lists_what_a_url_has_without_its_values(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/listed/store.json", (root / "public" / LIST).read_bytes())
    assert main(["info", "memory://listed"]) == 0
    output = capsys.readouterr().out
    assert f"org/teacher@0123   reference {TEACHER.reference}   fingerprint {TEACHER.name}" in output
    assert output.count(f"{ENTRIES} entries, {TOKENS.sum():,} tokens") == 2
    assert "reference.behind=[memory://listed]" in output
    assert "data.max_length 1024, data.train ['org/pairs@main'], license CC-BY" in output
    memory.store.clear()
    with pytest.raises(DataError, match="nothing is at the URL"):
        main(["info", "memory://listed"])


def test_what_differs_is_said_where_a_store_has_few_of_the_responses(public: Path) -> None:
    behind = Behind(str(public))
    recipe = RECIPE | {"data.max_length": 512}
    assert not list(behind.find(TEACHER, KEYS + 1, TOKENS, KEPT.fault_of_others, recipe))
    assert behind.differences == ("data.max_length 1024 (here 512)",)
    _, behind = found_in(str(public))
    assert not behind.differences
    assert not list(behind.find(TEACHER, KEYS[:1] + 1, TOKENS[:1], KEPT.fault_of_others, RECIPE))
    assert not behind.differences, "of all that was asked for, most was found"
    other = ReferenceFingerprint(TEACHER.reference, {"dtype": "bf16"}, width=KEPT.width)
    behind = Behind(str(public))
    assert not list(behind.find(other, KEYS, TOKENS, KEPT.fault_of_others, RECIPE, rounding=True))
    assert behind.differences == ("dtype fp32 (here bf16)",)
    for of, keys, differences in (
        (replace(TEACHER, reference="ff" * 16), KEYS, ()),
        (TEACHER, KEYS + 1, ("the token ids",)),
    ):
        behind = Behind(str(public))
        assert not list(behind.find(of, keys, TOKENS, KEPT.fault_of_others, RECIPE))
        assert behind.differences == differences


def test_entries_that_differ_by_rounding_come_after_those_of_the_same_numerics(tmp_path: Path) -> None:
    """Of each key the value says the fingerprint: 0 that of the run, 1 another GPU, 2 another model."""
    profile = {"dtype": "fp32", "gpu": "sm_90"}
    own = ReferenceFingerprint("ab" * 16, profile)
    exact = [{"dtype": "bf16"}, {"quantization": "nf4"}, {"rows": "8"}, {"matmul_precision": "high"}]
    others = [ReferenceFingerprint(own.reference, profile | {"gpu": "sm_80", "torch": "2.9"})]
    others += [ReferenceFingerprint(own.reference, profile | each) for each in exact]
    others += [ReferenceFingerprint("cd" * 16, profile), replace(own, width=2)]
    assert [own.rounds(other) for other in others] == [True] + 6 * [False]
    assert not own.rounds(own)
    for number, fingerprint in enumerate([own, *others]):
        store = LogpStore.open(tmp_path / "store", fingerprint)
        size = 2 if number else 1
        store.write(KEYS[:size], [np.array([-number] * fingerprint.width, np.float32)] * size)
    push(sorted((tmp_path / "store").iterdir()), str(tmp_path / "public"))

    def found(*, rounding: bool) -> list[tuple[str, int, float]]:
        behind = Behind(str(tmp_path / "public"))
        found = behind.find(own, KEYS[:3], np.ones(3, int), fault_of_logps, {}, rounding=rounding)
        every = [(of.name, row, float(values[0])) for of, row, values in found]
        assert (behind.responses, behind.entries) == (3, len(every))
        return every

    assert found(rounding=False) == [(own.name, 0, 0)]
    assert found(rounding=True) == [(own.name, 0, 0), (others[0].name, 1, -1)]


def test_other_numerics_are_not_asked_if_nothing_is_missing(public: Path) -> None:
    read = []
    for rounding in (False, True):
        behind = Behind(str(public))
        assert len(
            list(behind.find(TEACHER, KEYS, TOKENS, KEPT.fault_of_others, RECIPE, rounding=rounding))
        ) == len(KEYS)
        read.append(behind.bytes_read)
    assert read[0] == read[1]


# Stores of liars.

Change = Callable[[dict[str, Any], Any, Path], Any]


def rewrite(published: Path, change: Change) -> None:
    """Change the list, the entries and the shards of the teacher, with digests that are right again."""
    listed = json.loads((published / LIST).read_text())
    space = listed["fingerprints"][TEACHER.name]
    folder = published / TEACHER.name
    table = np.frombuffer((folder / f"{space['entries']}.entries").read_bytes(), ENTRY).copy()
    content = change(space, table, folder).tobytes()
    space["entries"] = values_digest(content).hex()
    space["bytes"] = len(content)
    (folder / f"{space['entries']}.entries").write_bytes(content)
    (published / LIST).write_text(json.dumps(listed))


def with_values(number: int, value: float) -> Change:
    """Replace a number of each row of three entries."""

    def change(space: dict[str, Any], table: Any, folder: Path) -> Any:
        for row in table[:3]:
            file = folder / space["shards"][row["shard"]]
            content = bytearray(file.read_bytes())
            span = slice(int(row["start"]), int(row["start"]) + 4 * int(row["numbers"]))
            values = np.frombuffer(content[span], "<f4").copy().reshape(-1, KEPT.width)
            values[:, number] = value
            content[span] = values.tobytes()
            file.write_bytes(content)
            row["digest"] = np.frombuffer(values_digest(values.tobytes()), np.uint8)
        return table

    return change


def with_field(name: str, value: int) -> Change:
    """Replace a field of three entries."""

    def change(space: dict[str, Any], table: Any, folder: Path) -> Any:
        table[name][:3] = value
        return table

    return change


def flipped(space: dict[str, Any], table: Any, folder: Path) -> Any:
    for row in table[:3]:
        file = folder / space["shards"][row["shard"]]
        content = bytearray(file.read_bytes())
        content[int(row["start"]) + 5] ^= 1
        file.write_bytes(content)
    return table


def without_ends(space: dict[str, Any], table: Any, folder: Path) -> Any:
    for number, name in enumerate(space["shards"]):
        file = folder / name
        last = table["start"][table["shard"] == number].max()
        file.write_bytes(file.read_bytes()[: int(last) + 1])
    return table


BAD_ENTRIES: dict[str, Change] = {
    "values that are not the digest's": flipped,
    "shards without their ends": without_ends,
    "more numbers than the response has": with_field("numbers", 2**32 - 1),
    "no numbers": with_field("numbers", 0),
    "a place outside the file": with_field("start", 2**40),
    "a place outside any file": with_field("start", 2**64 - 1),
    "the shard's header": with_field("start", 0),
    "a shard that is not listed": with_field("shard", 2**31),
    "an id that is nan": with_values(0, np.nan),
    "an id outside the vocabulary": with_values(1, 50),
    "a drawn id that is no whole number": with_values(6, 0.5),
    "a share that is infinite": with_values(3, np.inf),
    "shares with a sum above 1": with_values(3, 0.9),
    "shares that rise": with_values(5, 0.4),
    "a negative share": with_values(5, -0.2),
    "a mass that is negative": with_values(8, -0.05),
    "an entropy below 0": with_values(9, -1.0),
    "an entropy that is nan": with_values(9, np.nan),
    "more entropy than the vocabulary has": with_values(9, 99.0),
}


@pytest.mark.parametrize("change", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_bad_entries_are_missing(public: Path, change: Change) -> None:
    rewrite(public, change)
    found, behind = found_in(str(public))
    assert (len(found), behind.left_out) == (ENTRIES - 3, 3)


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf, 0.5])
def test_a_number_that_is_no_log_prob(value: float) -> None:
    assert fault_of_logps(np.array([-1, value], dtype=np.float32))
    assert not fault_of_logps(np.array([-1, 0, -50], dtype=np.float32))


def test_an_entry_of_another_length_is_missing(public: Path) -> None:
    tokens = TOKENS.copy()
    tokens[:5] += 1
    found, behind = found_in(str(public), tokens=tokens)
    assert (len(found), behind.left_out) == (ENTRIES - 5, 5)


def unsorted(space: dict[str, Any], table: Any, folder: Path) -> Any:
    return table[::-1]


def of_space(**fields: Any) -> Callable[[Path], None]:
    def change(published: Path) -> None:
        listed = json.loads((published / LIST).read_text())
        listed["fingerprints"][TEACHER.name] |= fields
        (published / LIST).write_text(json.dumps(listed))

    return change


def of_list(text: str) -> Callable[[Path], None]:
    return lambda published: (published / LIST).write_text(text) and None


def other_entries(published: Path) -> None:
    [file] = (published / TEACHER.name).glob("*.entries")
    file.write_bytes(file.read_bytes()[:-1] + b"x")


LIES: dict[str, Callable[[Path], None]] = {
    "no JSON": of_list("{"),
    "no object": of_list("[]"),
    "nothing": of_list("null"),
    "a depth that ends the parser": of_list("[" * 100_000),
    "another format": of_list('{"format": 9, "fingerprints": {}}'),
    "no fingerprints": of_list('{"format": 1}'),
    "fingerprints that are a list": of_list('{"format": 1, "fingerprints": [1]}'),
    "a list without an end": of_list(" " * (2**24 + 1)),
    "a shard outside the folder": of_space(shards=["../../../etc/passwd"]),
    "a shard that leads out of its folder": of_space(shards=["a" * 32 + "/../../secret.safetensors"]),
    "a shard of another kind": of_space(shards=["a" * 32 + ".pickle"]),
    "shards that are no names": of_space(shards=[1]),
    "entries outside the folder": of_space(entries="../" + "a" * 29),
    "entries that are not there": of_space(entries="a" * 32),
    "more entries than memory": of_space(bytes=48 * 2**40),
    "fewer bytes than the entries have": of_space(bytes=48),
    "half an entry": of_space(bytes=50),
    "no entry": of_space(bytes=0),
    "entries of another fingerprint": of_space(space=REFERENCE.as_dict()),
    "a recipe that is a list": of_space(recipe=[1]),
    "a width of nothing": of_space(space={**TEACHER.as_dict(), "width": 0}),
    "a field that nobody knows": of_space(code="import os"),
    "entries of another digest": other_entries,
    "entries that are not sorted": lambda published: rewrite(published, unsorted),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_list_that_lies_is_one_plain_error(public: Path, lie: Callable[[Path], None]) -> None:
    lie(public)
    with pytest.raises((ReferenceModelError, DataError)) as raised:
        found_in(str(public))
    assert str(public) in raised.value.where
    assert len(raised.value.got) < 400


def test_headers_of_shards_are_not_parsed(public: Path) -> None:
    for file in public.rglob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(b"\xff" * 8 + content[8:])
    assert len(found_in(str(public))[0]) == ENTRIES


def test_a_missing_package_is_named_before_the_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match="s3fs"):
        Behind("s3://bucket/store")


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()
