"""Mistakes with the other verbs."""

import pytest

from tests.e2e.catalogue.case import Case
from tests.e2e.catalogue.conftest import Check

COMPARE = "'compare.models=[a=model,b=model]' data.eval=[eval.jsonl]"

# fmt: off
CASES = [
    Case("evaluation of a folder that is no run", "run.dir=nowhere", "", "", verb="evaluate", run=""),
    Case("evaluation without data", "run.dir=new", "evaluation data", "data.eval", verb="evaluate"),
    Case("evaluation of a missing model", "run.dir=new data.eval=[eval.jsonl] evaluation.model=./gone", "",
         "evaluation", "gone", verb="evaluate"),
    Case("evaluation of missing pairs", "run.dir=new 'evaluation.data=[hard.jsonl]' evaluation.model=model",
         "the file does not exist", "hard.jsonl", verb="evaluate"),
    Case("evaluation of an unknown checkpoint",
         "run.dir=new data.eval=[eval.jsonl] evaluation.model=new/checkpoints/step-000005", "", "evaluation",
         verb="evaluate"),
    Case("comparison of one model", "'compare.models=[model]' data.eval=[eval.jsonl]", "", "compare.models",
         verb="compare", run=""),
    Case("comparison without prompts", "'compare.models=[a=model,b=model]'", "evaluation data", "data.eval",
         verb="compare", run=""),
    Case("comparison of a missing model", "'compare.models=[a=./gone,b=model]' data.eval=[eval.jsonl]",
         "does not exist", "compare.models", "gone", verb="compare", run=""),
    Case("comparison of two models of one name", "'compare.models=[a=model,a=model]' data.eval=[eval.jsonl]",
         "", "compare.models", "a", verb="compare", run=""),
    Case("two judges",
         f"{COMPARE} pairs.reward_model=model pairs.function=a:b",
         "", "pairs", verb="compare", run=""),
    Case("unknown method of pairs", "data.train=[train.jsonl] pairs.method=magic", "pairs.method",
         "command line: pairs.method=magic", "magic", verb="pairs", run=""),
    Case("pairs from records without scores", "data.train=[train.jsonl] pairs.method=scores run.dir=p",
         "no pair can be made", "p/pairs/pairs.jsonl", verb="pairs", run="", leaves=("p(/.*)?",)),
    Case("pairs from a missing function",
         "data.train=[train.jsonl] pairs.method=samples model.path=model pairs.function=nothing:here",
         "", "pairs.function", "nothing", verb="pairs", run=""),
    Case("doctor without data", "", "no training data", "data.train", verb="doctor", run=""),
    Case("doctor of a missing file", "data.train=[gone.jsonl]", "the file does not exist", "gone.jsonl",
         verb="doctor", run=""),
    Case("threshold that does not exist", "data.train=[train.jsonl] 'doctor.thresholds={nope: 1}'", "",
         "doctor.thresholds", "nope", verb="doctor", run=""),
    Case("precompute without a reference", "loss=simpo", "only a stored reference", "reference.mode",
         "none with simpo", "cached", verb="precompute"),
    Case("precompute with a typing error", "loss.betta=1", "no key", to_do="loss.beta?", verb="precompute"),
    Case("check of a broken run", "--check data.train=[gone.jsonl]", "the file does not exist",
         "gone.jsonl"),
    Case("store that does not exist", "info nowhere", "", "nowhere", verb="store", run=""),
    Case("store that is a file", "verify train.jsonl", "", "train.jsonl", verb="store", run=""),
    Case("report about no run", "nowhere", "no run directory", "nowhere", "no such folder",
         verb="report.__main__", run=""),
    Case("report about a file", "train.jsonl", "no run directory", "train.jsonl", "a file",
         verb="report.__main__", run=""),
    Case("difference of a run and nothing", "model nowhere", "no run directory", "model",
         verb="report.__main__", run=""),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_with_another_verb_gets_one_block(case: Case, check: Check) -> None:
    check(case)
