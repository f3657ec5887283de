"""The check at start finds the cheapest exact arrangement, and refuses a model that has none."""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.masking_utils import sliding_window_causal_mask_function

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import AttentionBackend, Dtype, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.architectures import recorded_arrangement
from dpo_dist.model.exactness import CheckedModel, check_positions, check_training, settle, trial_sequences
from dpo_dist.model.load import load_packed
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.model.sdpa import Scores, SegmentAttention, mask_rule
from dpo_dist.model.ulysses import TokenExchange
from tests.support.families import FAMILIES, tiny_family
from tests.support.own_code import ship_code
from tests.support.packing import VOCABULARY, pack_unkeyed, plain_logps, random_pairs
from tests.support.precision import DTYPES
from tests.support.tiny_model import write_model
from tests.unit.model.test_architectures import SHAPES, gradients, tiny_causal_lm, tiny_config, with_rope

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


def settled(model: PackedCausalLM) -> PackedCausalLM:
    settle(CheckedModel(model, model, CPU, 64))
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden", "scale", "arrangement", "own_logits"),
    [
        ("plain", 1.0, PACKED, False),
        ("state", 1.0, PADDED, False),
        ("rows", 1.0, SINGLE, False),
        ("plain", 0.5, PACKED, True),
        ("rows", 0.5, SINGLE, True),
    ],
)
def test_own_code_is_arranged_so_that_it_is_exact(
    hidden: str, scale: float, arrangement: Arrangement, own_logits: bool, dtype: Dtype, folder: Path
) -> None:
    model = settled(load(ship_code(folder, hidden, scale), dtype))
    assert (model.arrangement, model.own_logits) == (arrangement, own_logits)
    if dtype is not Dtype.fp32:
        return
    pairs = random_pairs(SHAPES)
    with model.unpacked() as own:
        expected = plain_logps(own, pairs)
        plain = gradients(own, expected)
    logps = model(pack_unkeyed(pairs))
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
    ours = gradients(model.causal_lm, logps)
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_each_family_has_the_arrangement_that_is_recorded(model_type: str) -> None:
    model = PackedCausalLM(
        tiny_family(model_type, VOCABULARY).eval(), AttentionBackend.sdpa, arrangement=PADDED
    )
    settled(model)
    assert (model.arrangement, model.own_logits) == (FAMILIES[model_type][1], False)
    assert recorded_arrangement(model_type) in (PACKED, model.arrangement)
    pairs = random_pairs(SHAPES)
    with model.unpacked() as own, torch.no_grad():
        expected = plain_logps(own, pairs)
    with torch.no_grad():
        torch.testing.assert_close(model(pack_unkeyed(pairs)), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden", "named"), [("future", "not causal"), ("broken", "cannot score a sequence of tokens")]
)
def test_a_model_without_an_exact_forward_is_refused(
    hidden: str, named: str, dtype: Dtype, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        settled(load(ship_code(folder, hidden), dtype))
    assert raised.value.remedy
    assert "own" in raised.value.got


def test_log_probs_that_differ_from_call_to_call_are_refused(folder: Path) -> None:
    model, calls = load(folder), iter(range(100))

    def score(batch: PackedBatch) -> Tensor:
        logps: Tensor = model(batch) + (0.1 * next(calls) if len(batch.layout) == 2 else 0.0)
        return logps

    with pytest.raises(ConfigError, match="random") as raised:
        settle(CheckedModel(model, score, CPU, 64))
    assert "by 0.1 nats in the mean" in raised.value.got


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_in_evaluation_mode_is_named(dtype: Dtype, folder: Path) -> None:
    """It also looks like a log-prob that depends on later tokens."""
    with pytest.raises(ConfigError, match="are random") as raised:
        settled(load(ship_code(folder, "noise"), dtype))
    assert "dropout" in raised.value.remedy


def test_the_arrangement_of_another_rank_counts(folder: Path) -> None:
    """A rank whose arrangement is exact goes on with the others if it is not exact there."""
    model, asked = load(folder), []

    def agree(fault: str, _seconds: float | None = None) -> str:
        asked.append(fault)
        return fault or ("fails on rank 1" if len(asked) == 4 else "")

    settle(CheckedModel(model, model, CPU, 64, agree=agree))
    assert model.arrangement is PADDED
    assert not any(asked)


def test_each_failure_and_the_memory_of_logits_are_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        settled(load(ship_code(folder, "state", 0.5)))
    assert "own, packed with the log-prob head: log-probs differ by" in caplog.text
    assert "log-probs are computed from all logits of the model" in caplog.text


def test_the_sequences_are_longer_than_a_short_window_and_within_the_longest() -> None:
    config = tiny_config("mistral", sliding_window=100)
    (long, short) = trial_sequences(tiny_causal_lm(config), 1024)
    assert len(long.prompt_ids) + len(long.responses[1]) > 100
    assert len(short.prompt_ids) + max(map(len, short.responses)) < 100
    for length in (4, 7, 64):
        for sequences in trial_sequences(tiny_causal_lm(config), length):
            assert min(map(len, sequences.responses)) > 0
            assert len(sequences.prompt_ids) + max(map(len, sequences.responses)) <= length
            assert not {0, 1, 2} & {*sequences.prompt_ids, *sequences.responses[0]}  # the special tokens


@pytest.mark.parametrize("is_int8", [False, True])
def test_rounding_to_int8_depends_on_other_tokens(is_int8: bool) -> None:
    """By as much as measured: 4 % of the spread, as an outlier in any token changes the rounding of all."""
    model = PackedCausalLM(
        tiny_causal_lm(tiny_config("llama")).eval(), AttentionBackend.sdpa, arrangement=PADDED
    )
    weight = torch.zeros(1, dtype=torch.int8 if is_int8 else torch.float32)
    model.causal_lm.model.register_parameter("added", torch.nn.Parameter(weight, requires_grad=False))
    generator = torch.Generator().manual_seed(0)

    def score(batch: PackedBatch) -> Tensor:
        logps: Tensor = model(batch)
        return logps + 0.04 * logps.std() * torch.randn(logps.shape, generator=generator)

    if is_int8:
        settle(CheckedModel(model, score, CPU, 64))
        assert model.arrangement is PACKED
    else:
        with pytest.raises(ConfigError, match="are random"):
            settle(CheckedModel(model, score, CPU, 64))


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "xglm", "gptj"])
def test_fewer_learned_positions_than_tokens_are_refused(model_type: str) -> None:
    own = {"num_attention_heads": 4, "rotary_dim": 4, "attention_heads": 4, "ffn_dim": 32}
    model = PackedCausalLM(
        tiny_causal_lm(tiny_config(model_type, max_position_embeddings=63, **own)).eval(),
        AttentionBackend.sdpa,
        arrangement=PADDED,
    )
    if model_type in ("gptj", "xglm"):  # positions are computed
        settle(CheckedModel(model, model, CPU, 48))
        return
    settle(CheckedModel(model, model, CPU, 64))
    with pytest.raises(ConfigError, match="fewer positions"):
        settle(CheckedModel(model, model, CPU, 65))


