"""Experts are multiplied at once where PyTorch's kernel is right, else in a loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.model.files.load import load_packed
from dpo_dist.model.packed import packed_logps
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.packing import random_pairs

pytestmark = pytest.mark.slow

PAIRS = random_pairs([(9, 4, 5), (3, 6, 2)])
grouped_mm = torch.nn.functional.grouped_mm


def loaded(folder: Path, family: str, dtype: Dtype = Dtype.fp32) -> Any:
    if not (folder / "config.json").is_file():
        tiny_causal_lm(tiny_config(family)).save_pretrained(folder)
    config = ModelConfig(str(folder), dtype=dtype)
    return load_packed(folder, config, max_length=64, device=torch.device("cpu"))


def logps(packed: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat(packed_logps(packed, PAIRS, 64))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_all_experts_of_a_layer_are_multiplied_at_once(
    family: str, dtype: Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = loaded(tmp_path, family, dtype)
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    logps(packed)
    mixtures = [name for name, _ in packed.named_parameters() if name.endswith("experts.down_proj")]
    assert len(calls) == 2 * len(mixtures) > 0


def without_gradient_of_weights(hidden: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
    return grouped_mm(hidden, weight.detach() + 0 * weight, offs=offs)


def with_an_empty_group_dropped(hidden: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
    return grouped_mm(hidden, weight.roll(1, 0), offs=offs)


def unaligned(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("strides should be multiple of 16 bytes")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("wrong", [without_gradient_of_weights, with_an_empty_group_dropped, unaligned])
def test_a_wrong_kernel_is_not_taken(
    family: str,
    wrong: Callable[..., Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = logps(loaded(tmp_path, family))
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", wrong)
    torch.testing.assert_close(logps(loaded(tmp_path, family)), right)
    assert "experts are computed in a loop" in caplog.text
