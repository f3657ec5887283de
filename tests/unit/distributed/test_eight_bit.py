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
from dpo_dist.errors import ConfigError

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
def test_float32_states_become_the_same_states_again(elements: int) -> None:
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
