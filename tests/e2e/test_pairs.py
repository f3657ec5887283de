"""`pairs` from models' responses: the same on one process and on two, resumable, read by the trainer."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.foundation.files import locked
from tests.support.launch import Finished, constants, run_verb, running, wait_until
from tests.support.records import user
from tests.support.tiny_model import write_model

RULE = "def score(prompt, responses):\n    return [float(len(text)) for text in responses]\n"
SLEEPING = "import pathlib, time\ndef score(*_):\n    pathlib.Path('asleep').touch()\n    time.sleep(1000)\n"
BROKEN = RULE.replace(":\n", ":\n    if '13' in prompt[0]['content']:\n        raise ValueError\n")
PARTS = constants(**{"dpo_dist.tools.pairs.make_pairs.PROMPTS_OF_A_PART": 4})
SAMPLES = ("pairs.method=samples", "pairs.function=rule:score", "pairs.samples=3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_model(folder / "strong")
    write_model(folder / "weak", seed=1)
    records = [{"prompt": [user(f"question number {number % 18}")]} for number in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, text in (("rule", RULE), ("broken", BROKEN), ("slow", SLEEPING)):
        (folder / f"{name}.py").write_text(text)
    return folder


def command(place: Path, run: str, *overrides: str) -> list[str]:
    base = [f"model.path={place}/strong", "model.dtype=fp32", f"data.train=[{place}/prompts.jsonl]"]
    return [*base, "sampling.max_new_tokens=10", "pairs.unfinished=keep", f"run.dir={run}", *overrides]


def make(place: Path, run: str, *overrides: str, processes: int = 1, code: int = 0) -> Finished:
    ended = run_verb("pairs", command(place, run, *overrides), processes=processes, cwd=place, prepare=PARTS)
    assert ended.code == code, ended.output
    return ended


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_pairs_do_not_depend_on_processes_or_starts(place: Path) -> None:
    assert "prompts: 18 different ones, 2 repeated" in make(place, "alone", *SAMPLES).output
    folder = place / "alone/pairs"
    pairs, first = rows(folder / "pairs.jsonl"), (folder / "pairs.jsonl").read_bytes()
    assert len(pairs) > 10
    for row in pairs:
        assert row["score_chosen"] == len(row["chosen"][0]["content"]) > row["score_rejected"]
        assert row["provenance"]["judge"]["function"] == "rule:score"
    read = list(read_records(str(folder / "pairs.jsonl")))
    assert [record.scores for record in read if isinstance(record, PreferenceRecord)] == [
        (row["score_chosen"], row["score_rejected"]) for row in pairs
    ]
    assert len(rows(folder / "samples.jsonl")) == 18
    make(place, "together", *SAMPLES, processes=2)
    assert (place / "together/pairs/pairs.jsonl").read_bytes() == first
    # Only open parts are done again.
    (responses,) = folder.glob("parts/responses-*")
    written = {file.name: file.stat().st_mtime_ns for file in responses.glob("0*.jsonl")}
    assert len(written) == 5
    (responses / "000003.jsonl").unlink()
    shutil.rmtree(next(folder.glob("parts/scores-*")))
    make(place, "alone", *SAMPLES)
    assert (folder / "pairs.jsonl").read_bytes() == first
    now = {file.name: file.stat().st_mtime_ns for file in responses.glob("0*.jsonl")}
    assert {name for name in written if written[name] != now[name]} == {"000003.jsonl"}
    # Another selection uses the same responses; no file is replaced unasked.
    refused = make(place, "alone", *SAMPLES, "pairs.select=all_pairs", code=2)
    assert "select: best_worst before, all_pairs now" in refused.output
    (folder / "pairs.jsonl").unlink()
    make(place, "alone", *SAMPLES, "pairs.select=all_pairs")
    assert list(folder.glob("parts/responses-*")) == [responses]
    assert len(rows(folder / "pairs.jsonl")) > len(pairs)


def test_a_rank_that_fails_ends_all_with_one_error(place: Path) -> None:
    broken = ("pairs.method=samples", "pairs.function=broken:score", "pairs.samples=2")
    ended = make(place, "failed", *broken, processes=2, code=2)
    assert ended.output.count("configuration error: the judge's function gives no usable scores") == 1
    assert "Traceback" not in ended.output
    assert not (place / "failed/pairs/pairs.jsonl").exists()


def test_a_second_start_in_the_run_directory_is_refused(place: Path) -> None:
    with locked(place / "locked/pairs/.lock", "is this test", "wait"):
        ended = make(place, "locked", *SAMPLES, code=2)
    assert "another process makes pairs in this run directory" in ended.output
    assert not (place / "locked/pairs/parts").exists()


def test_ctrl_c_ends_at_once_without_a_traceback(place: Path) -> None:
    overrides = command(place, "stopped", "pairs.method=samples", "pairs.function=slow:score")
    with running("pairs", overrides, place / "stopped.txt", place) as process:
        wait_until((place / "asleep").exists, process)
        os.kill(process.pid, signal.SIGINT)
        process.join(240)
        assert process.exitcode == 130
    said = (place / "stopped.txt").read_text()
    assert "interrupted" in said
    assert "Traceback" not in said


def test_delta_pairs_prefer_the_first_model(place: Path) -> None:
    make(place, "delta", "pairs.method=delta", f"pairs.models=[{place}/strong,{place}/weak]")
    for row in rows(place / "delta/pairs/pairs.jsonl"):
        assert "score_chosen" not in row
        sides = (row["provenance"][side]["model"]["name"] for side in ("chosen", "rejected"))
        assert list(sides) == [f"{place}/strong", f"{place}/weak"]
