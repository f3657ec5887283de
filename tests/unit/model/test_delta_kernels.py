"""Kernels of recurrent layers are checked first; flash-linear-attention's compute a level in one call."""

import inspect
import sys
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import AttentionBackend, Dtype, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model import library_internals
from dpo_dist.model.files.load import load_packed
from dpo_dist.model.library_internals import takes_kernel
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.model.states import check_recurrent_kernels
from tests.support.flash_linear_attention import chunk_delta_rule, put_delta_kernels, put_kernel
from tests.support.packing import pack_unkeyed, plain_logps
from tests.unit.batching.test_state_tree import ODD
from tests.unit.model.test_architectures import assert_same, gradients, packed
from tests.unit.model.test_states import agents, remembering

pytestmark = pytest.mark.slow
KINDS = ("qwen3_5_text", "olmo_hybrid", "kimi_linear")
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("examples", "levels"), [(agents(), 5), (ODD, 3)])
def test_one_call_computes_a_level(
    kind: str, examples: Any, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs and the gradient of all weights are those of one response per forward by torch's own rule."""
    causal_lm, rows = remembering(kind), []

    @wraps(chunk_delta_rule)
    def kernel(q: Tensor, *inputs: Any, **options: Any) -> Any:
        rows.append((q.shape[1], options["cu_seqlens"]))
        return chunk_delta_rule(q, *inputs, **options)

    expected = plain_logps(causal_lm, examples)
    expected_gradients = gradients(causal_lm, expected)
    put_delta_kernels(monkeypatch, causal_lm, kernel)
    batch = pack_unkeyed(examples)
    logps = packed(causal_lm)(batch)
    layers = causal_lm.config.layer_types.count("linear_attention")
    assert len(rows) == levels * layers
    assert sum(tokens for tokens, _ in rows) == layers * len(batch.input_ids)
    assert len({id(lengths) for _, lengths in rows}) == levels, "layers share the lengths"
    assert (logps - expected).abs().max() < 2e-5
    assert_same(gradients(causal_lm, logps), expected_gradients, 2e-5)


def check(kind: str, dtype: torch.dtype = torch.bfloat16) -> None:
    causal_lm = PackedCausalLM(remembering(kind), AttentionBackend.sdpa).causal_lm
    check_recurrent_kernels(causal_lm, CPU, dtype)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


def without_first_states(*inputs: Any, initial_state: Any = None, **options: Any) -> Any:
    return chunk_delta_rule(*inputs, **options)


def cut(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else NoGradient.apply(tensor)  # type: ignore[no-untyped-call]


def without_their_gradient(*inputs: Any, initial_state: Any = None, **options: Any) -> Any:
    return chunk_delta_rule(*inputs, **options | {"initial_state": cut(initial_state)})


def without_lengths(*inputs: Any, cu_seqlens: Any, initial_state: Any = None, **options: Any) -> Any:
    output, last = chunk_delta_rule(*inputs, **options | {"cu_seqlens_cpu": None})
    return output, None if last is None else last.expand(len(cu_seqlens) - 1, *last.shape[1:])


def that_fails(*inputs: Any, **options: Any) -> Any:
    raise RuntimeError("no kernel image for this device")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_right_kernel_passes_the_check(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_delta_kernels(monkeypatch, remembering(kind))
    check(kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (without_first_states, "its output differs"),
        (without_their_gradient, "its gradient of the"),
        (without_lengths, "its output differs"),
        (that_fails, "no kernel image for this device"),
    ],
)
def test_a_wrong_kernel_is_refused(kind: str, fault: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_delta_kernels(monkeypatch, remembering(kind), wraps(chunk_delta_rule)(fault))
    with pytest.raises(ConfigError, match=f"(?s)flash-linear-attention fails or gives wrong results.*{said}"):
        check(kind)


def put_mamba_kernels(monkeypatch: pytest.MonkeyPatch, causal_lm: Any, fault: str) -> None:
    """Stand-ins for mamba-ssm and causal-conv1d, by the functions of torch."""
    file = sys.modules[type(causal_lm).__module__]
    scan, convolution = (
        inspect.unwrap(vars(file)[name]) for name in ("mamba2_chunk_scan", "causal_conv1d_fn")
    )

    @wraps(scan)
    def chunk_scan(*inputs: Any, initial_states: Any = None, **options: Any) -> Any:
        first = None if fault == "states" else cut(initial_states) if fault == "gradient" else initial_states
        return scan(*inputs, **options | {"initial_states": first})

    @wraps(convolution)
    def convolve(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Any:
        shifted = hidden.roll(1, 2) if fault == "context" else hidden
        return convolution(shifted, cut(weight) if fault == "weight" else weight, *rest, **options)

    names = SimpleNamespace(mamba_chunk_scan_combined=chunk_scan)
    package = SimpleNamespace(ops=SimpleNamespace(triton=SimpleNamespace(ssd_combined=names)))
    put_kernel(
        monkeypatch, causal_lm, "mamba2_chunk_scan", package, ("mamba_ssm", "mamba_chunk_scan_combined")
    )
    package = SimpleNamespace(causal_conv1d_fn=convolve)
    put_kernel(monkeypatch, causal_lm, "causal_conv1d_fn", package, ("causal_conv1d", "causal_conv1d_fn"))


@pytest.mark.parametrize("kind", ["granitemoehybrid", "nemotron_h"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_right_kernels_of_mamba_pass_the_check(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_mamba_kernels(monkeypatch, remembering(kind), "")
    check(kind, dtype)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("states", "mamba-ssm fails.*its output differs"),
        ("gradient", "mamba-ssm fails.*its gradient of the"),
        ("context", "causal-conv1d fails.*its output differs"),
        ("weight", "causal-conv1d fails.*its gradient of the weight differs"),
    ],
)
def test_wrong_kernels_of_mamba_are_refused(fault: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_mamba_kernels(monkeypatch, remembering("granitemoehybrid"), fault)
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        check("granitemoehybrid")


@pytest.mark.parametrize(("kind", "values"), [("qwen3_5_text", 1), ("qwen3_next", 3), ("olmo_hybrid", 2)])
def test_a_kernel_is_checked_with_as_many_values_a_key_as_the_model_has(
    kind: str, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal_lm = remembering(kind, linear_num_value_heads=2 * values)

    @wraps(chunk_delta_rule)
    def kernel(q: Tensor, k: Tensor, v: Tensor, *inputs: Any, **options: Any) -> Any:
        output, last = chunk_delta_rule(q, k, v, *inputs, **options)
        return output * (v.shape[2] != values * k.shape[2]), last

    put_delta_kernels(monkeypatch, causal_lm, kernel)
    with pytest.raises(ConfigError, match="its output differs"):
        check_recurrent_kernels(packed(causal_lm).causal_lm, CPU, torch.bfloat16)


def test_a_kernel_is_checked_when_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    causal_lm = remembering("qwen3_5_text")
    causal_lm.save_pretrained(tmp_path)
    put_delta_kernels(monkeypatch, causal_lm, wraps(chunk_delta_rule)(without_first_states))
    with pytest.raises(ConfigError, match="flash-linear-attention fails or gives wrong results"):
        load_packed(tmp_path, ModelConfig(dtype=Dtype.bf16), 64, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compute_neither_float32_nor_on_cpus(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs they would compute float32 in TF32; plain PyTorch's rule is taken, also for single rows."""
    causal_lm = remembering(kind)
    expected = plain_logps(causal_lm, agents())
    put_delta_kernels(monkeypatch, causal_lm, wraps(chunk_delta_rule)(that_fails))
    monkeypatch.setattr(library_internals, "takes_kernel", takes_kernel)
    model = packed(causal_lm)
    assert (model(pack_unkeyed(agents())) - expected).abs().max() < 2e-5
    model.arrange(Arrangement.single, own_logits=False)
    assert (model(pack_unkeyed(agents())) - expected).abs().max() < 2e-5
