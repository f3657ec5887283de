"""Mistakes on the command line, found before torch is imported and before processes join."""

import pytest

from tests.e2e.catalogue.case import Case
from tests.e2e.catalogue.conftest import Check

LINE = "command line"

# fmt: off
CASES = [
    Case("unknown key", "+loss.gamma=1", "no key 'loss.gamma'", "+loss.gamma=1", to_do="loss.simpo_gamma"),
    Case("key of another trainer", "learning_rate=1e-5", "no key", to_do="write optim.lr=1e-5"),
    Case("option of the launcher", "--num_processes 2", "no option --num_processes", to_do="before -m"),
    Case("unknown loss", "loss=kto", "no loss named 'kto'", "loss", "kto", "one of ", "loss=NAME"),
    Case("model in place of a preset", "model=Qwen/Qwen2.5-7B", "no model named", to_do="model.path=Qwen"),
    Case("unknown experiment", "+experiment=qwen7", "no experiment", got="qwen7",
         to_do="+experiment=qwen7b?"),
    Case("wrong type", "loss.beta=abc", "loss.beta has the wrong type", LINE + ": loss.beta=abc", "abc",
         "number", to_do="set loss.beta to a number"),
    Case("out of range", "loss.beta=0", "loss.beta is out of range", "loss.beta", "0", "> 0",
         to_do="choose loss.beta in that range"),
    Case("second of a key wrong", "trainer.seed=1 trainer.seed=x", "trainer.seed", LINE + ": trainer.seed=x",
         "x", to_do="set trainer.seed to a whole number"),
    Case("kind of a term", "'loss.terms=[{kind: nll}]'", "no such value", "loss.terms[0].kind", "nll", "",
         "=sft?"),
    Case("best of a metric that is not there",
         "data.eval=[eval.jsonl] trainer.eval_every=1 trainer.keep_best=eval_rewards/margins/nobody",
         "do not have this metric", "trainer.keep_best", "eval_rewards/margins/nobody",
         "eval_rewards/margins",
         "set trainer.keep_best", joins=True),
    Case("spaces", "loss.beta = 0.2", "not KEY=VALUE", LINE, to_do="no space"),
    Case("interpolation", "'data.cache=${run.rot}/x'", "cannot be composed", "data.cache", "run.rot",
         to_do="correct the key"),
    Case("no training data", "data.train=[]", "no training data", "data.train",
         to_do="set data.train=[pairs.jsonl]"),
    Case("option of another loss", "loss.simpo_gamma=1", "no effect", "loss.simpo_gamma",
         to_do="remove loss.simpo_gamma, or choose"),
    Case("quantized full training", "model.quantization=nf4 parallelism=ddp loss=sft", "quantized",
         "model.quantization", to_do="adapter"),
    Case("unknown option", "--dry-run", "no option --dry-run", LINE, "", "", "--check"),
    Case("missing configuration folder", "--config-dir nowhere", "is no folder", LINE, to_do="--help"),
    Case("help on an unknown key", "--help loss.betta", "no key 'loss.betta'", to_do="loss.beta?"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_on_the_command_line_gets_one_block(case: Case, check: Check) -> None:
    check(case)
