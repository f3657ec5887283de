"""CUDA attention kernels equal SDPA to the precision of bf16."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.masking_utils import sliding_window_causal_mask_function

from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.prefix_tree import Segment
from dpo_dist.config.schema import AttentionBackend, Dtype, ModelConfig
from dpo_dist.model.architectures import ImageMask
from dpo_dist.model.attention.kernels import check_kernel, packed_attention
from dpo_dist.model.attention.sdpa import ImageRuns, Scores, mask_rule
from dpo_dist.model.files.load import load_packed
from dpo_dist.model.packed import PackedCausalLM
from tests.support.invented_images import image_examples, image_reader, invented_images
from tests.support.packing import pack_unkeyed, random_pairs
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda")
_SHARED_AND_OWN = [(0, 12), (7, 9), (0, 1), (1, 4), (0, 170), (130, 0), (40, 67), (64, 200), (150, 6), (0, 2)]
SEGMENTS = [Segment(row, *tokens) for row, tokens in enumerate(_SHARED_AND_OWN)]
TOKENS = sum(segment.own for segment in SEGMENTS)
_RUNS = ((2, 6),), (), (), (), ((0, 70), (71, 100)), (), ((60, 64),), (), (), ()
IMAGES = ImageRuns(_RUNS, in_windows_only=False)
KERNELS = [
    pytest.param(AttentionBackend.varlen, id="varlen"),
    pytest.param(
        AttentionBackend.flash_attention_2,
        id="flash",
        marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn"),
    ),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_key_value_heads=8),
        Qwen2Config(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4),
        MistralConfig(sliding_window=4096),
        Gemma2Config(),
        Gemma3TextConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_kernels_pass_the_check_of_a_runs_start(kernel: AttentionBackend, config: PreTrainedConfig) -> None:
    check_kernel(kernel, CUDA, config, torch.bfloat16, ImageMask.whole)


def test_sdpa_of_windows_chunks_sinks_and_caps_equals_that_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(TOKENS, count, 64, generator=generator) for count in (8, 2, 2)]
    sinks = torch.linspace(-2, 2, 8)
    found = []
    for device in (torch.device("cpu"), CUDA):
        window = mask_rule(sliding_window_causal_mask_function(40), 40, device=device)
        on_device = [tensor.to(device) for tensor in exact]
        attention = packed_attention(SEGMENTS, AttentionBackend.sdpa, device)
        with_images = packed_attention(SEGMENTS, AttentionBackend.sdpa, device, IMAGES)
        kinds = [
            Scores(rule=window),
            Scores(sinks=sinks.to(device)),
            Scores(rule=window, sinks=sinks.to(device)),
            Scores(rule=window, softcap=2.0),
        ]
        kernels = (attention, with_images)
        found.append([kernel(*on_device, scores).cpu() for kernel in kernels for scores in kinds])
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("key_heads", [2, 8])
@pytest.mark.parametrize("runs", [None, IMAGES], ids=["text", "images"])
@pytest.mark.parametrize("window", [None, 40])
def test_kernels_attend_like_sdpa(
    kernel: AttentionBackend, key_heads: int, runs: ImageRuns | None, window: int | None
) -> None:
    rule = None
    if window is not None:
        rule = mask_rule(sliding_window_causal_mask_function(window), window, device=CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    exact = [
        torch.randn(TOKENS, heads, 64, device=CUDA, generator=generator).to(torch.bfloat16).float()
        for heads in (8, key_heads, key_heads)
    ]
    slopes = torch.randn(TOKENS, 8, 64, device=CUDA, generator=generator)
    results = {}
    for backend, dtype in (
        (AttentionBackend.sdpa, torch.float32),
        (AttentionBackend.sdpa, torch.bfloat16),
        (kernel, torch.bfloat16),
    ):
        heads = [tensor.to(dtype).requires_grad_() for tensor in exact]
        attended = packed_attention(SEGMENTS, backend, CUDA, runs)(*heads, Scores(rule=rule, window=window))
        gradients = torch.autograd.grad((attended.float() * slopes).sum(), heads)
        results[backend, dtype] = [tensor.float() for tensor in (attended, *gradients)]
    truth = results[AttentionBackend.sdpa, torch.float32]
    sdpa, ours = results[AttentionBackend.sdpa, torch.bfloat16], results[kernel, torch.bfloat16]
    for expected, theirs, value in zip(truth, sdpa, ours, strict=True):
        assert (value - expected).norm() <= 2 * (theirs - expected).norm() + 1e-3 * expected.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_models_score_alike_with_every_kernel(kernel: AttentionBackend, tmp_path: Path) -> None:
    folder = write_model(tmp_path, hidden_size=256)
    batch = pack_unkeyed(random_pairs([(70, 50, 90), (1, 1, 4), (12, 3, 1)])).to(CUDA)
    logps = []
    for backend in (AttentionBackend.sdpa, kernel):
        config = ModelConfig(dtype=Dtype.bf16, attention=backend)
        model = load_packed(folder, config, 256, CUDA).to(CUDA)
        with torch.no_grad():
            logps.append(model(batch))
    assert (logps[0] - logps[1]).abs().mean() < 0.02


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["gemma3", "gemma4 vision", "qwen3_vl"])
def test_models_read_images_alike_with_every_kernel(kernel: AttentionBackend, name: str) -> None:
    batch = pack_unkeyed(image_examples(invented_images(name))).to(CUDA)
    logps = []
    for backend in (AttentionBackend.sdpa, kernel):
        model = PackedCausalLM(image_reader(name).to(CUDA, torch.bfloat16), backend, reads_images=True)
        model.arrange(Arrangement.packed, own_logits=False)
        with torch.no_grad():
            logps.append(model.eval()(batch))
    assert (logps[0] - logps[1]).abs().mean() < 0.02
