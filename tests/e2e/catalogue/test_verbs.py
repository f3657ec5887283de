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
    Case("unknown method of pairs", "data.train=[train.jsonl] pairs.method=magic", "pairs.method",
         "command line: pairs.method=magic", "magic", verb="pairs", run="",
         to_do="set pairs.method to one of these"),
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
    Case("threshold that does not exist", "data.train=[train.jsonl] 'doctor.thresholds={nope: 1}'",
         "the doctor has no such rule",
         "doctor.thresholds", "nope", verb="doctor", run="", to_do="see docs/doctor.md"),
    Case("precompute without a reference", "loss=simpo", "only a stored reference", "reference.mode",
         "none with simpo", "cached", verb="precompute", to_do="set reference=cached"),
    Case("precompute with a typing error", "loss.betta=1", "no key", to_do="loss.beta?", verb="precompute"),
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
    Case("export with a number", "export.checkpoint=3", "export.checkpoint", "export.checkpoint",
         "'3'", "step-000100", "write one of these", verb="export"),
    Case("export out of the run", "export.checkpoint=../../model", "export.checkpoint", "export.checkpoint",
         "../../model", "step-000100", "write one of these", verb="export"),
    Case("export with a typing error", "export.chekpoint=best", "no key", LINE, "", "export.checkpoint",
         "export.checkpoint?", verb="export"),
    Case("store that is a file", "verify train.jsonl",
         "no reference store is found in this folder", "train.jsonl", verb="store", run="",
         to_do="give the folder set as reference.store"),
    Case("report about no run", "nowhere", "no run directory", "nowhere", "no such folder",
         verb="report.__main__", run="", to_do="name the run.dir of a run"),
    Case("report about a file", "train.jsonl", "no run directory", "train.jsonl", "a file",
         verb="report.__main__", run="", to_do="name the run.dir of a run"),
    Case("difference of a run and nothing", "model nowhere", "no run directory", "model",
         verb="report.__main__", run="", to_do="name the run.dir of a run"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_with_another_verb_gets_one_block(case: Case, check: Check) -> None:
    check(case)
