"""Encoding on several processes: the bytes of one process, and errors of dead processes."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_dist.data.config import DataConfig, Ranked, SourceConfig
from dpo_dist.data.read.sources import DataSource
from dpo_dist.data.records import Origin, RawRecord
from dpo_dist.encoded import workers
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import open_dataset
from dpo_dist.encoded.workers import CHUNK_RECORDS
from dpo_dist.foundation.errors import DataError, PeerLostError
from dpo_dist.foundation.remedies import AtRecords
from tests.support import tiny
from tests.support.cache import encoded_folders
from tests.support.records import jsonl
from tests.support.shared_data import shared_data_dir
from tests.support.warm import context, start_parent

BAD = {"prompt": "q", "chosen": "same", "rejected": "same"}


def record(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}", "chosen": "right " * (number % 7 + 1), "rejected": "</s> wrong"}


def source(folder: Path, *rows: Any) -> SourceConfig:
    return SourceConfig(jsonl(folder, *rows))


def prepare(
    folder: Path,
    sources: list[SourceConfig],
    processes: int,
    tokenizer: PreTrainedTokenizerBase,
    **data: Any,
) -> dict[str, bytes]:
    """The files that a `Preparation` writes on this number of processes."""
    config = DataConfig(cache=str(folder / f"cache {processes}"), **data)
    with mock.patch.object(workers, "processes_for", return_value=processes):
        encoded = Preparation(sources, config, tokenizer, "tokenizer").whole()
    return {f"{place} {one.file.name}": one.file.read_bytes() for place, one in enumerate(encoded)}


@pytest.mark.parametrize(("cores", "expected"), [(128, 16), (8, 8), (1, 1)])
def test_one_rank_encodes_with_all_cores_of_its_node(
    cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    assert (workers.processes_for(10**6), workers.processes_for(1)) == (expected, 1)


INNER = {side: f"record.{side}|default(none)" for side in ("prompt", "chosen", "rejected")}
RANKED = {"prompt": "instruction|turn", "history": "history", "responses": "output", "best_first": True}
REAL = {"bad_records.jsonl": INNER, "ranked_oasst_history_zh.json": RANKED}


def test_any_number_of_records_is_encoded_equally(tmp_path: Path) -> None:
    """Sources that end at and after the end of a chunk, with bad records at both ends or only; real data."""
    sources = []
    for count in (0, CHUNK_RECORDS - 2, CHUNK_RECORDS - 1, 5 * CHUNK_RECORDS + 1):
        (tmp_path / str(count)).mkdir()
        sources.append(source(tmp_path / str(count), BAD, *map(record, range(count)), "no object"))
    if (shared := shared_data_dir()) is not None:
        sources += [
            SourceConfig(str(shared / name), fields=fields, ignore=["*"], limit=200)
            for name, fields in REAL.items()
        ]
    options = {"max_length": 200, "ranked": Ranked.all_pairs}
    one = prepare(tmp_path, sources, 1, tiny.mistral(), **options)
    start_parent()
    # Forks of the warm parent, as three processes start for each source; other tests have spawned ones.
    with mock.patch.object(multiprocessing, "get_context", return_value=context):
        assert prepare(tmp_path, sources, 3, tiny.mistral(), **options) == one


def test_the_error_names_the_first_bad_record(tmp_path: Path) -> None:
    records = [record(number) for number in range(4 * CHUNK_RECORDS)]
    records[70], records[150] = BAD, {**BAD, "prompt": ""}
    rows = source(tmp_path, *records)
    for processes in (1, 2):
        config = DataConfig(cache=str(tmp_path / f"cache {processes}"), max_bad_share=0)
        with mock.patch.object(workers, "processes_for", return_value=processes):
            encoded = Preparation([rows], config, tiny.qwen(), "tokenizer").whole()
        with pytest.raises(DataError, match="2 of 256 records cannot be used") as raised:
            open_dataset(encoded, config)
        assert isinstance(raised.value.where, AtRecords)
        assert raised.value.where.records[0] == f"{rows.path}:71 identical_responses"


def encoders(parent: psutil.Process) -> list[psutil.Process]:
    """Return the living processes of `parent` that encode."""
    found = []
    for process in parent.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # ended, and nobody asked for its exit code yet
            found += [process] if "spawn_main" in " ".join(process.cmdline()) else []
    return found


class Mortal(PreTrainedTokenizerFast):
    """Kills another process which gets it."""

    def __setstate__(self, _state: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_process_is_one_clear_error(tmp_path: Path) -> None:
    records = [record(number) for number in range(6 * CHUNK_RECORDS)]
    records[200]["prompt"] = "kill"
    rows = source(tmp_path, *records)
    plain = tiny.qwen()
    tokenizer = Mortal(tokenizer_object=plain.backend_tokenizer, **plain.special_tokens_map)
    tokenizer.chat_template = plain.chat_template
    with pytest.raises(PeerLostError, match="encodes data has died") as raised:
        prepare(tmp_path, [rows], 2, tokenizer)
    assert "taskset -c 0" in raised.value.remedy
    assert encoded_folders(tmp_path, "cache 2") == []
    assert psutil.wait_procs(encoders(psutil.Process()), timeout=60)[1] == []


def encode_endlessly(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without
    folder.mkdir()
    (file := folder / "endless.jsonl").touch()
    with mock.patch.object(DataSource, "raw_records", endless_records):
        prepare(folder, [SourceConfig(str(file))], 2, tiny.qwen())


def endless_records(endless: DataSource, *_: Any) -> Iterator[RawRecord]:
    records = ((record(number), Origin(endless.path, number)) for number in itertools.count(1))
    return endless._declared(records, of_prompts=False)


def test_no_process_outlives_its_parent(tmp_path: Path) -> None:
    start_parent()
    numbers = (signal.SIGKILL, signal.SIGINT)
    parents = [context.Process(target=encode_endlessly, args=(tmp_path / number.name,)) for number in numbers]
    try:
        for parent in parents:
            parent.start()
        deadline = time.monotonic() + 240
        for number, parent in zip(numbers, parents, strict=True):
            while len(started := encoders(psutil.Process(parent.pid))) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.kill(parent.pid, number)
            parent.join(240)
            assert parent.exitcode not in (0, None)
            assert psutil.wait_procs(started, timeout=240)[1] == []
    finally:
        for parent in parents:
            parent.kill()
