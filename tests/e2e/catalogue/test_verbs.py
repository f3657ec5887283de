"""Mistakes on the command lines of verbs, before torch is imported and before processes join."""

import pytest

from tests.e2e.catalogue.case import Case
from tests.e2e.catalogue.conftest import Check

# fmt: off
CASES = [
    Case("best of a metric that is not there",
         "data.eval=[eval.jsonl] trainer.eval_every=1 trainer.keep_best=eval_rewards/margins/nobody",
         "do not have this metric", "trainer.keep_best", "eval_rewards/margins/nobody",
         "eval_rewards/margins", "set trainer.keep_best", joins=True),
    Case("no training data", "data.train=[]", "no training data", "data.train",
         to_do="set 'data.train=[pairs.jsonl]'"),
    Case("evaluation without data", "run.dir=new", "evaluation data", "data.eval", verb="evaluate",
         to_do="set 'data.eval=[held_out.jsonl]'"),
    Case("evaluation of a missing model", "run.dir=new data.eval=[eval.jsonl] evaluation.model=./gone",
         "neither a local folder", "evaluation", "gone", verb="evaluate", to_do="check the path"),
    Case("comparison of one model", "'compare.models=[model]' data.eval=[eval.jsonl]",
         "a comparison has two models", "compare.models", "model",
         verb="compare", run="", to_do="for example 'compare.models=[base=./base"),
    Case("pairs from records without scores", "data.train=[train.jsonl] pairs.method=scores run.dir=p",
         "no pair can be made", "p/pairs/pairs.jsonl", "different scores", "",
         "pairs.method=samples", verb="pairs", run="", leaves=("p(/.*)?",)),
    Case("responses that do not end",
         "data.train=[train.jsonl] pairs.method=samples pairs.samples=1 model.path=model "
         "sampling.max_new_tokens=1 run.dir=p",
         "no pair can be made", "p/pairs/pairs.jsonl", "responses ended", "", verb="pairs", run="",
         to_do="pairs.unfinished=keep", joins=True, leaves=("p(/.*)?",)),
    Case("pairs from a missing function",
         "data.train=[train.jsonl] pairs.method=samples model.path=model pairs.function=nothing:here",
         "the function of pairs.function is not found", "pairs.function", "nothing", verb="pairs", run="",
         to_do="start in its folder"),
    Case("pairs by a server in place of a training's samples", "sampling.endpoint.url=http://127.0.0.1:9/v1",
         "sampling.endpoint.url", to_do="pairs"),
    Case("pairs by a server without a program to reload it",
         "data.train=[train.jsonl] pairs.method=samples model.path=model pairs.function=json:dumps "
         "sampling.endpoint.url=http://127.0.0.1:9/v1 sampling.endpoint.reload=absent run.dir=p",
         "the command that changes the server's weights failed", "sampling.endpoint.reload", "absent",
         "code 0", "correct the command", verb="pairs", run="", joins=True, leaves=("p(/.*)?",)),
    Case("precompute without a reference", "loss=simpo", "only a stored reference", "reference.mode",
         "none, simpo", verb="precompute", to_do="set reference=cached"),
    Case("export without a run", "", "model.path is not set", "model.path",
         to_do="name a run: run.dir=RUN", verb="export", run=""),
    Case("chat with a folder without a model", ".", "no config.json", "RUN", verb="chat", run="",
         to_do="write model"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_of_a_command_gets_one_block(case: Case, check: Check) -> None:
    check(case)
