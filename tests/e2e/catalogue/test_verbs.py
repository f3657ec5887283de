"""Mistakes with the other verbs."""

import pytest

from tests.e2e.catalogue.case import Case
from tests.e2e.catalogue.conftest import Check

LINE = "command line"
COMPARE = "'compare.models=[a=model,b=model]' data.eval=[eval.jsonl]"

# fmt: off
CASES = [
    Case("evaluation of a folder that is no run", "run.dir=nowhere",
         "this is no run directory", "", verb="evaluate", run="",
         to_do="name the run.dir of a run"),
    Case("evaluation without data", "run.dir=new", "evaluation data", "data.eval", verb="evaluate",
         to_do="set 'data.eval=[held_out.jsonl]'"),
    Case("evaluation of a missing model", "run.dir=new data.eval=[eval.jsonl] evaluation.model=./gone",
         "this model folder does not exist",
         "evaluation", "gone", verb="evaluate", to_do="check the path"),
    Case("evaluation of missing pairs", "run.dir=new 'evaluation.data=[hard.jsonl]' evaluation.model=model",
         "the file does not exist", "hard.jsonl", verb="evaluate",
         to_do="did you mean eval.jsonl or train.jsonl?"),
    Case("evaluation of an unknown checkpoint",
         "run.dir=new data.eval=[eval.jsonl] evaluation.model=new/checkpoints/step-000005",
         "this model folder does not exist", "evaluation",
         verb="evaluate", to_do="check the path"),
    Case("comparison of one model", "'compare.models=[model]' data.eval=[eval.jsonl]",
         "a comparison needs two models", "compare.models",
         verb="compare", run="", to_do="write 'compare.models=[base=./base"),
    Case("comparison without prompts", "'compare.models=[a=model,b=model]'", "evaluation data", "data.eval",
         verb="compare", run="", to_do="set 'data.eval=[held_out.jsonl]'"),
    Case("comparison of a missing model", "'compare.models=[a=./gone,b=model]' data.eval=[eval.jsonl]",
         "does not exist", "compare.models", "gone", verb="compare", run="", to_do="check the path"),
    Case("comparison of two models of one name", "'compare.models=[a=model,a=model]' data.eval=[eval.jsonl]",
         "two models have the same name", "compare.models", "a", verb="compare", run="", to_do="name them"),
    Case("two judges",
         f"{COMPARE} pairs.reward_model=model pairs.function=a:b",
         "a comparison has one judge", "pairs", verb="compare", run="", to_do="set one of them only"),
    Case("pairs from records without scores", "data.train=[train.jsonl] pairs.method=scores run.dir=p",
         "no pair can be made", "p/pairs/pairs.jsonl", "different scores", "",
         "pairs.method=samples", verb="pairs", run="", leaves=("p(/.*)?",)),
    Case("pairs from a missing function",
         "data.train=[train.jsonl] pairs.method=samples model.path=model pairs.function=nothing:here",

         "the module of pairs.function is not found", "pairs.function", "nothing", verb="pairs", run="",
         to_do="start in the folder of nothing"),
    Case("doctor without data", "", "no training data", "data.train", verb="doctor", run="",
         to_do="set data.train=[pairs.jsonl]"),
    Case("doctor of a missing file", "data.train=[gone.jsonl]", "the file does not exist", "gone.jsonl",
         verb="doctor", run="", to_do="did you mean eval.jsonl or train.jsonl?"),
    Case("precompute without a reference", "loss=simpo", "only a stored reference", "reference.mode",
         "none, simpo", verb="precompute", to_do="set reference=cached"),
    Case("check of a broken run", "--check data.train=[gone.jsonl]", "the file does not exist",
         "gone.jsonl", to_do="did you mean eval.jsonl or train.jsonl?"),
    Case("store that does not exist", "info nowhere",
         "no reference store is found in this folder", "nowhere", verb="store", run="",
         to_do="give the folder set as reference.store"),
    Case("store that is a model", "gc model", "no reference store is found", "model", "no log-probs", "",
         "reference.store", verb="store", run=""),
    Case("export without a run", "", "no run is named", "run.dir", "", "run.dir=output/", "set run.dir",
         verb="export", run=""),
    Case("export of no run", "run.dir=nowhere", "no run directory", "nowhere", "no such folder",
         "config.yaml", "run.dir of a run", verb="export", run=""),
    Case("export out of the run", "export.checkpoint=../../model", "export.checkpoint", "export.checkpoint",
         "../../model", "step-000100", "set export.checkpoint to one of these", verb="export"),
    Case("key that nothing but training reads", "optim.lr=1", "compare does not read optim.lr", LINE,
         to_do="train reads", verb="compare", run=COMPARE),
    Case("store that is a file", "verify train.jsonl",
         "no reference store is found in this folder", "train.jsonl", verb="store", run="",
         to_do="give the folder set as reference.store"),
    Case("report about no run", "nowhere", "no run directory", "nowhere", "no such folder",
         verb="report", run="", to_do="name the run.dir of a run"),
    Case("report about a file", "train.jsonl", "no run directory", "train.jsonl", "a file",
         verb="report", run="", to_do="name the run.dir of a run"),
    Case("difference of a run and nothing", "model nowhere", "no run directory", "model",
         verb="report", run="", to_do="name the run.dir of a run"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_with_another_verb_gets_one_block(case: Case, check: Check) -> None:
    check(case)
