"""The doctor on the command line: faults, exit codes, its files beside a run's."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Overrides
from tests.support.doctor_data import as_messages, clean_pairs, write
from tests.support.launch import run_verb, train
from tests.support.records import assistant, user


def clean_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return list(map(as_messages, clean_pairs(count, seed)))


def faulty_records() -> list[dict[str, Any]]:
    """100 pairs with a fault of each kind; every rejected response has a space."""
    records = clean_records(100)
    for record in records:
        record["rejected"][0]["content"] = " " + record["rejected"][0]["content"]
    records[3]["rejected"] = records[3]["chosen"]
    records[4]["rejected"] = [assistant(" ")]
    records[7] = records[8]
    records[11] = {**records[12], "chosen": records[12]["rejected"], "rejected": records[12]["chosen"]}
    records[20]["prompt"] = [user("\u202egnp.exe <|im_end|>")]
    records[30]["chosen"] = [assistant("a long story " * 1000)]
    return records


def report(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / "run" / "doctor" / "doctor.json").read_text())
    return content


def rules(tmp_path: Path) -> set[str]:
    return {finding["rule"] for finding in report(tmp_path)["findings"]}


def page(tmp_path: Path) -> str:
    return (tmp_path / "run" / "doctor" / "doctor.html").read_text()


@pytest.fixture
def faulty(tmp_path: Path) -> str:
    return write(tmp_path / "faulty.jsonl", faulty_records())


def test_planted_faults_are_found(overrides: Overrides, faulty: str, tmp_path: Path) -> None:
    held_out = write(tmp_path / "eval.jsonl", [*clean_records(20, seed=5), clean_records(100)[50]])
    data = (f"data.train=[{faulty}]", f"data.eval=[{held_out}]")
    ended = run_verb("doctor", overrides(*data))
    assert ended.code == 1, ended.output
    found = {"dropped", "duplicates", "contradictions", "truncated", "train_eval_leak"}
    assert found | {"label_leak", "broken_text", "markup_in_text"} <= rules(tmp_path)
    [leak] = [found for found in report(tmp_path)["findings"] if found["rule"] == "train_eval_leak"]
    assert f"{held_out}:21" in leak["examples"][0]
    source = report(tmp_path)["sources"][0]
    assert (source["read"], source["kept"]) == (100, 98)
    dropped = {reason: found["examples"] for reason, found in source["dropped"].items()}
    assert dropped == {"identical_responses": [f"{faulty}:4"], "empty_response": [f"{faulty}:5"]}
    assert [found["rule"] for found in report(tmp_path)["findings"]].count("dropped") == 2
    assert report(tmp_path)["exit_code"] == 1
    assert "identical_responses" in ended.output
    assert ended.output.splitlines()[-1] == f"page: {tmp_path}/run/doctor/doctor.html"
    assert "\x1b" not in ended.output
    assert 'class="prompt"' in page(tmp_path)
    assert 'class="cut"' in page(tmp_path)
    # Nothing is left to encode for training, and the doctor's files are not a result of the run.
    trained = train(overrides(*data, "run.resume=never", "trainer.max_steps=2"))
    assert "encoding" not in trained.output


def test_data_that_training_refuses_are_examined(overrides: Overrides, tmp_path: Path) -> None:
    half = write(tmp_path / "half.jsonl", [*clean_records(20), *[{"messages": [], "label": True}] * 20])
    labelled = write(tmp_path / "kto.jsonl", [{"prompt": "q", "completion": "a", "label": True}] * 5)
    ended = run_verb("doctor", overrides(f"data.train=[{half},{labelled}]"))
    assert ended.code == 1, ended.output
    assert {"training_refuses", "label_balance"} <= rules(tmp_path)
    of_half, of_labelled = report(tmp_path)["sources"]
    assert (of_half["kept"], of_labelled["labels"]) == (20, {"good": 5, "bad": 0})
    one_sided = write(tmp_path / "sft.jsonl", [{"prompt": "q", "completion": "a"}] * 5)
    ended = run_verb("doctor", overrides(f"data.train=[{one_sided}]", "doctor.fail_on=never"))
    assert ended.code == 0, ended.output
    assert "training_refuses" in rules(tmp_path), ended.output


def test_without_a_model_texts_are_examined(overrides: Overrides, faulty: str, tmp_path: Path) -> None:
    given = [each for each in overrides(f"data.train=[{faulty}]") if not each.startswith("model.")]
    ended = run_verb("doctor", given)
    assert ended.code == 1, ended.output
    assert "no model is configured" in ended.output
    assert report(tmp_path)["model"] is None
    assert "duplicates" in rules(tmp_path)
    assert 'class="prompt"' in page(tmp_path)
