"""Why master weights are float32: at usual learning rates, bf16 loses nearly every update."""

import torch


def share_changed(dtype: torch.dtype, rate: float) -> float:
    """Return the share of weights of a usual size that a step of AdamW changes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter((0.02 * torch.randn(100_000, generator=generator)).to(dtype))
    before = weight.detach().clone()
    weight.grad = torch.randn(100_000, generator=generator).to(dtype)
    torch.optim.AdamW([weight], lr=rate, weight_decay=0.0).step()
    return float((weight != before).float().mean())


def test_a_step_changes_few_weights_in_bf16_and_all_in_float32() -> None:
    assert share_changed(torch.bfloat16, 1e-6) < 0.04
    assert share_changed(torch.bfloat16, 8e-8) < 0.004
    assert share_changed(torch.float32, 1e-6) > 0.99
