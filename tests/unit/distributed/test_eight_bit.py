"""8-bit optimizer states are the published ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_dist.distributed.slices import is_eight_bit
from dpo_dist.distributed.zero import _check_lengths as check_lengths
from dpo_dist.foundation.errors import ConfigError

optim = pytest.importorskip("bitsandbytes.optim")


def trained(elements: int, steps: int = 3) -> tuple[torch.optim.Optimizer, Tensor]:
    """An optimizer after some steps of gradients of every magnitude, and its weight."""
    generator = torch.Generator().manual_seed(elements)
    weight = torch.nn.Parameter(torch.randn(elements, generator=generator))
    optimizer: torch.optim.Optimizer = optim.AdamW8bit([weight], lr=1e-2)
    magnitudes = torch.logspace(-18, 4, elements)
    for _ in range(steps):
        weight.grad = torch.randn(elements, generator=generator) * magnitudes
        weight.grad[: elements // 8] = 0.0
        optimizer.step()
    return optimizer, weight


def moments(states: dict[str, Any]) -> dict[str, Tensor]:
    """Both moments of a weight, whose last block of 256 may be shorter, in float64."""
    found = {}
    for name, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
        codes, scales = states[f"state{number}"].int(), states[f"absmax{number}"]
        products = states[f"qmap{number}"][codes] * scales.repeat_interleave(256)[: len(codes)]
        found[name] = products.double()
    return found


def published_codebook(signed: bool) -> Tensor:
    """Dynamic tree quantization (arXiv:2110.02861, section 1.3): decades, each with twice the fractions."""
    entries = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(7):
        borders = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        middles = (borders[1:] + borders[:-1]) / 2 * 10.0 ** (decade - 6)
        entries += [middles, -middles] if signed else [middles]
    return torch.cat(entries).sort().values


def rounding_errors(moment: Tensor, signed: bool) -> Tensor:
    """Distance of each element to the nearest entry times the largest magnitude of its block of 256.

    The kernel for CPUs may take a neighbour of that entry, less than 2^-15 of the largest farther away.
    """
    blocks = torch.nn.functional.pad(moment, (0, -len(moment) % 256)).view(-1, 256)
    largest = blocks.abs().amax(1, keepdim=True)
    entries = published_codebook(signed) * largest
    nearest = (blocks[:, :, None] - entries[:, None, :]).abs().amin(2)
    return (nearest + 2.0**-15 * largest).flatten()[: len(moment)]


def test_an_update_is_the_published_one() -> None:
    """Moments in float64 from the states before, rounded block by block; the weight has them unrounded."""
    rate, betas, eps, decay, elements = 1e-2, (0.9, 0.99), 1e-8, 0.1, 4096 + 77
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(elements, generator=generator))
    optimizer = optim.AdamW8bit([weight], lr=rate, betas=betas, eps=eps, weight_decay=decay)
    first = second = torch.zeros(elements, dtype=torch.float64)
    for step in range(1, 5):
        before = weight.detach().double()
        weight.grad = torch.randn(elements, generator=generator) * torch.logspace(-4, 1, elements)
        gradient = weight.grad.double()
        optimizer.step()
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient.square()
        root = (second / (1 - betas[1] ** step)).sqrt() + eps
        expected = before * (1 - rate * decay) - rate * first / (1 - betas[0] ** step) / root
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
        states = moments(optimizer.state[weight])
        for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
            allowed = rounding_errors(moment, signed=name == "exp_avg")
            assert ((states[name] - moment).abs() <= allowed * (1 + 1e-4)).all()
        first, second = states["exp_avg"], states["exp_avg_sq"]


def test_they_take_two_bytes_and_a_thirty_second_for_each_weight() -> None:
    optimizer, weight = trained(2**16, steps=1)
    states = optimizer.state[weight]
    own = sum(states[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
    assert own == 2**16 * (2 + 1 / 32)


def test_tensors_that_the_kernels_cannot_number_are_refused() -> None:
    optimizer, _ = trained(4096, steps=1)
    too_long = torch.empty(2**31, device="meta")
    assert is_eight_bit(optimizer)
    check_lengths(optimizer, [torch.empty(2**31 - 1, device="meta")])
    check_lengths(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), [too_long])
    with pytest.raises(ConfigError, match="31 bits"):
        check_lengths(optimizer, [too_long])
