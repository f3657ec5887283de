"""Files of a run that are replaced or damaged after its training: no verb takes them for those of the run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Overrides
from tests.support.launch import run_state, run_verb, train
from tests.support.tiny_model import write_model

BASE_CHANGED = "the model that the policy starts from of this run has changed"


def refused(verb: str, command: list[str]) -> str:
    ended = run_verb(verb, command)
    assert ended.code == 2, ended.output
    return ended.output


@pytest.fixture
def run(overrides: Overrides, assets: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Trains a run from a base of its own, in `tmp_path`; returns its command."""

    def trained(*options: str) -> list[str]:
        write_model(tmp_path / "base")
        command = overrides(
            f"model.path={tmp_path}/base",
            f"data.eval=[{assets}/eval.jsonl]",
            f"data.cache={tmp_path}/encoded",
            "trainer.max_steps=2",
            "optim.lr=1e-2",
            *options,
        )
        train(command)
        return command

    return trained


def test_a_base_that_was_replaced_is_refused_where_an_adapter_is_scored_or_merged(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    command = run("model.adapter={r: 4}")
    write_model(tmp_path / "base", seed=1)
    assert BASE_CHANGED in refused("evaluate", command)
    assert "the model that this run started from has changed" in refused(
        "export", [f"run.dir={tmp_path}/run", "export.merge=true"]
    )
    elsewhere = [*command, f"run.dir={tmp_path}/other", f"evaluation.model={tmp_path}/run/model"]
    assert "the base of this model is not the one from which it was trained" in refused("evaluate", elsewhere)


def test_a_run_is_scored_by_the_tokenizer_of_its_training(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    command = run()
    before = run_verb("evaluate", command)
    assert before.code == 0, before.output
    results = (tmp_path / "run/evaluation/evaluation.json").read_text()
    template = tmp_path / "base/chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "model"))
    after = run_verb("evaluate", command)
    assert after.code == 0, after.output
    assert json.loads((tmp_path / "run/evaluation/evaluation.json").read_text()) == json.loads(results)
    assert "tokenizer, chat template" in refused("export", [f"run.dir={tmp_path}/run"])
    own = tmp_path / "run/model/chat_template.jinja"
    own.write_text(own.read_text().replace("assistant", "model"))
    of_base = [*command, f"evaluation.model={tmp_path}/base"]
    for options in ([], ["--check"]):
        assert "the model folder is not as it was written" in refused("evaluate", [*of_base, *options])
    shutil.rmtree(tmp_path / "run/model")
    assert "tokenizer, chat template" in refused("train", command)


def test_a_run_writes_the_description_of_its_start_and_no_other(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    """What the base says of generation decides where the result stops."""
    command = run()
    settings = tmp_path / "base/generation_config.json"
    written = settings.read_bytes()
    settings.write_text('{"eos_token_id": 5}')
    export = [f"run.dir={tmp_path}/run", f"export.output={tmp_path}/out"]
    for verb, words in (("export", export), ("train", [*command, "trainer.max_steps=3"])):
        assert "generation_config.json, processor or adapter" in refused(verb, words)
    settings.write_bytes(written)
    manifest = tmp_path / "run/model/dpo_dist_manifest.json"
    content = manifest.read_bytes()
    for damage in (manifest.unlink, lambda: manifest.write_bytes(content[:9])):
        damage()
        again = run_verb("train", command)
        assert again.code == 0, again.output
        assert f"is damaged and written again: {manifest.name}" in again.output
        assert manifest.read_bytes() == content
    (tmp_path / "run/model/added_tokens.json").write_text('{"<new>": 7}')
    assert "added_tokens.json was added" in refused("evaluate", command)
    (tmp_path / "run/model").rename(tmp_path / "elsewhere")
    (tmp_path / "run/model").symlink_to(tmp_path / "elsewhere")
    train(command)
    assert not (tmp_path / "run/model").is_symlink()
    assert manifest.read_bytes() == content
    assert (tmp_path / "elsewhere/added_tokens.json").exists(), "nothing behind the link is deleted"


def test_a_run_without_a_reference_is_scored_by_a_loss_that_has_one(run: Callable[..., list[str]]) -> None:
    command = run("loss=simpo")
    ended = run_verb("evaluate", [*command, "loss=sigmoid"])
    assert ended.code == 0, ended.output


def test_a_damaged_model_is_written_again_from_the_checkpoint(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    command = run()
    weights = tmp_path / "run/model/model.safetensors"
    written = weights.read_bytes()
    weights.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    assert "not as it was written" in refused("evaluate", command)
    again = run_verb("train", command)
    assert again.code == 0, again.output
    assert "is damaged and written again: model.safetensors has another content" in again.output
    assert weights.read_bytes() == written
    assert run_state(tmp_path / "run")["outcome"] == "completed"
    shutil.rmtree(tmp_path / "run/checkpoints")
    weights.write_bytes(b"")
    refusal = refused("train", command)
    assert "model.safetensors has another content" in refusal
    assert "its checkpoints are missing" in refusal
