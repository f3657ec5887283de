"""`compare`: three models on one process and on two, resumed, with a judge that fails at first."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Overrides
from tests.support import tiny
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


PARTS = constants(**{"dpo_dist.tools.compare.models.PROMPTS_AT_ONCE": 4})


def compare(place: Path, run: str, *overrides: str, processes: int = 1) -> Finished:
    base = [
        "compare.models=[base=./base, ./other,twin=base]",
        "data.eval=[records.jsonl]",
        "model.dtype=fp32",
    ]
    limits = ["sampling.max_new_tokens=8", "compare.prompts=14", f"run.dir={run}"]
    return run_verb("compare", [*base, *limits, *overrides], processes=processes, cwd=place, prepare=PARTS)


def rows(place: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / run / "comparison/answers.jsonl").read_text().splitlines()]


def results(place: Path, run: str) -> dict[str, Any]:
    text = (place / run / "comparison/comparison.json").read_text()
    content: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    return content


def test_a_check_says_what_is_compared_in_lines(place: Path) -> None:
    ended = compare(place, "checked", "pairs.function=rule:score", "--check")
    assert ended.code == 0, ended.output
    assert "\ncheck passed: everything that needs no weights and no GPU is in order\n" in ended.output
    assert not (place / "checked").exists()


def test_two_processes_write_what_one_does_and_equal_models_respond_equally(place: Path) -> None:
    for run, processes in (("alone", 1), ("together", 2)):
        ended = compare(place, run, "pairs.function=rule:score", processes=processes)
        assert ended.code == 0, ended.output
        assert "comparison on 14 prompts, judged by function rule:score" in ended.output
    assert rows(place, "alone") == rows(place, "together")
    assert results(place, "alone") == results(place, "together")
    found = rows(place, "alone")
    assert len(found) == 14
    for row in found:
        number = int(row["prompt"].split()[1])
        assert (row["chosen"], row["source"]) == (f"good {number}", "records")
        responses = row["responses"]
        assert responses["twin"] == responses["base"] != responses["other"]
        assert responses["base"]["logp"] == responses["base"]["base_logp"] < 0
        assert responses["other"]["score"] in (len(responses["other"]["text"]), None)
    base, other, twin = results(place, "alone")["models"]
    assert other["kl"] > 0.1 > base["kl"] == twin["kl"] == 0
    wins = {(win["first"], win["second"]): win for win in results(place, "alone")["wins"]}
    assert wins["base", "twin"]["ties"] == 14
    assert wins["base", "other"]["rate"] == pytest.approx(1 - wins["other", "twin"]["rate"])


def test_an_interrupted_judge_continues_and_finished_responses_are_used_again(place: Path) -> None:
    failed = compare(place, "again", "pairs.function=broken:score", "compare.prompts=18")
    assert failed.code == 2
    assert "the judge's function gives no usable scores" in failed.output
    parts = place / "again/comparison/parts"
    written = {file: file.stat().st_mtime_ns for file in parts.glob("*/0*.jsonl")}
    judged = [file for file in written if file.parent.name.startswith("judgements")]
    assert 0 < len(judged) < 5
    assert compare(place, "again", "pairs.function=some:score", "compare.prompts=18").code == 0
    assert all(file.stat().st_mtime_ns == before for file, before in written.items())
    found = results(place, "again")
    assert found["not_judged"]["base and other"] == 2
    assert sum(row["responses"]["other"]["score"] is None for row in rows(place, "again")) == 2


def test_a_checkpoint_of_two_processes_and_an_adapter_respond_as_their_runs_do(
    assets: Path, overrides: Overrides, tmp_path: Path
) -> None:
    short = ("trainer.max_steps=2", "optim.lr=1e-2")
    train(overrides(*short, f"run.dir={tmp_path}/full"), processes=2)
    lora = ("model.adapter={r: 4}", "parallelism=ddp", "optim.lr=1e-1", f"run.dir={tmp_path}/lora")
    train(overrides(*short, *lora))
    write_model(tmp_path / "foreign", tiny.zephyr())
    models = [f"base={assets}/model", "full", "full/checkpoints/step-000002", "lora"]
    models += ["lora/checkpoints/step-000002", "foreign"]
    limits = ["model.dtype=fp32", "sampling.max_new_tokens=6", "sampling.temperature=0", "run.dir=compared"]
    command = [f"compare.models=[{','.join(models)}]", f"data.eval=[{assets}/eval.jsonl]", *limits]
    ended = run_verb("compare", command, cwd=tmp_path)
    assert ended.code == 0, ended.output
    assert "foreign: no KL to base, which has other token ids" in ended.output
    found = {model["name"]: model for model in results(tmp_path, "compared")["models"]}
    for row in rows(tmp_path, "compared"):
        responses = row["responses"]
        for run in ("full", "lora"):
            written, checkpoint = responses[run], responses[f"{run}/step-000002"]
            assert written["text"] == checkpoint["text"]
            assert written["logp"] == pytest.approx(checkpoint["logp"], abs=1e-4)
        assert responses["foreign"]["base_logp"] is None
    assert found["full"]["kl"] != 0 != found["lora"]["kl"]
    assert found["foreign"]["kl"] is None
    assert (tmp_path / "compared/comparison/comparison.html").is_file()


def test_a_default_leaves_all_models_the_same_room_for_a_response(tmp_path: Path) -> None:
    """A longer response is not a better model, whichever reads more or has more tokens for the prompt."""
    write_model(tmp_path / "base", longest=100)
    write_model(tmp_path / "more", seed=1, longest=140)
    write_model(tmp_path / "foreign", tiny.llama3(), seed=2, longest=100)
    records = [{"prompt": [user("why? " * n)], "chosen": "a", "rejected": "b"} for n in (1, 8, 16)]
    data = f"data.eval=[{jsonl(tmp_path, *records)}]"
    usual = [data, "model.dtype=fp32", "run.dir=run"]
    ended = run_verb("compare", ["compare.models=[./base,./more,./foreign]", *usual], cwd=tmp_path)
    assert ended.code == 0, ended.output
    rooms = list[int]()
    for row in rows(tmp_path, "run"):
        cut = {each["logp_tokens"] for each in row["responses"].values() if not each["finished"]}
        assert len(cut) == 1, row
        rooms += cut
    assert len({*rooms}) == len(rooms) > 1, "each prompt leaves another room"


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
        assert all(response["logp"] < 0 and response["base_logp"] < 0 for response in responses)
        assert all((each["logp"] == each["base_logp"]) == (name == "base") for each in responses)
    page = (tmp_path / "run/comparison/comparison.html").read_text()
    assert [row["images"][0] for row in found] == re.findall('<img src="([^"]*)"', page)
