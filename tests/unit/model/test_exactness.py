"""The check at start finds the cheapest exact arrangement, and refuses a model that has none."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import sliding_window_causal_mask_function

from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.pack import PackedBatch
from dpo_dist.config.schema import AttentionBackend, Dtype, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.attention.sdpa import Scores, SegmentAttention, mask_rule
from dpo_dist.model.exactness import StartCheck, trial_examples
from dpo_dist.model.files.load import load_packed
from dpo_dist.model.packed import PackedCausalLM
from tests.support.families import tiny_causal_lm, tiny_config, tiny_family
from tests.support.own_code import ship_code
from tests.support.packing import pack_unkeyed, plain_logps, random_pairs
from tests.support.precision import DTYPES
from tests.support.tiny_model import write_model
from tests.unit.model.test_architectures import SHAPES, assert_same, gradients

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PACKED, PADDED, SINGLE = Arrangement


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a model with code of its own, of which transformers keeps its copy elsewhere."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return write_model(tmp_path / "model")


def load(folder: Path, dtype: Dtype = Dtype.fp32) -> PackedCausalLM:
    config = ModelConfig(str(folder), dtype=dtype, trust_remote_code=True)
    return load_packed(folder, config, 64, CPU).eval()


def unsettled(causal_lm: Any, arrangement: Arrangement = PADDED) -> PackedCausalLM:
    return PackedCausalLM(causal_lm.eval(), AttentionBackend.sdpa, arrangement=arrangement)


def tiny(model_type: str = "llama", **own: Any) -> PackedCausalLM:
    return unsettled(tiny_causal_lm(tiny_config(model_type, **own)))


def settled_check(model: PackedCausalLM, longest: int = 64, **options: Any) -> StartCheck:
    check = StartCheck(model, options.pop("score", model), CPU, longest, **options)
    check.choose_arrangement()
    return check


def settled(model: PackedCausalLM, longest: int = 64, **options: Any) -> PackedCausalLM:
    settled_check(model, longest, **options)
    return model


def refused(message: str, work: Callable[[], object]) -> ConfigError:
    with pytest.raises(ConfigError, match=message) as raised:
        work()
    assert raised.value.remedy
    return raised.value


def assert_exact(model: PackedCausalLM) -> None:
    pairs = random_pairs(SHAPES)
    with model.unpacked() as own:
        expected = plain_logps(own, pairs)
        expected_gradients = gradients(own, expected)
    logps = model(pack_unkeyed(pairs))
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
    assert_same(gradients(model.causal_lm, logps), expected_gradients, 1e-4)


@pytest.mark.parametrize(
    ("hidden", "scale", "dtype", "arrangement", "own_logits"),
    [
        ("plain", 1.0, Dtype.fp32, PACKED, False),
        ("state", 1.0, Dtype.fp32, PADDED, False),
        ("rows", 1.0, Dtype.fp32, SINGLE, False),
        ("plain", 0.5, Dtype.fp32, PACKED, True),
        ("rows", 0.5, Dtype.fp32, SINGLE, True),
        ("state", 1.0, Dtype.bf16, PADDED, False),
        ("rows", 0.5, Dtype.bf16, SINGLE, True),
    ],
)
def test_own_code_is_arranged_so_that_it_is_exact(
    hidden: str,
    scale: float,
    dtype: Dtype,
    arrangement: Arrangement,
    own_logits: bool,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        model = settled(load(ship_code(folder, hidden, scale), dtype))
    assert (model.arrangement, model.own_logits) == (arrangement, own_logits)
    assert ("packed with the log-prob head: " in caplog.text) is (
        (arrangement, own_logits) != (PACKED, False)
    )
    assert ("all logits of the model" in caplog.text) is own_logits
    if dtype is Dtype.fp32:
        assert_exact(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden", "named"),
    [("future", "not causal"), ("noise", "random"), ("broken", "cannot score a sequence of tokens")],
)
def test_a_model_without_an_exact_forward_is_refused(
    hidden: str, named: str, dtype: Dtype, folder: Path
) -> None:
    model = load(ship_code(folder, hidden), dtype)
    assert "own" in refused(named, lambda: settled(model)).got


def test_the_arrangement_of_another_rank_counts(folder: Path) -> None:
    model, asked = load(folder), []

    def agree(fault: str) -> str:
        asked.append(fault)
        return fault or ("fails on rank 1" if len(asked) == 3 else "")

    assert settled(model, agree=agree).arrangement is PADDED
    assert not any(asked)


def test_a_fault_of_shared_prefixes_alone_is_found(folder: Path) -> None:
    model = load(folder)

    def faulty(batch: PackedBatch) -> Tensor:
        logps: Tensor = model(batch)
        has_prompts_only = {shared for _, shared, _ in batch.segments} <= {0, *(p for p, *_ in batch.layout)}
        return logps if has_prompts_only else logps + 0.01 * (torch.arange(len(logps)) % 2)

    assert settled(model, score=faulty).arrangement is PADDED


@pytest.mark.parametrize("is_int8", [False, True])
def test_rounding_of_inputs_to_int8_is_no_fault(is_int8: bool, folder: Path) -> None:
    """An outlier in any token changes the rounding of all, on CPUs in evaluation mode only."""
    model = load(folder)
    weight = torch.zeros(1, dtype=torch.int8 if is_int8 else torch.float32)
    model.causal_lm.model.register_parameter("added", nn.Parameter(weight, requires_grad=False))
    generator = torch.Generator().manual_seed(0)

    def noisy(batch: PackedBatch) -> Tensor:
        logps: Tensor = model(batch)
        return logps + 0.04 * logps.std() * torch.randn(logps.shape, generator=generator)

    def rounded(batch: PackedBatch) -> Tensor:
        logps: Tensor = model(batch)
        return logps if model.training else 1.02 * logps - 0.02 * logps.mean()

    if is_int8:
        assert settled(model, score=noisy).arrangement is PACKED
        settled_check(model, score=rounded).check_training()
    else:
        refused("random", lambda: settled(model, score=noisy))
        refused("in training mode", settled_check(model, score=rounded).check_training)


@pytest.mark.parametrize(("model_type", "computes"), [("gpt2", False), ("opt", False), ("xglm", True)])
def test_fewer_learned_positions_than_tokens_are_refused(model_type: str, computes: bool) -> None:
    model = tiny(model_type, max_position_embeddings=63)
    settled(model, 64)
    if computes:
        settled(model, 65)
    else:
        refused("too few positions", lambda: settled(model, 65))


SINKS = {"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 64, "sliding_window": 16}
WIDE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "qwen3_moe": {"num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True},
    "gpt_oss": SINKS,
    "gemma2": {"sliding_window": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 32},
}


def in_16_bits(model_type: str) -> PackedCausalLM:
    """A model as wide and deep as rounding needs to differ visibly between shapes of a batch."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "head_dim": 32, "vocab_size": 1024}
    config = tiny_config(model_type, max_position_embeddings=512, **sizes, **WIDE[model_type])
    causal_lm = tiny_causal_lm(config)
    torch.manual_seed(0)
    for name, parameter in causal_lm.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            is_wide = "embed" in name or "sinks" in name
            nn.init.normal_(parameter, std=1.0 if is_wide else parameter.shape[-1] ** -0.5)
    return unsettled(causal_lm.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("model_type", "rounds_otherwise"),
    [("mistral", True), ("qwen3_moe", False), ("qwen3_moe", True), ("gpt_oss", True)],
)
def test_rounding_in_16_bits_is_no_fault(
    model_type: str, rounds_otherwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that rounding sends to another expert changes much, in the model's own forward, too."""
    generator, attend = torch.Generator().manual_seed(0), SegmentAttention.__call__

    def rounded(self: SegmentAttention, *inputs: Any) -> Tensor:
        attended = attend(self, *inputs)
        factors = 1 + 2**-8 * (2 * torch.rand(attended.shape, generator=generator) - 1)
        return (attended.float() * factors).to(attended.dtype)

    if rounds_otherwise:
        monkeypatch.setattr(SegmentAttention, "__call__", rounded)
    assert settled(in_16_bits(model_type)).arrangement is PACKED


def attends(changed: Callable[[Scores], Scores], _model: PackedCausalLM, patch: pytest.MonkeyPatch) -> None:
    attend = SegmentAttention.__call__
    patch.setattr(SegmentAttention, "__call__", lambda *inputs: attend(*inputs[:-1], changed(inputs[-1])))


def sees(tokens: int, scores: Scores) -> Scores:
    rule = mask_rule(sliding_window_causal_mask_function(tokens), tokens, device=CPU)
    return scores if scores.rule is None else dataclasses.replace(scores, window=None, rule=rule)


def rotates_otherwise(model: PackedCausalLM, _patch: pytest.MonkeyPatch) -> None:
    frequencies = model.causal_lm.model.rotary_emb.inv_freq
    right = frequencies.clone()

    def rotate(*_: object) -> None:
        frequencies.copy_(right * (1.05 if model.arrangement is PACKED else 1.0))

    model.register_forward_pre_hook(rotate)


def leaks(model: PackedCausalLM, _patch: pytest.MonkeyPatch) -> None:
    """A state into the next response."""
    model.causal_lm.model.layers[1].register_forward_hook(
        lambda _module, _inputs, hidden: hidden + 0.25 * nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
    )


WIDER, NARROWER = partial(attends, partial(sees, 17)), partial(attends, partial(sees, 15))
NO_SINK = partial(attends, lambda scores: dataclasses.replace(scores, sinks=None))
NO_CAP = partial(attends, lambda scores: dataclasses.replace(scores, softcap=None))
SPOILT = [
    ("mistral", WIDER),
    ("mistral", NARROWER),
    ("mistral", rotates_otherwise),
    ("mistral", leaks),
    ("qwen3_moe", rotates_otherwise),
    ("qwen3_moe", leaks),
    ("gpt_oss", NO_SINK),
    ("gpt_oss", leaks),
    ("gemma2", NO_CAP),
]


@pytest.mark.parametrize(("model_type", "spoil"), SPOILT)
def test_a_wrong_forward_is_found_in_16_bits(
    model_type: str, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_16_bits(model_type)
    spoil(model, monkeypatch)
    assert settled(model, 128).arrangement is PADDED


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_of_own_code_is_found_in_training_mode(dtype: Dtype, folder: Path) -> None:
    check = settled_check(load(ship_code(folder, "dropout"), dtype))
    assert "nats" in refused("other log-probs in training mode", check.check_training).got


def test_a_last_layer_with_a_forward_of_its_own_is_not_replaced() -> None:
    class Normed(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 3 * super().forward(nn.functional.normalize(hidden, dim=-1))

    causal_lm = tiny_causal_lm(tiny_config("llama"))
    own = causal_lm.lm_head
    causal_lm.lm_head = Normed(own.in_features, own.out_features, bias=False)
    model = settled(unsettled(causal_lm))
    assert (model.arrangement, model.own_logits) == (PACKED, True)
    assert_exact(model)


def test_keys_that_stand_for_many_tokens_are_tried() -> None:
    """Shorter sequences than 128 tokens have none of DeepSeek-V4's compressed keys, and could be packed."""
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    kinds = {"layer_types": [*rates], "mlp_layer_types": ["moe"] * 2, "compress_rates": rates}
    model = tiny("deepseek_v4", max_position_embeddings=2048, index_n_heads=2, **kinds)
    assert len(trial_examples(model.causal_lm, 512)[0].prompt_ids) > 64
    assert settled(model, 512).arrangement is SINGLE


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("used_by_long", [True, False])
def test_several_processes_train_no_model_of_which_some_sequences_skip_a_layer(
    used_by_long: bool, is_trained: bool
) -> None:
    causal_lm = tiny_family("olmo3")
    mlp = causal_lm.model.layers[1].mlp.requires_grad_(is_trained)
    compute = mlp.forward
    mlp.forward = lambda hidden: compute(hidden) if (hidden.shape[-2] > 8) is used_by_long else hidden
    model = unsettled(causal_lm, PACKED).train()
    check = StartCheck(model, model, CPU, 64)
    if is_trained:
        error = refused("several processes", check.check_use)
        assert "model.layers.1.mlp.gate_proj.weight" in error.got
        assert "layers.0" not in error.got
    else:
        check.check_use()


class Either(nn.Module):
    """One of two equal parts computes long sequences, the other one short ones."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.parts[hidden.shape[-2] > 8](hidden)
        return out


@pytest.mark.parametrize("is_sharded", [True, False])
def test_layers_that_share_a_block_of_parts_are_not_sharded_if_sequences_skip_a_part(
    is_sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_dist.model.exactness.shards_loading", lambda: is_sharded)
    causal_lm = tiny_family("olmo3")
    for layer in causal_lm.model.layers:
        layer.mlp = Either() if layer is causal_lm.model.layers[0] else causal_lm.model.layers[0].mlp
    model = unsettled(causal_lm, PACKED).train()
    check = StartCheck(model, model, CPU, 64)
    if is_sharded:
        assert "model.layers.0.mlp.parts.0.weight" in refused("several processes", check.check_use).got
    else:
        check.check_use()
