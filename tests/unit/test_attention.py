"""Packed attention is one causal attention per response: each sees its prompt and itself, nothing else."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.errors import ConfigError
from dpo_dist.model.attention import Layout, choose_backend, packed_attention, verify_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS, KEY_HEADS, DIM = 4, 2, 8

# Prompt of at least one token; responses without their last token, so that nothing may be left of them.
layouts: st.SearchStrategy[Layout] = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=3)).map(
        lambda pair: (pair[0], *pair[1])
    ),
    min_size=1,
    max_size=4,
).map(tuple)


def visible(layout: Layout) -> Tensor:
    """Which token (row) may see which (column), token by token from the definition."""
    tokens = [
        (pair, piece, place)
        for pair, (prompt, *responses) in enumerate(layout)
        for piece, length in enumerate((prompt, *responses))
        for place in range(length)
    ]

    def sees(token: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
        same_piece = token[:2] == other[:2] and token[2] >= other[2]
        own_prompt = token[0] == other[0] and token[1] > 0 and other[1] == 0
        return same_piece or own_prompt

    return torch.tensor([[sees(token, other) for other in tokens] for token in tokens])


def random_heads(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    tokens = sum(map(sum, layout))
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, HEADS, DIM), (tokens, KEY_HEADS, DIM), (tokens, KEY_HEADS, DIM))
    query, key, value = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return query, key, value


def masked_attention(heads: tuple[Tensor, Tensor, Tensor], mask: Tensor, scale: float | None) -> Tensor:
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in heads)
    attended = scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1)


def segment_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    max_query: int,
    max_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What a variable-length kernel computes: causal in each segment, aligned to the bottom right."""
    assert window_size == (-1, 0)
    assert enable_gqa
    assert cu_query.dtype == cu_key.dtype == torch.int32
    query_bounds, key_bounds = (list(pairwise(bounds.tolist())) for bounds in (cu_query, cu_key))
    assert max_query == max(stop - start for start, stop in query_bounds)
    assert max_key == max(stop - start for start, stop in key_bounds)
    assert query_bounds[-1][1] == len(query)
    assert key_bounds[-1][1] == len(key)
    outputs = []
    for (start, stop), (key_start, key_stop) in zip(query_bounds, key_bounds, strict=True):
        queries, keys = stop - start, key_stop - key_start
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        part = (query[start:stop], key[key_start:key_stop], value[key_start:key_stop])
        outputs.append(masked_attention(part, mask, scale))
    return torch.cat(outputs)


@pytest.fixture(autouse=True)
def kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel needs CUDA; what it is asked for can be tried anywhere."""
    varlen: Any = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", segment_by_segment)


@pytest.mark.parametrize("backend", [AttentionBackend.sdpa, AttentionBackend.varlen])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_by_hand_sized_layouts(backend: AttentionBackend, scale: float | None) -> None:
    check(((3, 2, 4), (1, 0, 2), (2, 3, 0), (4, 1, 2, 3), (2, 0, 0)), backend, scale)


@given(layouts, st.sampled_from([AttentionBackend.sdpa, AttentionBackend.varlen]))
def test_attention_is_causal_attention_of_each_response(layout: Layout, backend: AttentionBackend) -> None:
    check(layout, backend, None)


def check(layout: Layout, backend: AttentionBackend, scale: float | None) -> None:
    heads = random_heads(layout)
    attended = packed_attention(layout, backend, CPU)(*heads, scale)
    expected = masked_attention(heads, visible(layout), scale)
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)
    slopes = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients, expected_gradients = (
        torch.autograd.grad((output * slopes).sum(), heads) for output in (attended, expected)
    )
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_auto_means_a_backend_that_runs_there() -> None:
    assert choose_backend(AttentionBackend.auto, Dtype.bf16, CPU) is AttentionBackend.sdpa
    assert choose_backend(AttentionBackend.sdpa, Dtype.bf16, CUDA) is AttentionBackend.sdpa
    assert choose_backend(AttentionBackend.auto, Dtype.fp32, CUDA) is AttentionBackend.sdpa
    assert choose_backend(AttentionBackend.auto, Dtype.bf16, CUDA) in (
        AttentionBackend.flash_attention_2,
        AttentionBackend.varlen,
    )


@pytest.mark.parametrize("wanted", [AttentionBackend.varlen, AttentionBackend.flash_attention_2])
def test_a_cuda_kernel_on_a_cpu_is_an_error(wanted: AttentionBackend) -> None:
    with pytest.raises(ConfigError, match="CUDA only"):
        choose_backend(wanted, Dtype.bf16, CPU)


def test_a_kernel_that_attends_otherwise_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_kernel(AttentionBackend.varlen, CPU)

    def misaligned(query: Tensor, key: Tensor, value: Tensor, *lengths: Any, **options: Any) -> Tensor:
        options["scale"] = None
        right = segment_by_segment(query, key, value, *lengths, **options)
        return torch.cat((right[1:], right[:1]))

    varlen: Any = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", misaligned)
    with pytest.raises(ConfigError, match="does not compute packed attention"):
        verify_kernel(AttentionBackend.varlen, CPU)
