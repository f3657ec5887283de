"""`pairs` from models' responses: the same on one process and on three, resumable, read by the trainer."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.foundation.files import locked
from tests.support.launch import ROOT, Finished, command, constants, environment, run_verb
from tests.support.records import user
from tests.support.tiny_model import write_model

RULE = "def score(prompt, responses):\n    return [float(len(text)) for text in responses]\n"
SLEEPING = "import pathlib, time\ndef score(*_):\n    pathlib.Path('asleep').touch()\n    time.sleep(1000)\n"
BROKEN = "def score(prompt, responses):\n    if '13' in prompt[0]['content']:\n        raise ValueError\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_model(folder / "strong")
    write_model(folder / "weak", seed=1)
    records = [{"prompt": [user(f"question number {number % 18}")]} for number in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "rule.py").write_text(RULE)
    (folder / "broken.py").write_text(BROKEN + RULE.splitlines()[1] + "\n")
    return folder


PARTS = constants(**{"dpo_dist.generation.pairs.run.PART_PROMPTS": 4})


def make(place: Path, run: str, *overrides: str, processes: int = 1) -> Finished:
    base = [f"model.path={place}/strong", "model.dtype=fp32", f"data.train=[{place}/prompts.jsonl]"]
    limits = ["pairs.max_new_tokens=10", "pairs.unfinished=keep", f"run.dir={run}"]
    return run_verb("pairs", [*base, *limits, *overrides], processes=processes, cwd=place, prepare=PARTS)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


SAMPLES = ("pairs.method=samples", "pairs.function=rule:score", "pairs.samples=3")


def test_the_pairs_do_not_depend_on_processes_or_batches(place: Path) -> None:
    ended = make(place, "alone", *SAMPLES)
    assert ended.code == 0, ended.output
    assert "prompts: 18 different ones, 2 repeated" in ended.output
    ended = make(place, "together", *SAMPLES, processes=3)
    assert ended.code == 0, ended.output
    alone, together = (rows(place / run / "pairs/pairs.jsonl") for run in ("alone", "together"))
    assert alone == together
    assert len(alone) > 10
    for row in alone:
        assert row["score_chosen"] == len(row["chosen"][0]["content"]) > row["score_rejected"]
        assert row["provenance"]["judge"]["function"] == "rule:score"
        assert row["provenance"]["source"].startswith(f"{place}/prompts.jsonl:")
    read = list(read_records(str(place / "alone/pairs/pairs.jsonl")))
    assert [record.scores for record in read if isinstance(record, PreferenceRecord)] == [
        (row["score_chosen"], row["score_rejected"]) for row in alone
    ]
    assert len(rows(place / "alone/pairs/samples.jsonl")) == 18


def test_a_start_again_repeats_only_open_parts(place: Path) -> None:
    make(place, "again", *SAMPLES)
    folder = place / "again/pairs"
    first = (folder / "pairs.jsonl").read_bytes()
    (responses,) = folder.glob("parts/responses-*")
    written = {file.name: file.stat().st_mtime_ns for file in responses.glob("0*.jsonl")}
    assert len(written) == 5
    (responses / "000003.jsonl").unlink()
    shutil.rmtree(next(folder.glob("parts/scores-*")))
    (folder / "pairs.jsonl").unlink()
    assert make(place, "again", *SAMPLES, processes=2).code == 0
    assert (folder / "pairs.jsonl").read_bytes() == first
    now = {file.name: file.stat().st_mtime_ns for file in responses.glob("0*.jsonl")}
    assert {name for name in written if written[name] != now[name]} == {"000003.jsonl"}


def test_another_pairing_uses_the_same_responses_and_no_file_is_replaced_unasked(place: Path) -> None:
    assert make(place, "other", *SAMPLES).code == 0
    refused = make(place, "other", *SAMPLES, "pairs.select=all_pairs")
    assert refused.code == 2
    assert "select: best_worst before, all_pairs now" in refused.output
    best_worst = rows(place / "other/pairs/pairs.jsonl")
    (place / "other/pairs/pairs.jsonl").unlink()
    ended = make(place, "other", *SAMPLES, "pairs.select=all_pairs")
    assert ended.code == 0, ended.output
    assert len(list((place / "other/pairs/parts").glob("responses-*"))) == 1
    assert len(rows(place / "other/pairs/pairs.jsonl")) > len(best_worst)


def test_a_rank_that_fails_ends_all_with_one_error(place: Path) -> None:
    ended = make(
        place, "failed", "pairs.method=samples", "pairs.function=broken:score", "pairs.samples=2", processes=2
    )
    assert ended.code != 0
    assert ended.output.count("configuration error: the judge raises an exception") == 1
    assert "Traceback" not in ended.output
    assert not (place / "failed/pairs/pairs.jsonl").exists()


def test_a_second_start_in_the_run_directory_is_refused(place: Path) -> None:
    with locked(place / "locked/pairs/.lock", "is this test", "wait"):
        ended = make(place, "locked", *SAMPLES)
    assert ended.code == 2
    assert "another process makes pairs in this run directory" in ended.output
    assert not (place / "locked/pairs/parts").exists()


def test_ctrl_c_says_that_the_command_continues(place: Path) -> None:
    log = place / "stopped.txt"
    (place / "slow.py").write_text(SLEEPING)
    base = [f"model.path={place}/strong", f"data.train=[{place}/prompts.jsonl]", "run.dir=stopped"]
    slow = [
        "pairs.method=samples",
        "pairs.function=slow:score",
        "pairs.max_new_tokens=4",
        "pairs.unfinished=keep",
    ]
    with log.open("w") as stream:
        started = subprocess.Popen(
            command("pairs", [*base, *slow], 1),
            cwd=place,
            env=environment() | {"PYTHONPATH": str(ROOT)},
            stdout=stream,
            stderr=stream,
        )
        deadline = time.monotonic() + 240
        while not (place / "asleep").exists():
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        assert started.wait(240) == 130
    assert "interrupted: the same command continues" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_delta_pairs_prefer_the_first_model(place: Path) -> None:
    models = f"pairs.models=[{place}/strong,{place}/weak]"
    ended = make(place, "delta", "pairs.method=delta", models)
    assert ended.code == 0, ended.output
    for row in rows(place / "delta/pairs/pairs.jsonl"):
        assert "score_chosen" not in row
        sides = (row["provenance"][side]["model"]["name"] for side in ("chosen", "rejected"))
        assert list(sides) == [f"{place}/strong", f"{place}/weak"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pairs.method=samples"], "samples need one judge"),
        (["pairs.method=delta"], "delta pairs need two models"),
        (["pairs.method=scores"], "has no effect with this pairs.method"),
        ([*SAMPLES, "pairs.temperature=0"], "every sample of a model is the same"),
        ([*SAMPLES, "pairs.endpoint.model=x"], "pairs.endpoint.model has no effect"),
        ([*SAMPLES, "pairs.reward_model=m"], "samples need one judge"),
        ([*SAMPLES, "data.train=[{path: prompts.jsonl, weight: 2}]"], "has no effect on pairs"),
    ],
)
def test_keys_that_contradict_each_other_are_an_error(place: Path, overrides: list[str], said: str) -> None:
    ended = make(place, "refused", *overrides)
    assert ended.code == 2
    assert said in ended.output
