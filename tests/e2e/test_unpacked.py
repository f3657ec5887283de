"""Whole runs of models whose responses cannot share a prompt, with code of transformers or their own."""

from pathlib import Path

import pytest

from tests.e2e.conftest import Overrides
from tests.support import tiny
from tests.support.doctor_data import agent_records, write
from tests.support.families import tiny_family
from tests.support.launch import assert_same_history, history, log, summary, train
from tests.support.own_code import ship_code
from tests.support.tiny_model import write_model

TOLD = "unpacked: responses of this model cannot share a prompt in one forward"


def without_ties(run: Path) -> list[dict[str, float]]:
    """The history without shares of margins above 0: before the first update margins are rounding."""
    return [{key: value for key, value in row.items() if "accurac" not in key} for row in history(run)]


def test_nothing_is_said_of_prefixes_that_rows_do_not_share(overrides: Overrides, tmp_path: Path) -> None:
    model = ship_code(write_model(tmp_path / "model"), "rows")
    agents = write(tmp_path / "agents.jsonl", agent_records(12))
    command = overrides(f"model.path={model}", "model.trust_remote_code=true", f"data.train=[{agents}]")
    output = train([*command, "trainer.max_steps=1"]).output
    assert TOLD in output
    assert "fewer tokens" not in output


def test_a_run_of_one_response_per_forward_is_the_same_on_one_and_two_processes(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Store filled on two ranks, evaluation, steps of several micro-batches, step-0 check."""
    command = overrides(
        f"model.path={ship_code(write_model(tmp_path / 'model'), 'rows')}",
        "model.trust_remote_code=true",
        f"data.eval=[{assets}/eval.jsonl]",
        "trainer.max_steps=2",
        "trainer.eval_every=2",
        "trainer.micro_batch_tokens=200",
    )
    output = train(command, processes=2).output
    assert f"{TOLD}: one response per forward" in output
    assert "step-0 check passed" in log(tmp_path / "run")
    one = tmp_path / "one"
    train([*command, f"run.dir={one}", f"reference.store={tmp_path}/other"], processes=1)
    assert_same_history(without_ties(tmp_path / "run"), without_ties(one), 1e-3)
    assert summary(tmp_path / "run")["reference"]["computed"] > 0


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("jamba", f"{TOLD}: one response per row, padded to the longest of the micro-batch"),
        ("qwen3_5_text", "packed: recurrent layers compute a shared prompt once"),
    ],
)
def test_a_model_with_recurrent_layers_is_trained_and_sampled(
    overrides: Overrides, assets: Path, tmp_path: Path, kind: str, told: str
) -> None:
    model, tokenizer = tmp_path / "model", tiny.qwen()
    causal_lm = tiny_family(kind, len(tokenizer))
    causal_lm.config.update({"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    causal_lm.save_pretrained(model)
    tokenizer.save_pretrained(model)
    command = overrides(
        f"model.path={model}",
        f"data.eval=[{assets}/eval.jsonl]",
        "trainer.max_steps=1",
        "trainer.eval_every=1",
        "sampling.prompts=2",
        "sampling.max_new_tokens=4",
        "sampling.temperature=0",
    )
    train(command, processes=1)
    assert told in log(tmp_path / "run")
    assert (tmp_path / "run/samples/step-000001.jsonl").read_text().count("\n") == 2
