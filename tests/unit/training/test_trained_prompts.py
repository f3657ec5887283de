"""Which prompts of an evaluation the run of a model was trained on."""

from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.data.records import prompt_hash
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.training.evaluation.trained_prompts import count_trained
from tests.support.records import good, jsonl

PROMPTS = [f"question {number}" for number in range(20)]
HASHES = list(map(prompt_hash, PROMPTS))


def pair(prompt: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": " a", "rejected": " b"}


def run_of(folder: Path, *words: str) -> RunFolder:
    run = RunFolder(folder / "run")
    run.model.mkdir(parents=True)
    words = (f"data.train=[{{path: {jsonl(folder, *map(pair, PROMPTS))}, limit: 16}}]", *words)
    run.state.write_text("{}")
    run.config.write_text(to_yaml(load_run_config(["model.path=org/model", *words])))
    return run


def test_prompts_of_training_are_counted_by_the_data_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = run_of(tmp_path), list[str]()
    checkpoint = run.checkpoints / "step-000001"
    checkpoint.mkdir(parents=True)
    for place in (run.path, run.model, checkpoint):
        assert count_trained(str(place), HASHES, "pair", Console(LineScreen(said.append))) == 16
    assert said[0] == (
        f"warning: 16 of 20 pairs are not held out: {run} was trained on their prompts, so the results say "
        "little about new prompts"
    )
    assert count_trained(str(run.model), HASHES[16:], "pair", Console(LineScreen(said.append))) == 0
    monkeypatch.chdir(run.path)
    assert count_trained("org/model", HASHES, "pair", Console(LineScreen(said.append))) is None
    assert len(said) == 3


def test_prompts_that_a_run_holds_out_are_not_counted(tmp_path: Path) -> None:
    split = run_of(tmp_path / "split", "data.eval_share=0.5")
    assert 0 < (count_trained(str(split), HASHES, "pair", Console(None)) or 0) < 16
    held = jsonl(tmp_path, pair(PROMPTS[0]))
    dropped = run_of(tmp_path / "dropped", f"data.eval=[{held}]", "data.drop_eval_prompts=true")
    assert count_trained(str(dropped), HASHES, "pair", Console(None)) == 15


def test_a_prompt_with_another_image_was_not_trained(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    records = [pair("q") | {"image": name} for name in ("a", "b", "no")]
    run = run_of(tmp_path)
    jsonl(tmp_path, *records[:1], records[2])
    asked = [good({**record, "image": (tmp_path / record["image"]).read_bytes()}) for record in records[:2]]
    hashes = [prompt_hash(record.prompt, record.images) for record in asked]
    assert count_trained(str(run.path), hashes, "pair", Console(None)) == 1


def test_data_or_a_configuration_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    run, said = run_of(tmp_path), list[str]()
    (tmp_path / "records.jsonl").unlink()
    assert count_trained(str(run.path), HASHES, "prompt", Console(LineScreen(said.append))) is None
    run.config.write_text("model: 5")
    assert count_trained(str(run.path), HASHES, "prompt", Console(LineScreen(said.append))) is None
    for line in said:
        assert line.startswith(f"note: it is not known whether {run} was trained on these prompts: ")