def test_embeddings_trained_in_full_are_no_table_of_positions() -> None:
    causal_lm = tiny_causal_lm(tiny_config("qwen3", max_position_embeddings=VOCABULARY))
    whole = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    inject_adapter_in_model(whole, causal_lm, "default")
    check_positions(causal_lm, VOCABULARY + 2, "model.path")
    causal_lm.model.positions = nn.Embedding(VOCABULARY, 4)
    with pytest.raises(ConfigError, match="fewer positions"):
        check_positions(causal_lm, VOCABULARY + 2, "model.path")


def test_a_rank_with_fewer_responses_makes_as_many_forwards(folder: Path) -> None:
    model = load(folder)
    model.arrange(SINGLE, own_logits=False)
    lengths: list[int] = []
    model.body.register_forward_pre_hook(
        lambda _module, _args, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    batch = pack_unkeyed(random_pairs([(3, 2, 4)]))
    alone, padded = model(batch), model(dataclasses.replace(batch, forwards=5))
    assert lengths == [4, 6, 4, 6, 2, 2, 2]
    assert torch.equal(alone, padded)


@pytest.mark.parametrize("window", [4, 4096])
def test_a_window_beside_a_full_mask_is_none_as_in_the_own_forward(window: int) -> None:
    """OLMoE names its window to kernels, and masks nothing; also one longer than sequences of the check."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    causal_lm = tiny_causal_lm(tiny_config("olmoe", sliding_window=window, **experts)).eval()
    model = settled(PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=PADDED))
    assert model.arrangement is PACKED
    pairs = random_pairs([(6, 5, 7)])
    with model.unpacked() as own, torch.no_grad():
        expected = plain_logps(own, pairs)
    with torch.no_grad():
        torch.testing.assert_close(model(pack_unkeyed(pairs)), expected, rtol=0, atol=2e-5)


class OwnRotary(torch.nn.Module):
    """Dynamic frequencies as code of models computes them: by the longest sequence, also of all forwards."""

    def __init__(self, limit: int, remembers: bool) -> None:
        super().__init__()
        self.limit, self.longest, self.remembers = limit, limit, remembers

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        length = max(self.longest, int(position_ids.max()) + 1)
        if self.remembers:
            self.longest = length
        base = 10000.0 * length / self.limit
        angles = position_ids[..., None] * base ** -torch.linspace(0, 1, 4).repeat(2)
        return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    ("longest", "remembers", "arrangement"), [(200, True, PACKED), (201, False, SINGLE), (201, True, None)]
)
def test_rotary_frequencies_of_own_code_need_forwards_of_their_own(
    longest: int, remembers: bool, arrangement: Arrangement | None
) -> None:
    """Only beyond the length at which they change, which no sequence of the check reaches."""
    causal_lm = tiny_causal_lm(with_rope(tiny_config("llama"), "dynamic", 200)).eval()
    causal_lm.model.rotary_emb = OwnRotary(200, remembers)
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=PADDED)
    if arrangement is None:
        with pytest.raises(ConfigError, match="would not compute the log-probs") as raised:
            settle(CheckedModel(model, model, CPU, 2 * longest))
        assert "single with the log-prob head: log-probs differ" in raised.value.got
        assert "single with its own logits: log-probs differ" in raised.value.got
        return
    settle(CheckedModel(model, model, CPU, longest))
    assert model.arrangement is arrangement


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_log_probs_that_are_not_finite_are_named(value: float) -> None:
    causal_lm = tiny_causal_lm(tiny_config("llama")).eval()
    causal_lm.lm_head.weight.data[7] = value
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=PADDED)
    with pytest.raises(ConfigError, match="log-probs that are not finite"):
        settled(model)


def test_forwards_without_effect_have_none_in_fp16() -> None:
    """The sum of the logits of a token passes the largest number of fp16."""
    causal_lm = tiny_causal_lm(tiny_config("llama")).half().eval()
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=SINGLE)
    model.causal_lm.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits + 60_000)
    model.arrange(SINGLE, own_logits=True)
    for head in model._heads():
        head.is_precise = False
    batch = pack_unkeyed(random_pairs([(3, 2, 4)]))
    assert torch.equal(model(dataclasses.replace(batch, forwards=5)), model(batch))
    assert model(batch).isfinite().all()


def in_16_bits(model_type: str, seed: int, **own: Any) -> PackedCausalLM:
    """A model as wide and deep as rounding needs to differ visibly between shapes of a batch."""
    causal_lm = tiny_causal_lm(
        tiny_config(
            model_type,
            hidden_size=128,
            num_hidden_layers=6,
            head_dim=32,
            vocab_size=1024,
            max_position_embeddings=512,
            **own,
        )
    )
    torch.manual_seed(seed)
    for name, parameter in causal_lm.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            is_wide = "embed" in name or "sinks" in name
            torch.nn.init.normal_(parameter, std=1.0 if is_wide else parameter.shape[-1] ** -0.5)
    return PackedCausalLM(
        causal_lm.to(torch.bfloat16).eval(), AttentionBackend.sdpa, arrangement=Arrangement.padded
    )


SINKS = {"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 64, "sliding_window": 16}
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True}
CAPPED = {"sliding_window": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 32}


@pytest.mark.parametrize(
    ("model_type", "own"), [("mistral", {"sliding_window": 16}), ("qwen3_moe", EXPERTS), ("gpt_oss", SINKS)]
)
def test_rounding_in_16_bits_is_no_fault(model_type: str, own: dict[str, Any]) -> None:
    """A token that rounding sends to another expert changes much, in the model's own forward, too."""
    assert settled(in_16_bits(model_type, 0, **own)).arrangement is PACKED


def test_rounding_by_another_attention_kernel_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where each layer rounds otherwise than the model's own attention."""
    generator, attend = torch.Generator().manual_seed(0), SegmentAttention.__call__

    def rounded(self: SegmentAttention, *inputs: Any) -> Tensor:
        attended = attend(self, *inputs)
        factors = 1 + 2**-8 * (2 * torch.rand(attended.shape, generator=generator) - 1)
        return (attended.float() * factors).to(attended.dtype)

    monkeypatch.setattr(SegmentAttention, "__call__", rounded)
    assert settled(in_16_bits("gpt_oss", 0, **SINKS)).arrangement is PACKED


def window_of(tokens: int, scores: Scores) -> Scores:
    rule = mask_rule(sliding_window_causal_mask_function(tokens), tokens, device=CPU)
    return scores if scores.rule is None else dataclasses.replace(scores, window=None, rule=rule)


@pytest.mark.parametrize(
    ("model_type", "own", "wrong"),
    [
        ("mistral", {"sliding_window": 16}, partial(window_of, 17)),
        ("mistral", {"sliding_window": 16}, partial(window_of, 15)),
        ("gpt_oss", SINKS, partial(window_of, 17)),
        ("gpt_oss", SINKS, lambda scores: dataclasses.replace(scores, sinks=None)),
        ("gemma2", CAPPED, partial(window_of, 17)),
        ("gemma2", CAPPED, lambda scores: dataclasses.replace(scores, softcap=None)),
    ],
    ids=["window+1", "window-1", "experts window+1", "no sink", "capped window+1", "no cap"],
)
def test_wrong_attention_is_found_in_16_bits(
    model_type: str, own: dict[str, Any], wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, attend = in_16_bits(model_type, 0, **own), SegmentAttention.__call__
    monkeypatch.setattr(
        SegmentAttention,
        "__call__",
        lambda self, query, key, value, scores: attend(self, query, key, value, wrong(scores)),
    )
    assert settled(model).arrangement is PADDED


@pytest.mark.parametrize(
    ("model_type", "own"), [("mistral", {"sliding_window": 16}), ("qwen3_moe", EXPERTS), ("gpt_oss", SINKS)]
)
def test_wrong_rotary_frequencies_are_found_in_16_bits(model_type: str, own: dict[str, Any]) -> None:
    model = in_16_bits(model_type, 0, **own)
    frequencies = model.causal_lm.model.rotary_emb.inv_freq
    right = frequencies.clone()

    def score(batch: PackedBatch) -> Tensor:
        frequencies.copy_(right * (1.05 if model.arrangement is PACKED else 1.0))
        logps: Tensor = model(batch)
        return logps

    settle(CheckedModel(model, score, CPU, 128))
    assert model.arrangement is PADDED


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize(
    ("model_type", "own"), [("mistral", {"sliding_window": 16}), ("qwen3_moe", EXPERTS), ("gpt_oss", SINKS)]
)
def test_a_state_that_leaks_into_the_next_response_is_found_in_16_bits(
    model_type: str, own: dict[str, Any], share: float
) -> None:
    model = in_16_bits(model_type, 0, **own)
    model.causal_lm.model.layers[1].register_forward_hook(
        lambda _module, _inputs, hidden: (
            hidden + share * torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        )
    )
    settle(CheckedModel(model, model, CPU, 128))
    assert model.arrangement is PADDED


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_of_own_code_is_found_in_training_mode(dtype: Dtype, folder: Path) -> None:
    model = settled(load(ship_code(folder, "dropout"), dtype))
    assert model.arrangement is PACKED
    with pytest.raises(ConfigError, match="others in training mode") as raised:
        check_training(settle(CheckedModel(model, model, CPU, 64)))
    assert "nats" in raised.value.got


@pytest.mark.parametrize("is_int8", [False, True])
def test_products_with_int8_weights_are_not_rounded_in_training_on_cpus(is_int8: bool, folder: Path) -> None:
    """bitsandbytes rounds their inputs to int8 in evaluation mode only, by which log-probs change."""
    model = settled(load(folder))
    weight = torch.zeros(1, dtype=torch.int8 if is_int8 else torch.float32)
    model.causal_lm.model.register_parameter("added", torch.nn.Parameter(weight, requires_grad=False))

    def score(batch: PackedBatch) -> Tensor:
        logps: Tensor = model(batch)
        return logps if model.training else 1.02 * logps - 0.02 * logps.mean()

    if is_int8:
        check_training(settle(CheckedModel(model, score, CPU, 64)))
    else:
        with pytest.raises(ConfigError, match="others in training mode"):
            check_training(settle(CheckedModel(model, score, CPU, 64)))


def test_a_model_that_fails_in_training_mode_is_refused(folder: Path) -> None:
    """Also where another rank fails and this one does not: all ranks end with the same error."""

    def check(on_training: str, elsewhere: str) -> ConfigError:
        model = settled(load(folder))

        def refuse(module: torch.nn.Module, _inputs: Any) -> None:
            if module.training and on_training:
                raise RuntimeError(on_training)

        model.causal_lm.model.layers[0].register_forward_pre_hook(refuse)

        def agree(fault: str, _seconds: float | None = None) -> str:
            return fault or elsewhere

        trial = settle(CheckedModel(model, model, CPU, 64))
        trial.checked = dataclasses.replace(trial.checked, agree=agree)
        with pytest.raises(ConfigError, match="cannot score a sequence of tokens in training mode") as raised:
            check_training(trial)
        return raised.value

    assert "labels are missing" in check("labels are missing", "").got
    assert "an error of rank 1" in check("", "an error of rank 1").got


def test_a_last_layer_with_a_forward_of_its_own_is_not_replaced() -> None:
    class Normed(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 3 * super().forward(torch.nn.functional.normalize(hidden, dim=-1))

    causal_lm = tiny_causal_lm(tiny_config("llama")).eval()
    own = causal_lm.lm_head
    causal_lm.lm_head = Normed(own.in_features, own.out_features, bias=False)
    pairs = random_pairs(SHAPES)
    with torch.no_grad():
        expected = plain_logps(causal_lm, pairs)
        model = settled(PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=PADDED))
        torch.testing.assert_close(model(pack_unkeyed(pairs)), expected, rtol=0, atol=2e-5)
    assert (model.arrangement, model.own_logits) == (PACKED, True)


def test_keys_that_stand_for_many_tokens_are_tried() -> None:
    """Shorter sequences than 128 tokens have none of DeepSeek-V4's compressed keys, and could be packed."""
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    own = {
        "layer_types": [*rates],
        "mlp_layer_types": ["moe"] * 2,
        "compress_rates": rates,
        "sliding_window": 8,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.25,
        "q_lora_rank": 8,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 8,
        "max_position_embeddings": 2048,
    }
    causal_lm = tiny_causal_lm(tiny_config("deepseek_v4", **own)).eval()
    assert sum(trial_sequences(causal_lm, 512)[0].prompt_ids.shape) > 64
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=PADDED)
    settle(CheckedModel(model, model, CPU, 512))
    assert model.arrangement is SINGLE


def test_the_error_of_ranks_that_cannot_share_tokens_names_what_is_not_packed() -> None:
    model = PackedCausalLM(
        tiny_causal_lm(tiny_config("llama")).eval(), AttentionBackend.sdpa, arrangement=PADDED
    )
    model.sequence = cast(TokenExchange, SimpleNamespace(rank=0, ranks=2))  # its all-to-all fails
    with pytest.raises(ConfigError, match="sequence parallelism needs packed attention") as raised:
        settle(CheckedModel(model, model, CPU, 64))
    assert raised.value.got.startswith("2, llama, packed with the log-prob head: ")
    assert "parallelism.sequence_parallel=1" in raised.value.remedy
