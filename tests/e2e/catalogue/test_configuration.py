"""Mistakes on the command line, found before torch is imported and before processes join."""

import pytest

from tests.e2e.catalogue.case import Case
from tests.e2e.catalogue.conftest import Check

LINE = "command line"

# fmt: off
CASES = [
    # Keys that do not exist.
    Case("typing error", "loss.betta=0.2", "no key 'loss.betta'", LINE + ": loss.betta=0.2",
         to_do="loss.beta?"),
    Case("unknown key", "+loss.gamma=1", "no key 'loss.gamma'", "+loss.gamma=1", to_do="loss.simpo_gamma"),
    Case("unknown section", "foo=1", "no key 'foo'", LINE + ": foo=1", to_do="the sections are run, model"),
    Case("key of another trainer", "learning_rate=1e-5", "no key", to_do="write optim.lr=1e-5"),
    Case("key of another trainer that ends early", "trainer.save_steps=100", "no key",
         to_do="save_every=100"),
    Case("option of the launcher", "--num_processes 2", "no option --num_processes", to_do="before -m"),
    Case("key of an adapter", "'model.adapter={rank: 8}'", "no key 'model.adapter.rank'", to_do="mean r?"),
    Case("key of a source", "'data.train=[{file: a}]'", "no key", "data.train[0].file", to_do="mean path?"),
    Case("deepspeed file", "deepspeed=ds.json", "no key 'deepspeed'", to_do="parallelism=zero3"),
    # Groups and experiments.
    Case("unknown loss", "loss=kto", "no loss named 'kto'", "loss", "kto", "one of ", "loss=NAME"),
    Case("list for a loss", "loss=[sigmoid,sft]", "loss", LINE, "", "", "loss.terms=[{kind: sigmoid"),
    Case("list for data", "data=[hh_rlhf,ultrafeedback]", "data", LINE, "", "", "data.train="),
    Case("model in place of a preset", "model=Qwen/Qwen2.5-7B", "no model named", to_do="model.path=Qwen"),
    Case("file in place of a preset", "data=my.jsonl", "no data named", to_do="data.train=[my.jsonl]"),
    Case("unknown experiment", "+experiment=qwen7", "no experiment", got="qwen7",
         to_do="+experiment=qwen7b?"),
    Case("experiment without plus", "experiment=qwen7b", "experiment", to_do="+experiment=qwen7b"),
    Case("two experiments", "+experiment=qwen7b +experiment=smoke", "experiment", to_do="[qwen7b,smoke]"),
    Case("sweep in one job", "loss.beta=0.1,0.2", "values", to_do="one job for each"),
    # Values.
    Case("wrong type", "loss.beta=abc", "loss.beta has the wrong type", LINE + ": loss.beta=abc", "abc",
         "number"),
    Case("out of range", "loss.beta=0", "loss.beta is out of range", "loss.beta", "0", "> 0"),
    Case("negative", "optim.lr=-1", "optim.lr is out of range", "optim.lr", "-1", "0"),
    Case("not a number", "optim.lr=nan", "optim.lr is out of range", "optim.lr", "nan"),
    Case("infinite", "optim.lr=inf", "optim.lr", "optim.lr", "inf"),
    Case("warmup of more than all", "optim.warmup_ratio=10", "out of range", "optim.warmup_ratio", "10",
         "1"),
    Case("choice", "model.dtype=fp8", "model.dtype", LINE + ": model.dtype=fp8", "fp8", "bf16"),
    Case("dtype half", "model.dtype=fp16", "model.dtype", LINE, "fp16", "bf16"),
    Case("second of a key wrong", "trainer.seed=1 trainer.seed=x", "trainer.seed", LINE + ": trainer.seed=x",
         "x"),
    Case("fraction of steps", "trainer.max_steps=1.5", "trainer.max_steps", LINE, "1.5", "whole number"),
    Case("negative steps", "trainer.max_steps=-1", "out of range", "trainer.max_steps", "-1", "", "null"),
    Case("bool for a choice", "tracking.wandb=false", "tracking.wandb", LINE, to_do="tracking.wandb=off?"),
    Case("kind of a term", "'loss.terms=[{kind: nll}]'", "no such value", "loss.terms[0].kind", "nll", "",
         "=sft?"),
    Case("empty model", "model.path=", "model.path is empty", "model.path"),
    Case("empty run directory", "run.dir=", "run.dir is empty", "run.dir"),
    Case("name with a slash", "run.name=a/b", "run.name", "run.name", "a/b"),
    Case("name that leaves the folder", "run.name=..", "run.name", "run.name", ".."),
    Case("huge number", "trainer.global_batch_pairs=99999999999999999999", "trainer.global_batch_pairs"),
    Case("seed out of range", "trainer.seed=-5", "trainer.seed is out of range", "trainer.seed", "-5"),
    # Quoting.
    Case("tilde", "model.path=~/m", "'~' needs quotes", LINE, "~/m", to_do="inner quotes"),
    Case("unicode", "model.path=/tmp/modèle", "'è' needs quotes", LINE, to_do="inner quotes"),
    Case("space after a comma", "'data.train=[a.jsonl,' 'b.jsonl]'", "", LINE, to_do="put it in quotes"),
    Case("bracket", "loss.beta=[1", "a bracket is not closed", LINE, "[1", to_do="close it"),
    Case("spaces", "loss.beta = 0.2", "", LINE, to_do="without spaces"),
    Case("decimal comma", "loss.beta=0,2", "", LINE, to_do="loss.beta=0.2"),
    Case("source without list", "data.train=a.jsonl", "data.train", LINE, to_do="data.train=[a.jsonl]"),
    Case("mapping without list", "'data.train={path: a}'", "data.train", to_do="'data.train=[{path: a}]'"),
    Case("removed key", "~loss.beta", "cannot be removed", LINE, "~loss.beta"),
    Case("interpolation", "'data.cache=${run.rot}/x'", "interpolation", LINE, "run.rot"),
    # Keys that conflict or have no effect.
    Case("no training data", "data.train=[]", "no training data", "data.train"),
    Case("option of another loss", "loss.simpo_gamma=1", "no effect", "loss.simpo_gamma"),
    Case("beta with sft", "loss=sft loss.beta=0.3", "no effect", "loss.beta", to_do="remove"),
    Case("smoothing with ipo", "loss=ipo loss.label_smoothing=0.1", "label_smoothing",
         "loss.label_smoothing"),
    Case("reference without use", "loss=simpo reference=cached", "reference", "reference.mode"),
    Case("no reference", "reference=none", "reference", "reference.mode", "none"),
    Case("adapter as reference", "reference=adapter", "adapter", "reference.mode"),
    Case("offload of whole weights", "parallelism=ddp parallelism.offload_optimizer=cpu", "offload",
         "parallelism"),
    Case("evaluation without data", "trainer.eval_every=5", "eval", "trainer.eval_every", "5", "",
         "data.eval"),
    Case("share and data", "data.eval=[eval.jsonl] data.eval_share=0.1", "given twice", "data.eval_share"),
    Case("prompt longer than all", "data.max_length=64 data.max_prompt_length=64", "",
         "data.max_prompt_length"),
    Case("nvme without a path", "reference.offload=nvme", "NVMe", "reference", to_do="nvme_path"),
    Case("quantized full training", "model.quantization=nf4", "quantized", "model.quantization",
         to_do="adapter"),
    # Options of the command line.
    Case("unknown option", "--dry-run", "no option --dry-run", LINE, "--dry-run", "", "--check"),
    Case("multirun", "--multirun trainer.seed=1,2", "--multirun", LINE, to_do="for each value"),
    Case("missing configuration folder", "--config-dir nowhere", "no folder", LINE, "nowhere", to_do="path"),
    Case("help on an unknown key", "--help loss.betta", "no key 'loss.betta'", to_do="loss.beta?"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_on_the_command_line_gets_one_block(case: Case, check: Check) -> None:
    check(case)
