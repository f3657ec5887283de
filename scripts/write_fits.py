"""Write the table of README.md of the largest model that fits, by the estimates of `dpo-dist plan`.

Run `make docs` after a change of what a run takes in memory.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoConfig

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig
from dpo_dist.model.files.load import without_weights
from dpo_dist.tools.plan.estimate import Data, choose_machine, estimate
from dpo_dist.tools.plan.extension import GpuKind, PlanConfig

README = Path(__file__).resolve().parents[1] / "README.md"
SIZES = {  # of Qwen2.5: hidden size, MLP, layers, heads of queries and keys, vocabulary, tied; and Llama 3
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False),
    "70B": (8192, 28_672, 80, 64, 8, 128_256, False),
}
MACHINES: dict[str, tuple[GpuKind, int]] = {
    "24 GB": ("rtx4090-24g", 1),
    "48 GB": ("l40s-48g", 1),
    "80 GB": ("h100-80g", 1),
    "141 GB": ("h200-141g", 1),
    "8 of 24 GB": ("rtx4090-24g", 8),
    "8 of 80 GB": ("h100-80g", 8),
}
COLUMNS = {
    "all weights": "parallelism=zero3",
    "all weights, `optim=adamw_bf16`": "parallelism=zero3 optim=adamw_bf16",
    "an adapter, bf16": "parallelism=ddp model.adapter.r=16",
    "an adapter, `nf4`": "parallelism=ddp model.adapter.r=16 model.quantization=nf4",
}
PAIRS = Data(10_000, 700.0, "")


@cache
def _configured(words: str) -> RunConfig:
    given = ["model.path=m", "data.train=[d]", "sampling.prompts=0", "model.gradient_checkpointing=full"]
    return load_run_config([*given, *words.split()])


def _shape(size: str) -> Any:
    hidden, width, layers, queries, keys, vocabulary, tied = SIZES[size]
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": queries, "num_key_value_heads": keys, "vocab_size": vocabulary}
    longest = {"max_position_embeddings": 131_072, "tie_word_embeddings": tied}
    return AutoConfig.for_model("qwen2", **sizes, **heads, **longest)


def _largest(columns: Iterable[str]) -> dict[tuple[str, str], str]:
    """Return the largest model that each machine can train, by machine and column of one policy."""
    found: dict[tuple[str, str], str] = {}
    wanted = [*product(MACHINES, columns)]
    for size in reversed(SIZES):
        left = [cell for cell in wanted if cell not in found]
        if not left:
            break
        # To trace a model's activations takes longer than all estimates of it.
        causal_lm = without_weights(_shape(size), _configured(COLUMNS[left[0][1]]).model)
        for machine, column in left:
            gpu, gpus = MACHINES[machine]
            config = _configured(COLUMNS[column])
            plan = replace(config.section_of(PlanConfig), gpu=gpu, gpus=gpus)
            if estimate(config, PAIRS, choose_machine(plan, config.model.dtype), causal_lm).fits:
                found[machine, column] = size
    return found


def table() -> str:
    """Return the table as Markdown: the largest model that fits, or "-"."""
    adapted = [column for column, words in COLUMNS.items() if "adapter" in words]
    whole = [column for column in COLUMNS if column not in adapted]
    largest = _largest(whole) | _largest(adapted)
    lines = [["GPU", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for machine in MACHINES:
        lines.append([machine, *(largest.get((machine, column), "-") for column in COLUMNS)])
    return "".join(f"|{'|'.join(line)}|\n" for line in lines)


def readme() -> str:
    """Return the whole text of README.md."""
    before, marker, after = README.read_text().partition("<!-- table: what fits -->\n\n")
    _, end, rest = after.partition("\n<!-- end of table -->")
    return before + marker + table() + end + rest


if __name__ == "__main__":
    README.write_text(readme())
