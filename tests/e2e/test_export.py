"""From an adapter of supervised fine-tuning over training to one merged model, by the command line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.extend import main as extend
from tests.e2e.conftest import small_run
from tests.e2e.test_start_adapter import mean_logp, on_base, responses
from tests.support.launch import history, run_verb, train
from tests.support.sft_adapter import write_sft_adapter


def run_of(assets: Path, folder: Path, adapter: str, *extra: str) -> list[str]:
    """The command line of a short run of an adapter in `folder`/run, evaluated at its end."""
    return [
        *small_run(assets, folder),
        f"model.adapter={{{adapter}}}",
        f"data.eval=[{assets}/eval.jsonl]",
        "optim.lr=1e-2",
        *extra,
    ]


def assert_last_log_probs(model: Any, assets: Path, run: Path) -> None:
    """A model has the log-probs of the last evaluation of a run, whose first loss is ln 2."""
    rows = history(run)
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    evaluated = [row for row in rows if "eval_loss" in row][-1]
    for which, name in enumerate(("chosen", "rejected")):
        logp = mean_logp(model, responses(assets, which))
        assert logp == pytest.approx(evaluated[f"eval_logps/{name}"], rel=1e-4)


@pytest.fixture(scope="module")
def trained(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two ranks that shard all weights."""
    folder = tmp_path_factory.mktemp("trained")
    sft = write_sft_adapter(assets / "model", folder / "sft")
    steps = ["trainer.max_steps=4", "trainer.save_every=2", "trainer.keep_last=2"]
    train(run_of(assets, folder, f"path: {sft}", *steps), processes=2)
    return folder / "run"


def test_the_merged_model_has_the_last_log_probs_of_training(assets: Path, trained: Path) -> None:
    told = run_verb("export", [f"run.dir={trained}", "export.merge=true"])
    assert told.code == 0, told.output
    assert "checked: log-probs of 8 responses differ" in told.output
    merged = trained / "exported/step-000004-merged"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()
    assert model.dtype is torch.float32
    assert_last_log_probs(model, assets, trained)
    for file in (assets / "model").glob("tokenizer*"):
        assert (merged / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_average_of_checkpoints_is_checked(dtype: str, trained: Path, tmp_path: Path) -> None:
    averaged = [
        f"run.dir={trained}",
        "export.average=[step-000002,step-000004]",
        f"export.output={tmp_path}/out",
        f"export.dtype={dtype}",
    ]
    told = run_verb("export", averaged)
    assert told.code == 0, told.output
    assert "checked" in told.output
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["zero3", "ddp"])
def test_an_adapter_from_singular_vectors_is_one_of_the_original_base(
    kind: str, assets: Path, tmp_path: Path
) -> None:
    adapter = "r: 2, alpha: 4, init: pissa"
    command = run_of(assets, tmp_path, adapter, f"parallelism={kind}", "trainer.save_every=1")
    train([*command, "trainer.max_steps=2"], processes=2)
    told = train([*command, "trainer.max_steps=3"], processes=2)
    assert "resuming from" in told.output
    assert history(tmp_path / "run")[1]["rewards/margins"] == 0
    exported = run_verb("export", [f"run.dir={tmp_path}/run", "export.merge=true"])
    assert exported.code == 0, exported.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/exported/step-000003-merged").eval()
    for model in (on_base(assets, tmp_path / "run/model"), merged):
        assert_last_log_probs(model, assets, tmp_path / "run")
    if kind == "ddp":
        assert_changed_initial_values_are_refused(command, tmp_path / "run")


def assert_changed_initial_values_are_refused(command: list[str], run: Path) -> None:
    """One bit of a value that training subtracts is another policy, for whatever reads a checkpoint."""
    file = run / "initial_adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    evaluated = [f"run.dir={run}", f"evaluation.model={run}/checkpoints/step-000003"]
    for verb, overrides in (
        ("train", [*command, "trainer.max_steps=4"]),
        ("export", [f"run.dir={run}", f"export.output={run.parent}/out"]),
        ("evaluate", evaluated),
    ):
        told = run_verb(verb, overrides)
        assert told.code == 2, told.output
        assert "adapter_model.safetensors differs from its digest" in told.output


