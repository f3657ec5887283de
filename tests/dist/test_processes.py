"""Encoding on several processes: the bytes of one process, and errors of dead processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_dist.config.data import DataConfig, OnBadRecord, Ranked, SourceConfig
from dpo_dist.data.build import prepare_dataset
from dpo_dist.data.encode import CHUNK_RECORDS
from dpo_dist.foundation.errors import DataError, PeerLostError
from tests.support import tiny
from tests.support.cache import encoded_folders
from tests.support.records import jsonl
from tests.support.shared_data import shared_data_dir

ROOT = Path(__file__).parents[2]
BAD = {"prompt": "q", "chosen": "same", "rejected": "same"}


def record(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}", "chosen": "right " * (number % 7 + 1), "rejected": "</s> wrong"}


def source(folder: Path, *rows: Any) -> SourceConfig:
    return SourceConfig(jsonl(folder, *rows))


def prepare(
    folder: Path,
    sources: list[SourceConfig],
    processes: int | None,
    tokenizer: PreTrainedTokenizerBase,
    **data: Any,
) -> dict[str, bytes]:
    """The files that `prepare_dataset` writes on this number of processes."""
    config = DataConfig(cache=str(folder / f"cache {processes}"), processes=processes, **data)
    encoded = prepare_dataset(sources, config, tokenizer, "tokenizer")
    return {f"{place} {one.file.name}": one.file.read_bytes() for place, one in enumerate(encoded)}


@pytest.mark.parametrize("make", [tiny.qwen, tiny.mistral], ids=["qwen", "mistral"])
def test_real_data_are_encoded_equally(tmp_path: Path, make: Callable[[], PreTrainedTokenizerFast]) -> None:
    shared = shared_data_dir()
    if shared is None:
        pytest.skip("no slices of real data here")
    names = [
        "bad_records.jsonl",
        "hh_rlhf_sample.jsonl",
        "ultrafeedback_plain_scored.jsonl",
        "ranked_oasst_history_zh.json",
    ]
    sources = [SourceConfig(str(shared / name), limit=500) for name in names]
    one = prepare(tmp_path, sources, 1, make(), max_length=200, ranked=Ranked.all_pairs)
    assert prepare(tmp_path, sources, 3, make(), max_length=200, ranked=Ranked.all_pairs) == one


def test_any_number_of_records_is_encoded_equally(tmp_path: Path) -> None:
    """Sources that end before, at and after the end of a chunk, with bad records at both ends."""
    sources = []
    for count in (0, 1, CHUNK_RECORDS - 2, CHUNK_RECORDS - 1, 5 * CHUNK_RECORDS + 1):
        (tmp_path / str(count)).mkdir()
        sources.append(source(tmp_path / str(count), BAD, *map(record, range(count)), "no object"))
    one = prepare(tmp_path, sources, 1, tiny.qwen())
    for processes in (2, 5):
        assert prepare(tmp_path, sources, processes, tiny.qwen()) == one


def test_the_error_names_the_first_bad_record(tmp_path: Path) -> None:
    records = [record(number) for number in range(4 * CHUNK_RECORDS)]
    records[70], records[150] = BAD, {**BAD, "prompt": ""}
    rows = source(tmp_path, *records)
    for processes in (1, 2):
        with pytest.raises(DataError, match="identical_responses") as raised:
            prepare(tmp_path, [rows], processes, tiny.qwen(), on_bad_record=OnBadRecord.error)
        assert raised.value.where == f"{rows.path}:71"
        assert encoded_folders(tmp_path, f"cache {processes}") == []


def encoders(parent: psutil.Process) -> list[psutil.Process]:
    """Return the encoding processes of `parent`."""
    return [process for process in parent.children() if "spawn_main" in " ".join(process.cmdline())]


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
    assert "data.processes" in raised.value.where + raised.value.remedy
    assert encoded_folders(tmp_path, "cache 2") == []
    assert encoders(psutil.Process()) == []


ENDLESS = """
import signal
import sys
from pathlib import Path
from dpo_dist.config.data import SourceConfig
from dpo_dist.data import build as build_dataset_module
from tests.dist.test_processes import endless_records, prepare
from tests.support import tiny

if __name__ == "__main__":
    # A shell starts its background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    build_dataset_module.read_records = endless_records
    file = Path(sys.argv[1]) / "endless.jsonl"
    file.touch()
    prepare(Path(sys.argv[1]), [SourceConfig(str(file))], 2, tiny.qwen())
"""


def endless_records(endless: SourceConfig, _meter: Any) -> Any:
    from dpo_dist.data.records import Origin, PreferenceRecord

    number = 0
    while True:
        number += 1
        yield PreferenceRecord(f"question {number}", ("right", "wrong"), Origin(endless.path, number))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 240
        while len(started := encoders(psutil.Process(parent.pid))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(started) == 2
        parent.send_signal(number)
        assert parent.wait(240) != 0
        assert psutil.wait_procs(started, timeout=240)[1] == []
    finally:
        parent.kill()
