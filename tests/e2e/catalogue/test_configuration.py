"""Mistakes on the command line, found before torch is imported and before processes join."""

import pytest

from tests.e2e.catalogue.case import Case
from tests.e2e.catalogue.conftest import Check

LINE = "command line"

# fmt: off
CASES = [
    Case("unknown key", "+loss.gamma=1", "no key 'loss.gamma'", "+loss.gamma=1", to_do="loss.simpo_gamma"),
    Case("option of the launcher", "--num_processes 2", "no option --num_processes", to_do="before -m"),
    Case("unknown loss", "loss=kto", "no loss named 'kto'", "loss", "kto", "one of ", "loss=NAME"),
    Case("wrong type", "loss.beta=abc", "loss.beta has the wrong type", LINE + ": loss.beta=abc", "abc",
         "number", to_do="set loss.beta to a number"),
    Case("out of range", "loss.beta=0", "loss.beta is out of range", "loss.beta", "0", "> 0",
         to_do="choose loss.beta in that range"),
    Case("best of a metric that is not there",
         "data.eval=[eval.jsonl] trainer.eval_every=1 trainer.keep_best=eval_rewards/margins/nobody",
         "do not have this metric", "trainer.keep_best", "eval_rewards/margins/nobody",
         "eval_rewards/margins",
         "set trainer.keep_best", joins=True),
    Case("no training data", "data.train=[]", "no training data", "data.train",
         to_do="set data.train=[pairs.jsonl]"),
    Case("option of another loss", "loss.simpo_gamma=1", "no effect", "loss.simpo_gamma",
         to_do="remove loss.simpo_gamma, or choose"),
    Case("unknown option", "--dry-run", "no option --dry-run", LINE, "", "", "--check"),
    Case("help on an unknown key", "--help loss.betta", "no key 'loss.betta'", to_do="loss.beta?"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_on_the_command_line_gets_one_block(case: Case, check: Check) -> None:
    check(case)
