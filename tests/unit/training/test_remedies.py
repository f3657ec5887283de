"""Mistakes as people make them: after what each error's remedy proposes the same start passes its check."""

from pathlib import Path

import pytest

from dpo_dist.config.command_line import split_words
from dpo_dist.config.load import load_run_config
from dpo_dist.foundation.errors import DpoDistError
from dpo_dist.foundation.types import CheckReport
from dpo_dist.training.start.dry_run import dry_run
from dpo_dist.training.start.preflight import check_start
from tests.support.invented import write_pairs
from tests.support.remedies import key_of, repaired
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow

USUAL = {"model.path": "model", "data.train": "[train.jsonl]", "parallelism": "ddp"}
USUAL["trainer.global_batch_pairs"] = "4"
ROUNDS = 3  # a remedy may lead to a rule that was not broken before

# The words beside the usual ones, which they replace.
MISTAKES = """
lr=1e-4
--lr 1e-4
--learning_rate 1e-4 --beta 0.2
optim.lr=0
learning_rate=1e-4 optim.lr=1e-5
beta=0.2
loss.betta=0.2
loss=dpo
loss=DPO
bf16=true
fp16=true
model.dtype=float32
model.dtype=bfloat16 trainer.max_steps=1e1
epochs=2
trainer.max_steps=
max_length=512
data.max_length=0
data.max_length=8
data.max_prompt_length=2000
batch_size=4
wandb=false
tracking.wandb=off
model.adapter=lora
model.adapter.rank=8
model.quantization=nf4
model.quantization=4bit model.adapter.r=8
model.quantization=nf4 model.adapter.r=8 parallelism=zero3
load_in_4bit=true model.adapter.r=8
model=model
model.path=modle
data.train=[trian.jsonl]
dataset_name=train.jsonl
data.eval=0.1
data.eval=[held_out.jsonl] data.eval_share=0.1
trainer.eval_every=5
trainer.keep_best=true
loss=kto reference=none
reference=adapter
loss=simpo reference.path=model
loss=ipo loss.label_smoothing=0.1
model.attention=varlen model.dtype=fp32
optim.warmup=100 trainer.max_steps=10
optim.min_lr_ratio=0.1 optim.schedule=constant
parallelism.offload_parameters=cpu
trainer.ema_decay=0.99 trainer.keep_last=0
model.activation_offload=true
model.tiled_mlp=true
run.resume=yes
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model and data in several forms."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_model(folder / "model")
    write_pairs(folder / "train.jsonl", 12, seed=1)
    write_pairs(folder / "held_out.jsonl", 4, seed=2)
    return folder


def checked(words: list[str]) -> CheckReport:
    """What `dpo-dist train WORDS --check` does."""
    options = split_words(words)
    config = load_run_config(options.words, options.config_dir, verb="train", mistakes=options.mistakes)
    check_start(config, trains=True)
    return dry_run(config)


def test_an_object_in_a_json_file_is_no_list_of_records(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    Path("splits.json").write_text('{"name": "pairs", "splits": ["train", "test"]}')
    with pytest.raises(DpoDistError, match="no list of records") as caught:
        checked(["model.path=model", "data.train=[splits.json]"])
    assert "one object per line to .jsonl" in caught.value.remedy


@pytest.mark.parametrize("typed", MISTAKES.strip().splitlines())
def test_after_what_the_remedy_proposes_the_start_passes(
    typed: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wrong = typed.split()
    usual = [f"{key}={value}" for key, value in USUAL.items() if key not in map(key_of, wrong)]
    words = [*usual, *wrong]
    for _ in range(ROUNDS):
        with pytest.raises(DpoDistError) as caught:
            checked(words)
        before, words = words, repaired(words, caught.value)
        assert words != before, caught.value.block()
        try:
            checked(words)
        except DpoDistError:
            continue
        return
    checked(words)
