"""8-bit optimizer states become float32 and the same 8-bit states again."""

import pytest
import torch
from torch import Tensor

from dpo_dist.distributed.eight_bit import (
    check_lengths,
    create_states,
    from_float32,
    is_eight_bit,
    to_float32,
)
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


@pytest.mark.parametrize("elements", [4095, 4096, 2**18 + 77])
def test_float32_states_become_the_same_states_again(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_dist.distributed.eight_bit._CHUNK", 2**17)  # of several chunks, the last short
    optimizer, weight = trained(elements)
    moments = to_float32(optimizer.state[weight])
    assert {moment.dtype for moment in moments.values()} == {torch.float32}

    copy = torch.nn.Parameter(weight.detach().clone())
    other = optim.AdamW8bit([copy], lr=1e-2)
    create_states(other, copy, step=3)
    from_float32(moments, other.state[copy])
    again = to_float32(other.state[copy])
    assert all(torch.equal(again[name], moments[name]) for name in moments)
    assert (other.state[copy]["state1"].dtype is torch.uint8) == (elements >= 4096)

    for _ in range(2):  # and training goes on as if nothing had happened
        weight.grad = torch.full_like(weight, 0.1)
        copy.grad = weight.grad.clone()
        optimizer.step()
        other.step()
        assert torch.equal(weight, copy)
        after, after_copy = to_float32(optimizer.state[weight]), to_float32(other.state[copy])
        assert all(torch.equal(after[name], after_copy[name]) for name in after)


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
        states = {name: moment.double() for name, moment in to_float32(optimizer.state[weight]).items()}
        for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
            allowed = rounding_errors(moment, signed=name == "exp_avg")
            assert ((states[name] - moment).abs() <= allowed * (1 + 1e-4)).all()
        first, second = states["exp_avg"], states["exp_avg_sq"]


def test_they_take_two_bytes_and_a_thirty_second_for_each_weight() -> None:
    optimizer, weight = trained(2**16, steps=1)
    states = optimizer.state[weight]
    own = sum(states[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
    assert own == 2**16 * (2 + 1 / 32)


def test_states_of_other_blocks_are_rounded_to_the_nearest() -> None:
    optimizer, weight = trained(2**14)
    moments = {name: moment[100:] for name, moment in to_float32(optimizer.state[weight]).items()}
    rest = torch.nn.Parameter(weight.detach()[100:].clone())
    other = optim.AdamW8bit([rest], lr=1e-2)
    create_states(other, rest, step=3)
    from_float32(moments, other.state[rest])
    for name, moment in to_float32(other.state[rest]).items():
        blocks = torch.nn.functional.pad(moments[name] - moment, (0, 100)).view(-1, 256)
        largest = torch.nn.functional.pad(moments[name], (0, 100)).view(-1, 256).abs().amax(1)
        assert (blocks.abs().amax(1) <= 0.04 * largest).all()


def test_tensors_that_the_kernels_cannot_number_are_refused() -> None:
    optimizer, _ = trained(4096, steps=1)
    too_long = torch.empty(2**31, device="meta")
    assert is_eight_bit(optimizer)
    check_lengths(optimizer, [torch.empty(2**31 - 1, device="meta")])
    check_lengths(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), [too_long])
    with pytest.raises(ConfigError, match="31 bits"):
        check_lengths(optimizer, [too_long])
