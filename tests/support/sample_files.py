"""Files of samples of a run as training writes them."""

import json
from pathlib import Path
from typing import Any

from dpo_dist.config.run_folder import RunFolder

GOOD = "The capital of France is Paris, a city on the Seine with about two million inhabitants."


def sample(
    number: int, policy: str = GOOD, tokens: int | None = None, *, finished: bool = True, **others: Any
) -> dict[str, Any]:
    """A row of a file of samples; by default the policy's response is nearly the reference's."""
    reference = others.pop("reference", GOOD.replace("two", "three"))
    tokens = max(len(policy.split()), 1) if tokens is None else tokens
    return {
        "prompt": f"<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nQuestion {number}?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "prompt_id": f"{number:016x}",
        "source": "qa",
        "chosen": "Paris is the capital of France; about two million people live there, most of them well.",
        "step": 0,
        "responses": {
            "reference": {"text": reference, "tokens": len(GOOD.split()), "finished": True},
            "policy": {"text": policy, "tokens": tokens, "finished": finished},
        },
        **others,
    }


def write_samples(run: Path, step: int, rows: list[dict[str, Any]]) -> None:
    file = RunFolder(run).samples_file(step)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
