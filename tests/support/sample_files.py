"""Files of samples of a run as training writes them."""

import json
from pathlib import Path
from typing import Any

from dpo_dist.config.run_folder import RunFolder

GOOD = "The capital of France is Paris, a city on the Seine with about two million inhabitants."


def sample(number: int, policy: str = GOOD, **others: Any) -> dict[str, Any]:
    """A row of a file of samples; by default the policy's response is nearly the reference's."""
    return {
        "prompt": f"<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nQuestion {number}?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "prompt_id": f"{number:016x}",
        "source": "qa",
        "step": 0,
        "policy": policy,
        "policy_tokens": max(len(policy.split()), 1),
        "policy_finished": True,
        "reference": GOOD.replace("two", "three"),
        "reference_tokens": len(GOOD.split()),
        "reference_finished": True,
        "chosen": "Paris is the capital of France; about two million people live there, most of them well.",
        **others,
    }


def write_samples(run: Path, step: int, rows: list[dict[str, Any]]) -> None:
    file = RunFolder(run).samples_file(step)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
