"""A stand-in for kernels of flash-linear-attention, which need a GPU: token by token, as documented."""

import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from dpo_dist.model import library_internals, states

# The library's name of a rule, and that of torch's in a modeling file.
NAMES = {"chunk_gated_delta_rule": "torch_chunk_gated_delta_rule", "chunk_kda": "chunk_kimi_delta_attention"}


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gated_delta_rule` and `chunk_kda` of flash-linear-attention 0.6.

    q, k [B, T, H, K], v [B, T, HV, V], beta [B, T, HV], g [B, T, HV] or [B, T, HV, K]; with `cu_seqlens`
    [N + 1], one row has N sequences. States are [N, HV, K, V].
    """
    rows, tokens, heads, key_dim = q.shape
    if cu_seqlens is None:
        ends = [row * tokens for row in range(rows + 1)]
    else:
        assert rows == 1, "a batch of one row is expected with cu_seqlens"
        assert cu_seqlens.dtype == torch.int64
        assert cu_seqlens_cpu is None or torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)
        ends = cu_seqlens.tolist()
        if chunk_indices is not None:
            counts = [range(-(-(stop - start) // 64)) for start, stop in pairwise(ends)]
            assert chunk_indices.tolist() == [
                [n, chunk] for n, chunks in enumerate(counts) for chunk in chunks
            ]
        assert ends[0] == 0
        assert ends[-1] == tokens
    if initial_state is not None:
        assert initial_state.shape == (len(ends) - 1, v.shape[2], key_dim, v.shape[3])
    q, k, v, g, beta = (tensor.flatten(0, 1).float() for tensor in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (tensor * (tensor.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for tensor in (q, k))
    q, k = (tensor.repeat_interleave(v.shape[1] // heads, 1) for tensor in (q, k))
    decay = (g if g.dim() == 3 else g[..., None]).exp()[..., None]
    outputs, states = [], []
    for number, (start, stop) in enumerate(pairwise(ends)):
        assert start < stop, "a sequence is empty"
        state = (
            torch.zeros(v.shape[1], key_dim, v.shape[2]) if initial_state is None else initial_state[number]
        )
        for at in range(start, stop):
            state = state * decay[at]
            change = (v[at] - (state * k[at, ..., None]).sum(-2)) * beta[at, :, None]
            state = state + k[at, ..., None] * change[:, None]
            outputs.append((state * q[at, ..., None]).sum(-2))
        states.append(state)
    scaled = torch.stack(outputs) * (key_dim**-0.5 if scale is None else scale)
    return scaled.view(rows, tokens, *scaled.shape[1:]), torch.stack(states) if output_final_state else None


def put_delta_kernels(
    monkeypatch: pytest.MonkeyPatch, causal_lm: Any, kernel: Callable[..., Any] | None = chunk_delta_rule
) -> None:
    """Load the rules of a model's file as transformers does where the library is installed.

    `kernel` None: where its kernels cannot be imported, as without Triton.
    """
    monkeypatch.setattr(library_internals, "takes_kernel", lambda _: True)
    monkeypatch.setattr(states, "takes_kernel", lambda _: True)
    rules = SimpleNamespace(**dict.fromkeys(NAMES, kernel))
    package = SimpleNamespace(ops=SimpleNamespace(gated_delta_rule=rules, kda=rules))
    for name, in_file in NAMES.items():
        put_kernel(monkeypatch, causal_lm, in_file, package, ("fla", name))


def put_kernel(
    monkeypatch: pytest.MonkeyPatch, causal_lm: Any, in_file: str, package: Any, named: tuple[str, str]
) -> None:
    """Load a function of a model's file, if it has it, as transformers does where a package is installed.

    `named` are the names of the package, and of the function in it.
    """
    monkeypatch.setitem(sys.modules, named[0], package)
    file = sys.modules[type(causal_lm).__module__]
    if hasattr(file, in_file):
        plain = inspect.unwrap(getattr(file, in_file))
        monkeypatch.setattr(file, in_file, use_kernel_func_from_hub_with_fallback(named[1], named[0])(plain))
