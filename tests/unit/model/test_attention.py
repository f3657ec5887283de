"""Attention over packed pairs equals its definition, by each kernel, which is checked before a run."""

import importlib.metadata
import itertools
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config, Gemma2Config, LlamaConfig, MistralConfig
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from dpo_dist.batching.prefix_tree import Segment
from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.architectures import ImageMask
from dpo_dist.model.attention.kernels import (
    check_kernel,
    choose_backend,
    computed_by_segment,
    packed_attention,
)
from dpo_dist.model.attention.sdpa import ImageRuns, MaskRule, Scores, mask_rule, with_one_dim
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.kernels import (
    flash_attn_varlen_func,
    masked_attention,
    put_kernels,
    varlen_attn_of_groups,
)

pytestmark = pytest.mark.slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 40, "hidden_size": 240}
LOW_RANK = {"num_attention_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
TEXTS = {
    "grouped": LlamaConfig(**GROUPED),
    "low rank": DeepseekV3Config(**LOW_RANK),
    "windowed": MistralConfig(**GROUPED, sliding_window=4096),
    "capped": Gemma2Config(**GROUPED, attn_logit_softcapping=0.5),
}
EPS = torch.finfo(torch.bfloat16).eps
KERNELS = [
    AttentionBackend.varlen,
    AttentionBackend.flash_attention_2,
    AttentionBackend.flash_attention_3,
]


@pytest.fixture(autouse=True)
def ampere_with_kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_of(monkeypatch, (8, 0))
    put_kernels(monkeypatch)


def gpu_of(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")


def test_a_device_without_the_kernels_uses_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(AttentionBackend.auto, Dtype.bf16, CPU) is AttentionBackend.sdpa
    assert choose_backend(AttentionBackend.sdpa, Dtype.bf16, CUDA) is AttentionBackend.sdpa
    assert choose_backend(AttentionBackend.auto, Dtype.fp32, CUDA) is AttentionBackend.sdpa
    gpu_of(monkeypatch, (7, 5))
    assert choose_backend(AttentionBackend.auto, Dtype.bf16, CUDA) is AttentionBackend.sdpa
    for device, name in ((CUDA, "Tesla T4"), (CPU, "cpu")):
        with pytest.raises(ConfigError, match="only on CUDA, on Ampere") as raised:
            choose_backend(AttentionBackend.varlen, Dtype.bf16, device)
        assert name in raised.value.got


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_correct_kernel_passes(
    backend: AttentionBackend, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_kernels(monkeypatch)
    check_kernel(backend, CPU, TEXTS[text], torch.bfloat16, ImageMask.whole)


def wrong_backward(query: Tensor, key: Tensor, value: Tensor, *lengths: Any, **options: Any) -> Tensor:
    halved = key.clone()
    halved.register_hook(lambda gradient: gradient / 2)  # type: ignore[no-untyped-call]
    return varlen_attn_of_groups(query, halved, value, *lengths, **options)


def fails_for_large_heads(query: Tensor, *args: Any, **options: Any) -> Tensor:
    if query.shape[-1] > 32:
        raise RuntimeError("head_dim should be at most 32\nat kernel.cu:1")
    return varlen_attn_of_groups(query, *args, **options)


def ignores_the_window(*args: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
    return varlen_attn_of_groups(*args, window_size=(-1, window_size[1]), **options)


def is_always_causal(*args: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
    return varlen_attn_of_groups(*args, window_size=(window_size[0], 0), **options)


def ignores_the_cap(*args: Any, softcap: float, **options: Any) -> Tensor:
    return flash_attn_varlen_func(*args, softcap=0.0, **options)


@pytest.mark.parametrize(
    ("kernel", "text", "message"),
    [
        (wrong_backward, "grouped", "its gradient of the key differs"),
        (fails_for_large_heads, "grouped", "value_dim=40), window None, cap None: RuntimeError: head_dim"),
        (ignores_the_window, "windowed", "window 6, cap None: its output differs"),
        (ignores_the_cap, "capped", "window None, cap 0.5: its output differs"),
        (is_always_causal, "grouped", "window None, cap None, images: its output differs"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_refused_before_training(
    kernel: Any, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_kernels(monkeypatch, wraps(varlen_attn_of_groups)(kernel), wraps(flash_attn_varlen_func)(kernel))
    with torch.no_grad(), pytest.raises(ConfigError) as raised:
        check_kernel(KERNELS[text == "capped"], CPU, TEXTS[text], torch.bfloat16, ImageMask.in_windows)
    assert message in raised.value.got
    assert "model.attention=sdpa" in raised.value.remedy


def test_memory_that_somebody_else_has_is_no_fault_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    put_kernels(monkeypatch, Mock(side_effect=torch.OutOfMemoryError("Tried to allocate 3 GiB")))
    with pytest.raises(torch.OutOfMemoryError):
        check_kernel(AttentionBackend.varlen, CPU, TEXTS["grouped"], torch.bfloat16)


@pytest.mark.parametrize("installed", [{}, {"flash-attn-4": "4.0"}, {"flash-attn": "2.8"}])
def test_flash_attn_2_is_told_from_its_successor_with_the_same_module(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    wanted = AttentionBackend.flash_attention_2
    if "flash-attn" in installed:
        assert choose_backend(AttentionBackend.auto, Dtype.bf16, CUDA) is wanted
        assert choose_backend(wanted, Dtype.bf16, CUDA) is wanted
        return
    assert choose_backend(AttentionBackend.auto, Dtype.bf16, CUDA) is AttentionBackend.varlen
    with pytest.raises(ConfigError, match="flash-attn is not installed"):
        choose_backend(wanted, Dtype.bf16, CUDA)


def test_flash_attn_3_is_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "3.0")
    for capability, chosen in (((9, 0), "flash_attention_3"), ((10, 0), "flash_attention_2")):
        gpu_of(monkeypatch, capability)
        assert choose_backend(AttentionBackend.auto, Dtype.bf16, CUDA).value == chosen


@pytest.mark.parametrize(
    ("model_type", "backend", "longest", "reason"),
    [
        ("gpt_oss", AttentionBackend.flash_attention_2, 100, "attention sinks"),
        ("gemma2", AttentionBackend.varlen, 100, "capped scores"),
        ("gemma2", AttentionBackend.flash_attention_2, 100, ""),
        ("llama4_text", AttentionBackend.varlen, 10_000, "chunks"),
        ("llama4_text", AttentionBackend.varlen, 100, ""),  # shorter than a chunk of 8,192
        ("mistral", AttentionBackend.varlen, 100, ""),
        ("gpt_oss", AttentionBackend.sdpa, 100, ""),
    ],
)
def test_layers_that_a_kernel_lacks_are_named(
    model_type: str, backend: AttentionBackend, longest: int, reason: str
) -> None:
    assert computed_by_segment(tiny_causal_lm(tiny_config(model_type)), backend, longest) == reason


HEADS, KEY_HEADS, DIM = 4, 2, 8
SEGMENTS = [
    Segment(n, *tokens) for n, tokens in enumerate([(0, 12), (9, 12), (15, 1), (0, 21), (1, 0), (0, 19)])
]
Sees = Callable[[int, int], bool]
"""Whether a query at one position sees a key at another, both in one response with its prompt."""


@st.composite
def forests(draw: st.DrawFn) -> list[Segment]:
    """Segments of rows of any length, each beginning like any part of the one before."""
    found: list[Segment] = []
    for row in range(draw(st.integers(1, 7))):
        shared = draw(st.integers(0, found[-1].shared + found[-1].own)) if found else 0
        found.append(Segment(row, shared, draw(st.integers(0 if shared else 1, 12))))
    return found


def rows_of(segments: Sequence[Segment]) -> list[list[int]]:
    """The indices of each row in the packed sequence, token by token."""
    rows: list[list[int]] = []
    for _, shared, own in segments:
        start = sum(segment.own for segment in segments[: len(rows)])
        rows.append([*(rows[-1][:shared] if rows else ()), *range(start, start + own)])
    return rows


def window(size: int) -> tuple[MaskRule | None, Sees]:
    rule = mask_rule(sliding_window_causal_mask_function(size), local_size=size)
    return rule, lambda query, key: query - size < key <= query


def chunks(size: int) -> tuple[MaskRule | None, Sees]:
    start = torch.zeros(1, dtype=torch.int64)
    rule = mask_rule(chunked_causal_mask_function(size, start), local_size=size)
    return rule, lambda query, key: key <= query and key // size == query // size


def of_its_own(size: int) -> tuple[MaskRule | None, Sees]:
    """Return a rule of a model's own: a window and the first keys, of one pair of positions at a time."""

    def first_keys(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < 2) & (key <= query)

    rule = mask_rule(
        or_masks(sliding_window_causal_mask_function(size), first_keys),
        local_size=size,
        allow_is_causal_skip=False,
        use_vmap=True,
    )
    return rule, lambda query, key: key <= query and (key < 2 or key > query - size)


def causal(_size: int) -> tuple[MaskRule | None, Sees]:
    return mask_rule(causal_mask_function), lambda query, key: key <= query


RULES = [window, chunks, of_its_own, causal]


def visible(segments: Sequence[Segment], sees: Sees, runs: ImageRuns | None = None) -> Tensor:
    """Return the mask of attending tokens (rows) and attended tokens (columns), by the definition.

    A token of an image sees later tokens of that image, and what it sees before itself as any other token.
    """
    tokens = sum(segment.own for segment in segments)
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for number, (segment, row) in enumerate(zip(segments, rows_of(segments), strict=True)):
        places = () if runs is None else runs.places[number]
        images = [range(segment.shared + start, segment.shared + stop) for start, stop in places]
        for query, key in itertools.product(range(segment.shared, len(row)), range(len(row))):
            in_image = any(query in image and key in image for image in images)
            mask[row[query], row[key]] = sees(query, key) or (query < key and in_image)
    return mask


def random_heads(
    segments: Sequence[Segment], value_dim: int = DIM, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = sum(segment.own for segment in segments)
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, HEADS, DIM), (tokens, KEY_HEADS, DIM), (tokens, KEY_HEADS, value_dim))
    query, key, value = (2 * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def check(
    segments: Sequence[Segment],
    sees: Sees,
    scores: Scores,
    backend: AttentionBackend,
    value_dim: int = DIM,
    dtype: torch.dtype = torch.float32,
    runs: ImageRuns | None = None,
) -> None:
    tolerance = 1e-5 if dtype is torch.float32 else 1e-13
    heads = random_heads(segments, value_dim, dtype)
    inputs = heads if scores.sinks is None else (*heads, scores.sinks)
    attended = packed_attention(segments, backend, CPU, runs)(*heads, scores)
    seen = visible(segments, sees, runs if runs is not None and any(runs.of_layer(scores)) else None)
    expected = masked_attention(heads, seen, scores.scale, scores.softcap, scores.sinks)
    torch.testing.assert_close(attended, expected, rtol=tolerance, atol=tolerance)
    assert attended.is_contiguous()  # models join heads by a view
    slopes = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    gradients, expected_gradients = (
        torch.autograd.grad((output * slopes).sum(), inputs) for output in (attended, expected)
    )
    # A query that sees one key has no gradient but rounding: its own norm is no measure.
    largest = max(gradient.norm() for gradient in expected_gradients)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours - theirs).norm() <= tolerance * max(theirs.norm(), 0.1 * largest)


@given(
    forests(),
    st.sampled_from(RULES),
    st.integers(1, 26),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.sampled_from([None, 0.5]),
    st.sampled_from([DIM, 5, 16]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_scores_equal_their_definition(
    segments: Sequence[Segment],
    rule_of: Callable[[int], tuple[MaskRule | None, Sees]],
    size: int,
    softcap: float | None,
    has_sinks: bool,
    scale: float | None,
    value_dim: int,
    is_named: bool,
    dtype: torch.dtype,
) -> None:
    rule, sees = rule_of(size)
    sinks = None
    if has_sinks and softcap is None:
        sinks = torch.linspace(-2, 2, HEADS, dtype=dtype, requires_grad=True)
    named = size if is_named and rule_of is window else None
    scores = Scores(scale, rule, named, softcap, sinks)
    check(segments, sees, scores, AttentionBackend.sdpa, value_dim, dtype)


@given(forests(), st.sampled_from(KERNELS), st.integers(1, 26), st.booleans())
def test_kernels_are_called_with_the_window(
    segments: Sequence[Segment], backend: AttentionBackend, size: int, is_windowed: bool
) -> None:
    rule, sees = window(size) if is_windowed else causal(size)
    check(segments, sees, Scores(0.5, rule, size if is_windowed else None), backend)


@st.composite
def forests_with_images(draw: st.DrawFn) -> tuple[list[Segment], tuple[tuple[tuple[int, int], ...], ...]]:
    """Forests, and in each segment up to two runs of image tokens that do not touch."""
    segments = draw(forests())
    places = []
    for segment in segments:
        ends = draw(st.lists(st.integers(0, segment.own), max_size=4, unique=True).map(sorted))
        places.append(tuple(zip(ends[::2], ends[1::2], strict=False)))
    return segments, tuple(places)


@given(
    forests_with_images(),
    st.sampled_from([AttentionBackend.sdpa, *KERNELS]),
    st.integers(1, 26),
    st.booleans(),
    st.booleans(),
)
def test_tokens_of_an_image_see_each_other(
    forest: tuple[list[Segment], tuple[tuple[tuple[int, int], ...], ...]],
    backend: AttentionBackend,
    size: int,
    is_windowed: bool,
    in_windows_only: bool,
) -> None:
    segments, places = forest
    rule, sees = window(size) if is_windowed else causal(size)
    scores = Scores(0.5, rule, size if is_windowed else None)
    check(segments, sees, scores, backend, runs=ImageRuns(places, in_windows_only))


def test_only_heads_that_need_zeros_are_copied() -> None:
    query, key, value = torch.ones(3, 4, 16), torch.ones(3, 2, 16), torch.ones(3, 2, 12)
    same_query, same_key, padded = with_one_dim(query, key, value, 8)
    assert same_query is query
    assert same_key is key
    assert padded.tolist() == torch.nn.functional.pad(value, (0, 4)).tolist()


@pytest.mark.parametrize("backend", KERNELS)
def test_what_a_kernel_lacks_runs_on_sdpa(backend: AttentionBackend) -> None:
    sinks = torch.linspace(-2, 2, HEADS, requires_grad=True)
    (chunk_rule, in_chunk), (window_rule, in_window) = chunks(5), window(5)
    own_rule, in_own = of_its_own(5)
    everywhere = causal(0)[1]
    check(SEGMENTS, in_window, Scores(rule=window_rule, window=5, sinks=sinks), backend)
    check(SEGMENTS, in_chunk, Scores(rule=chunk_rule), backend)
    check(SEGMENTS, in_own, Scores(rule=own_rule, window=100), backend)
    check(SEGMENTS, everywhere, Scores(softcap=2.0), backend)
    check(SEGMENTS, everywhere, Scores(), backend, value_dim=264)


@pytest.mark.parametrize(("softcap", "allowed"), [(5.0, 0.6 * EPS), (None, 0.35 * EPS)])
def test_gradients_of_short_segments_in_bf16_are_rounded_once(softcap: float | None, allowed: float) -> None:
    segments, scores = [Segment(0, 0, 170), Segment(1, 120, 30)], Scores(scale=0.5, softcap=softcap)
    heads = [tensor.detach().div(2).bfloat16() for tensor in random_heads(segments)]
    slopes = torch.randn(heads[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        own = [tensor.detach().to(dtype).requires_grad_() for tensor in heads]
        attended = packed_attention(segments, AttentionBackend.sdpa, CPU)(*own, scores)
        found.append(torch.autograd.grad(attended, own, slopes.to(dtype)))
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).abs().mean() <= allowed * exact.abs().mean()


def test_a_mask_has_the_type_of_the_layer_that_asks() -> None:
    rule = MaskRule(causal_mask_function, reach=None, by_element=True, device=torch.device("cpu"))
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        assert rule.mask(2, 3, dtype).dtype is dtype