def test_an_adapter_with_modules_in_full_from_start_to_end(assets: Path, tmp_path: Path) -> None:
    """Embeddings and output layer are one in the base and two in the adapter, and so in the merged model."""
    whole = ["embed_tokens", "lm_head"]
    sft = write_sft_adapter(assets / "model", tmp_path / "sft", modules_to_save=whole, scale=0.02)
    options = ["reference.mode=live", "trainer.save_every=1", "trainer.ema_decay=0.5", "trainer.keep_last=3"]
    command = run_of(assets, tmp_path, f"path: {sft}", *options)
    train([*command, "trainer.max_steps=2"], processes=2)
    told = train([*command, "trainer.max_steps=3", "parallelism=ddp"])
    assert "resuming from" in told.output
    evaluated = [row for row in history(tmp_path / "run") if "eval_loss" in row][-1]
    run = tmp_path / "run"
    exported = run_verb("export", [f"run.dir={run}", "export.merge=true"])
    assert exported.code == 0, exported.output
    merged = AutoModelForCausalLM.from_pretrained(run / "exported/step-000003-merged").eval()
    assert not merged.config.tie_word_embeddings
    for model in (on_base(assets, run / "model"), merged):
        assert_last_log_probs(model, assets, run)
    average = "export.average=[step-000002,step-000003]"
    for more in (["export.merge=true"], [average], [average, "export.merge=true"]):
        told = run_verb("export", [f"run.dir={run}", "export.weights=ema", *more])
        assert told.code == 0, told.output
        assert "checked: log-probs of 8 responses" in told.output
    assert (run / "exported/average-ema-merged/model.safetensors").is_file()
    told = run_verb("evaluate", [f"run.dir={run}", f"evaluation.model={run}/checkpoints/step-000003"])
    assert told.code == 0, told.output
    (file,) = (run / "evaluation").glob("s*-*/evaluation.json")
    found = json.loads(file.read_text())["all"]
    assert found["eval_rewards/margins"] == pytest.approx(evaluated["eval_rewards/margins"], rel=1e-3)


def test_new_tokens_from_the_base_to_the_merged_model(assets: Path, tmp_path: Path) -> None:
    extended, tokens = tmp_path / "extended", ["<|plan|>", "<|act|>"]
    assert extend([str(assets / "model"), str(extended), "--tokens", *tokens]) == 0
    records = [json.loads(line) for line in (assets / "train.jsonl").read_text().splitlines()]
    for record in records:
        record["chosen"] = mark(record["chosen"], tokens)
    data = tmp_path / "marked.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = run_of(
        assets,
        tmp_path,
        "r: 2, modules_to_save: [embed_tokens,lm_head]",
        f"model.path={extended}",
        f"data.train=[{data}]",
        "reference.mode=cached",
        "trainer.max_steps=2",
        "trainer.save_every=2",
    )
    train(command, processes=2)
    exported = run_verb("export", [f"run.dir={tmp_path}/run", "export.merge=true"])
    assert exported.code == 0, exported.output
    merged = tmp_path / "run/exported/step-000002-merged"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()
    assert_last_log_probs(model, assets, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert len(tokenizer) == len(model.get_input_embeddings().weight) == max(ids) + 1
    start = AutoModelForCausalLM.from_pretrained(extended).get_input_embeddings().weight
    assert (model.get_input_embeddings().weight[ids] != start[ids]).any(1).all()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    files = sorted(extended.glob("tokenizer*"))
    assert files
    for file in files:
        assert (merged / file.name).read_bytes() == file.read_bytes()


def mark(chosen: Any, tokens: list[str]) -> Any:
    """A response with the new tokens in its text."""
    if isinstance(chosen, str):
        return "".join(tokens) + chosen
    return [*chosen[:-1], chosen[-1] | {"content": "".join(tokens) + chosen[-1]["content"]}]
