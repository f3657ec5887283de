"""`compare`: two models on one process and on two, resumed, with a judge that fails at first."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Overrides
from tests.support.image_model import write_image_model, write_pictures
from tests.support.launch import Finished, constants, run_verb, train
from tests.support.records import assistant, jsonl, user
from tests.support.tiny_model import write_model

RULE = "def score(prompt, responses):\n    return [float(len(text)) for text in responses]\n"
BROKEN = "def score(prompt, responses):\n    if '13' in prompt[0]['content']:\n        raise ValueError\n"
SOME = "def score(prompt, texts):\n    return [None if '7' in prompt[0]['content'] else 1e308] * len(texts)\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_model(folder / "base")
    write_model(folder / "other", seed=1)
    sides = {"rejected": [assistant("bad")]}
    records = [
        {"prompt": [user(f"question {n}")], "chosen": [assistant(f"good {n}")], **sides} for n in range(18)
    ]
    jsonl(folder, *records)
    for name, text in (("rule", RULE), ("broken", BROKEN + RULE.splitlines()[1] + "\n"), ("some", SOME)):
        (folder / f"{name}.py").write_text(text)
    return folder


PARTS = constants(**{"dpo_dist.tools.compare.models.PROMPTS_OF_A_PART": 4})


def compare(place: Path, run: str, *overrides: str, processes: int = 1) -> Finished:
    base = [
        "compare.models=[base=./base, ./other]",
        "data.eval=[records.jsonl]",
        "model.dtype=fp32",
    ]
    limits = ["sampling.max_new_tokens=8", "sampling.prompts=14", f"run.dir={run}"]
    return run_verb("compare", [*base, *limits, *overrides], processes=processes, cwd=place, prepare=PARTS)


def rows(place: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / run / "comparison/answers.jsonl").read_text().splitlines()]


def results(place: Path, run: str) -> dict[str, Any]:
    text = (place / run / "comparison/comparison.json").read_text()
    content: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    return content


def test_two_processes_write_what_one_does(place: Path) -> None:
    for run, processes in (("alone", 1), ("together", 2)):
        ended = compare(place, run, "pairs.function=rule:score", processes=processes)
        assert ended.code == 0, ended.output
        assert "comparison on 14 prompts, judged by function rule:score" in ended.output
    assert rows(place, "alone") == rows(place, "together")
    assert results(place, "alone") == results(place, "together")
    found = rows(place, "alone")
    assert len(found) == 14
    wins = 0.0
    for row in found:
        number = int(row["prompt"].split()[1])
        assert (row["chosen"], row["source"]) == (f"good {number}", "records")
        base, other = row["responses"].values()
        assert base["text"] != other["text"]
        assert other["score"] in (len(other["text"]), None)
        wins += row["credit"]
    assert results(place, "alone")["rate"] == pytest.approx(wins / 14)


def test_equal_models_respond_equally(place: Path) -> None:
    twins = "compare.models=[base=./base,twin=base]"
    ended = compare(place, "twins", twins, "pairs.function=rule:score")
    assert ended.code == 0, ended.output
    assert results(place, "twins")["ties"] == 14


def test_an_interrupted_judge_continues_and_finished_responses_are_used_again(place: Path) -> None:
    failed = compare(place, "again", "pairs.function=broken:score", "sampling.prompts=18")
    assert failed.code == 2
    assert "the judge's function gives no usable scores" in failed.output
    parts = place / "again/comparison/parts"
    written = {file: file.stat().st_mtime_ns for file in parts.glob("*/0*.jsonl")}
    judged = [file for file in written if file.parent.name.startswith("scores")]
    assert 0 < len(judged) < 5
    assert compare(place, "again", "pairs.function=some:score", "sampling.prompts=18").code == 0
    assert all(file.stat().st_mtime_ns == before for file, before in written.items())
    found = results(place, "again")
    assert found["not_judged"] == 2
    assert sum(row["responses"]["other"]["score"] is None for row in rows(place, "again")) == 2


def test_a_checkpoint_of_two_processes_and_an_adapter_respond_as_their_runs_do(
    assets: Path, overrides: Overrides, tmp_path: Path
) -> None:
    short = ("trainer.max_steps=2", "optim.lr=1e-2")
    train(overrides(*short, f"run.dir={tmp_path}/full"), processes=2)
    lora = ("model.adapter={r: 4}", "parallelism=ddp", "optim.lr=1e-1", f"run.dir={tmp_path}/lora")
    train(overrides(*short, *lora))
    limits = ["model.dtype=fp32", "sampling.max_new_tokens=6", "sampling.temperature=0", "run.dir=compared"]
    texts = []
    for run in ("full", "lora"):
        models = f"compare.models=[{run},{run}/checkpoints/step-000002]"
        command = [models, f"data.eval=[{assets}/eval.jsonl]", *limits]
        ended = run_verb("compare", command, cwd=tmp_path)
        assert ended.code == 0, ended.output
        for row in rows(tmp_path, "compared"):
            written, checkpoint = row["responses"].values()
            assert written["text"] == checkpoint["text"]
            texts.append(written["text"])
    assert len({*texts}) > 1
    assert (tmp_path / "compared/comparison/comparison.html").is_file()


def test_models_that_read_images_are_compared(tmp_path: Path) -> None:
    write_image_model(tmp_path / "base")
    write_image_model(tmp_path / "other", seed=2)
    data = [f"data.eval=[{write_pictures(tmp_path)}]", "model.images.train=none", "model.dtype=fp32"]
    usual = [*data, "sampling.max_new_tokens=8", "sampling.temperature=0", "run.dir=run"]
    ended = run_verb("compare", ["compare.models=[./base,./other]", *usual], cwd=tmp_path)
    assert ended.code == 0, ended.output
    found = rows(tmp_path, "run")
    assert {row["prompt"] for row in found} == {"[image]What is it?"}
    for name in ("base", "other"):
        responses = [row["responses"][name] for row in found]
        assert len({response["text"] for response in responses}) == 3
    page = (tmp_path / "run/comparison/comparison.html").read_text()
    assert [row["images"][0] for row in found] == re.findall('<img src="([^"]*)"', page)
