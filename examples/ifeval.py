"""IFEval (arXiv 2311.07911) as a judge, by the rules of lm-eval: `pairs.function=examples.ifeval:score`.

The environment variable IFEVAL_DATA names the benchmark's file, by default `ifeval_input_data.jsonl`, whose
lines have `prompt`, `instruction_id_list` and `kwargs`. Needs `pip install '.[ifeval]'`; at the first
import nltk downloads `punkt_tab`, by which sentences are counted.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from lm_eval.tasks.ifeval.utils import InputExample, test_instruction_following_strict


@cache
def _inputs(file: Path) -> dict[str, InputExample]:
    names = ("key", "instruction_id_list", "prompt", "kwargs")
    rows = map(json.loads, file.read_bytes().splitlines())
    return {row["prompt"].strip(): InputExample(*(row[name] for name in names)) for row in rows}


def score(prompt: str | Sequence[Mapping[str, str]], responses: Sequence[str]) -> list[float | None]:
    """Return 1 for a response that follows all instructions of its prompt, else 0; None for other prompts.

    The mean is the benchmark's strict accuracy of prompts.
    """
    inputs = _inputs(Path(os.environ.get("IFEVAL_DATA", "ifeval_input_data.jsonl")))
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if (wanted := inputs.get(text.strip())) is None:
        return [None] * len(responses)
    checked = (test_instruction_following_strict(wanted, response) for response in responses)
    return [float(each.follow_all_instructions) for each in checked]
