"""`plan` beside runs that others published: seconds of a step, bytes of a GPU, tokens of a micro-batch.

A run of ours is slower by what the other program has and ours lacks: its factor stands in the row, and its
name in benchmarks/log.md ("Published runs beside plan").
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from transformers import AutoConfig

from dpo_dist.config.load import load_run_config
from dpo_dist.model.files.load import without_weights
from dpo_dist.tools.plan.estimate import MFU_RANGE, Data, Estimate, choose_machine, estimate
from dpo_dist.tools.plan.extension import PlanConfig
from dpo_dist.tools.plan.make_plan import _shape

pytestmark = pytest.mark.slow

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": dict(_shape("meta-llama/Llama-3.1-8B-Instruct") or {}),
    "olmo2-7b": {
        **{"model_type": "olmo2", "vocab_size": 100_352, "hidden_size": 4096, "intermediate_size": 11_008},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    },
    "gpt-oss-20b": {
        **{"model_type": "gpt_oss", "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880},
        **{"num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64},
        **{"num_local_experts": 32, "num_experts_per_tok": 4},
    },
    "qwen3-30b-a3b": {
        **{"model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144},
        **{"moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32},
        **{"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8},
    },
    "gemma4-26b-a4b": {
        **{"model_type": "gemma4_text", "vocab_size": 262_144, "hidden_size": 2816},
        **{"intermediate_size": 2112, "moe_intermediate_size": 704, "num_hidden_layers": 30},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2},
        **{"head_dim": 256, "global_head_dim": 512, "num_experts": 128, "top_k_experts": 8},
        **{"enable_moe_block": True, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        **{"attention_k_eq_v": True, "tie_word_embeddings": True, "max_position_embeddings": 262_144},
    },
}
FULL = "model.gradient_checkpointing=full"
IN_BF16 = "parallelism=zero3 optim=adamw_bf16"
LONG = f"{FULL} model.tiled_mlp=true model.activation_offload=true"


@cache
def planned(
    model: str, words: str, gpu: str = "h100-80g", gpus: int = 8, sequences: int = 1, tokens: int = 1024
) -> Estimate:
    batch = [f"trainer.global_batch_pairs={sequences}", f"data.max_length={tokens}"]
    given = ["model.path=m", "data.train=[d]", "sampling.prompts=0", f"plan.gpu={gpu}", f"plan.gpus={gpus}"]
    config = load_run_config([*given, *batch, *words.split()])
    causal_lm = without_weights(AutoConfig.for_model(**SHAPES[model]), config.model)
    machine = choose_machine(config.section_of(PlanConfig), config.model.dtype)
    return estimate(config, Data(sequences, float(tokens), ""), machine, causal_lm)


@dataclass(frozen=True)
class Row:
    """A published run: its step of so many sequences of 4,096 tokens, and what makes ours slower."""

    model: str
    words: str
    gpus: int
    sequences: int
    seconds: float
    slower: float = 1.0


ROWS = {
    "OLMo-2-7B DPO, 524k tokens": Row("olmo2-7b", "parallelism=zero3", 16, 128, 6.19),
    "OLMo-2-7B DPO, 212k tokens": Row("olmo2-7b", "parallelism=zero3", 16, 52, 1.87),
    "Llama-3-8B LoRA": Row("llama-8b", "loss=sft parallelism=ddp model.adapter.r=16", 1, 32, 10.5),
    # Their experts' products are as fast as dense ones, and their layers are not computed again.
    "gpt-oss-20b": Row("gpt-oss-20b", f"loss=sft {IN_BF16}", 8, 256, 10.0, 1.5 * 4 / 3),
    "Qwen3-30B-A3B": Row("qwen3-30b-a3b", f"loss=sft {IN_BF16}", 8, 512, 21.8, 4 / 3),
}


@pytest.mark.parametrize("name", ROWS)
def test_seconds_of_a_step(name: str) -> None:
    row = ROWS[name]
    seconds = []
    for every in ("none", "2", "full"):
        words = f"{row.words} model.gradient_checkpointing={every}"
        found = planned(row.model, words, gpus=row.gpus, sequences=row.sequences, tokens=4096)
        is_known = found.needs.per_token is not None or every == "full"
        if found.fits and is_known:
            seconds.append(found.seconds(MFU_RANGE[0])["training"])
    assert min(seconds) == pytest.approx(row.slower * row.seconds, rel=0.25)


def test_bytes_of_a_mixture_of_26b_on_two_gpus() -> None:
    """101.9 GiB are published, 119 to 256 GiB of other programs."""
    found = planned("gemma4-26b-a4b", f"loss=sft {IN_BF16} {FULL}", "b200-180g", 2, 16, 2048)
    assert found.needs.total_bytes(2048) / 2**30 == pytest.approx(101.9, rel=0.1)
    assert found.fits


def most_tokens(*setting: Any) -> int:
    """The tokens of the longest micro-batch that fits."""
    found = planned(*setting)
    tokens = 0
    for bit in reversed(range(8, 24)):
        if found.needs.fits(tokens + 2**bit, found.machine.memory):
            tokens += 2**bit
    return tokens


NF4 = "parallelism=ddp model.adapter.r=32 model.quantization=nf4"
TOGETHER = "parallelism=zero3 parallelism.sequence_parallel=8 model.attention=flash_attention_2"


@pytest.mark.parametrize(
    ("words", "gpu", "gpus", "goal", "without"),
    [
        (IN_BF16, "h100-80g", 1, 45_000, 12_000),
        ("parallelism=zero3", "h100-80g", 8, 400_000, 84_000),
        (NF4, "rtx4090-24g", 1, 78_475, 24_000),  # unsloth
        (TOGETHER, "h100-80g", 8, 3_000_000, 700_000),  # ALST: 3.7e6
    ],
)
def test_long_texts_of_an_8b(words: str, gpu: str, gpus: int, goal: int, without: int) -> None:
    assert most_tokens("llama-8b", f"{words} {LONG}", gpu, gpus) >= goal
    assert most_tokens("llama-8b", f"{words} {FULL}", gpu, gpus) < without
    if gpus == 1:
        for one in ("model.tiled_mlp=true", "model.activation_offload=true"):
            alone = most_tokens("llama-8b", f"{words} {FULL} {one}", gpu, gpus)
            assert without < alone < 0.6 * goal, "the two belong together"
