"""IFEval (arXiv 2311.07911) as a judge, by the rules of lm-eval: `pairs.function=examples.ifeval:score`.

The environment variable IFEVAL_DATA names the benchmark's file, by default `ifeval_input_data.jsonl`, whose
lines have `prompt`, `instruction_id_list` and `kwargs`. Needs `pip install "dpo-dist[ifeval]"`; at the first
import nltk downloads `punkt_tab`, by which sentences are counted.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from lm_eval.tasks.ifeval.utils import InputExample, test_instruction_following_strict


@cache
def _inputs() -> dict[str, InputExample]:
    lines = (
        Path(os.environ.get("IFEVAL_DATA", "ifeval_input_data.jsonl"))
        .read_text(encoding="utf-8")
        .splitlines()
    )
    names = ("key", "instruction_id_list", "prompt", "kwargs")
    return {
        row["prompt"].strip(): InputExample(*(row[name] for name in names)) for row in map(json.loads, lines)
    }


def score(prompt: str | Sequence[Mapping[str, str]], responses: Sequence[str]) -> list[float | None]:
    """Return 1 for a response that follows all instructions of its prompt, else 0; None for other prompts.

    The mean is the benchmark's strict accuracy of prompts.
    """
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if (wanted := _inputs().get(text.strip())) is None:
        return [None] * len(responses)
    return [
        float(test_instruction_following_strict(wanted, text).follow_all_instructions) for text in responses
    ]
