"""Packed attention equals one causal attention per response over its prompt and itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.model.attention import packed_attention
from dpo_dist.model.sdpa import Layout, Scores
from tests.support.kernels import (
    flash_attn_varlen_func,
    masked_attention,
    put_kernels,
    varlen_of_torch_2_11,
    varlen_of_torch_2_13,
)

CPU = torch.device("cpu")
HEADS, KEY_HEADS, DIM = 4, 2, 8
BACKENDS = [AttentionBackend.sdpa, AttentionBackend.varlen, AttentionBackend.flash_attention_2]

# Prompt of at least one token; responses without their last token, so that nothing may be left of them.
layouts: st.SearchStrategy[Layout] = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=3)).map(
        lambda pair: (pair[0], *pair[1])
    ),
    min_size=1,
    max_size=4,
).map(tuple)


def visible(layout: Layout) -> Tensor:
    """Return the mask of attending tokens (rows) and attended tokens (columns), by the definition."""
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


@pytest.fixture(autouse=True)
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels need CUDA; what they are asked for can be tried anywhere."""
    put_kernels(monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_of_small_layouts(backend: AttentionBackend, scale: float | None) -> None:
    check(((3, 2, 4), (1, 0, 2), (2, 3, 0), (4, 1, 2, 3), (2, 0, 0)), backend, scale)


@given(layouts, st.sampled_from(BACKENDS))
def test_attention_equals_causal_attention_of_each_response(
    layout: Layout, backend: AttentionBackend
) -> None:
    check(layout, backend, None)


def test_varlen_is_called_with_the_keywords_of_each_torch_version(monkeypatch: pytest.MonkeyPatch) -> None:
    put_kernels(monkeypatch, varlen_of_torch_2_11)
    check(((3, 2, 4), (1, 0, 2)), AttentionBackend.varlen, 0.5)


@pytest.mark.parametrize(("earlier", "seen"), [(-1, ["11110", "11111"]), (2, ["01110", "00111"])])
def test_the_kernels_of_tests_see_what_the_documentation_of_flash_attn_shows(
    earlier: int, seen: list[str]
) -> None:
    """Equal scores: the output is the mean of the visible keys' values, of which each is a unit vector."""
    query, key = torch.zeros(2, 1, 8), torch.zeros(5, 1, 8)
    value = torch.eye(8)[:5, None]
    bounds = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    flash = flash_attn_varlen_func(
        query, key, value, *bounds, 2, 5, causal=True, window_size=(earlier, -1 if earlier < 0 else 0)
    )
    varlen = varlen_of_torch_2_13(query, key, value, *bounds, 2, 5, window_size=(earlier, 0))
    for output in (flash, varlen):
        rows = ["".join(str(int(weight > 0)) for weight in row) for row in output[:, 0, :5]]
        assert rows == seen


def check(layout: Layout, backend: AttentionBackend, scale: float | None) -> None:
    heads = random_heads(layout)
    attended = packed_attention(layout, backend, CPU)(*heads, Scores(scale))
    expected = masked_attention(heads, visible(layout), scale)
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)
    slopes = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients, expected_gradients = (
        torch.autograd.grad((output * slopes).sum(), heads) for output in (attended, expected)
    )
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
