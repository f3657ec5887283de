"""An ablation changes the work of a step, and neither log-probs nor gradients."""

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.ablation import ABLATIONS, Work, removed
from dpo_dist.config.schema import AttentionBackend
from dpo_dist.data import collate, dataset
from dpo_dist.model.attention import PACKED
from dpo_dist.model.packed import PackedCausalLM
from tests.support.packing import COSTS, VOCABULARY, plain_logps, random_pairs

SHAPES = [(7, 5, 3), (4, 1, 6), (12, 2, 2), (3, 8, 9), (9, 4, 1)]
BUDGET = 40
PAIRS = random_pairs(SHAPES)


def tiny_model(attention: str) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return Qwen2ForCausalLM(config)


def train_once(name: str) -> tuple[Work, dict[int, list[float]], torch.Tensor]:
    """Return the work, the log-probs of each pair's responses, and a gradient."""
    lengths = np.array(SHAPES)
    logps: dict[int, list[float]] = {}
    with removed(ABLATIONS[name]) as work:
        model = PackedCausalLM(tiny_model(PACKED), AttentionBackend.sdpa)
        sizes = dataset.example_sizes(lengths[:, 0], lengths[:, 1:].ravel(), np.full(len(SHAPES), 2), COSTS)
        for (indices,) in collate.plan_micro_batches(sizes, 1, BUDGET):
            batch = collate.pack([PAIRS[index] for index in indices], np.zeros((2 * len(indices), 2)))
            token_logps = model(batch)
            token_logps.sum().backward()
            assert len(batch.weights) == len(indices)
            parts = token_logps.detach().split(batch.response_tokens.tolist())
            for index, chosen, rejected in zip(indices, parts[::2], parts[1::2], strict=True):
                logps[index] = [*chosen.tolist(), *rejected.tolist()]
    gradient = model.causal_lm.model.embed_tokens.weight.grad
    assert gradient is not None
    return work, logps, gradient


@pytest.mark.parametrize("name", ABLATIONS)
def test_log_probs_and_gradients_are_those_of_the_plain_forward(name: str) -> None:
    plain = tiny_model("sdpa")
    wanted = plain_logps(plain, PAIRS)
    wanted.sum().backward()
    _, logps, gradient = train_once(name)
    got = torch.tensor([logp for index in sorted(logps) for logp in logps[index]])
    torch.testing.assert_close(got, wanted.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, plain.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-5)


def test_every_ablation_does_the_work_that_its_part_saves() -> None:
    works = {name: train_once(name)[0] for name in ABLATIONS}
    whole = works["dpo_dist"]
    packed = sum(prompt + chosen + rejected - 2 for prompt, chosen, rejected in SHAPES)
    apart = packed + sum(prompt for prompt, *_ in SHAPES)
    targets = sum(chosen + rejected for _, chosen, rejected in SHAPES)
    assert (whole.tokens, whole.logits) == (packed, targets)
    assert (works["without_sharing"].tokens, works["without_sharing"].logits) == (apart, targets)
    assert works["without_packing_single"].micro_batches == len(SHAPES) > whole.micro_batches
    assert packed < works["without_packing_padded"].tokens
    assert works["without_packing_padded"].most_tokens <= BUDGET
    assert works["without_chunks"].logits == packed
    assert works["without_store"] == whole
    assert works["without_all"].logits == works["without_all"].tokens > apart
    assert works["without_all"].most_tokens <= BUDGET


def test_nothing_stays_removed() -> None:
    before = (collate.pack, collate.plan_micro_batches, dataset.example_sizes, PackedCausalLM.forward)
    with removed(ABLATIONS["without_all"]):
        pass
    assert before == (
        collate.pack,
        collate.plan_micro_batches,
        dataset.example_sizes,
        PackedCausalLM.forward,
    )
