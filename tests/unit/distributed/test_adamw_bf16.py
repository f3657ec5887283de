"""AdamW in bf16: its chance, its arithmetic, and that no shard changes either."""

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpo_dist.distributed import adamw_bf16
from dpo_dist.distributed.adamw_bf16 import (
    FIRST,
    SECOND,
    STEP,
    AdamWBF16,
    keys_of,
    random_bits,
    round_by_chance,
    rounded,
)

COUNT = 2**18
ELEMENTS = torch.arange(COUNT, dtype=torch.int32)
LIMIT = 5.0  # standard errors; seeds are fixed, so that a test passes always or never


def bits_of(use: str, step: int = 1, name: str = "w", piece: int = 0, seed: int = 0) -> Tensor:
    """The 16 bits that round a weight, its first or its second moment."""
    keys = keys_of(seed, str(step), name, piece)
    if use == "second":
        return random_bits(ELEMENTS, keys.of_second) & 0xFFFF
    both = random_bits(ELEMENTS, keys.of_weight)
    return both & 0xFFFF if use == "weight" else (both >> 16) & 0xFFFF


@pytest.mark.parametrize("use", ["weight", "first", "second"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_chances_are_uniform_and_elements_are_independent(use: str, step: int) -> None:
    bits = bits_of(use, step)
    errors = []
    for byte in (bits & 0xFF, bits >> 8):
        counts = torch.bincount(byte, minlength=256).double()
        chi = ((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum()
        errors.append((chi - 255) / math.sqrt(2 * 255))
    for place in range(16):
        share = ((bits >> place) & 1).double().mean()
        errors.append((share - 0.5) * 2 * math.sqrt(COUNT))
    values = bits.double() / 2**16 - 0.5
    for lag in (1, 2, 3, 64, 896, 4096):
        errors.append((values[:-lag] * values[lag:]).mean() * 12 * math.sqrt(COUNT - lag))
    assert max(map(abs, map(float, errors))) < LIMIT, errors


@pytest.mark.parametrize(
    "other",
    [
        {"use": "first"},
        {"use": "second"},
        {"step": 2},
        {"step": 11},
        {"name": "v"},
        {"piece": 1},
        {"seed": 1},
    ],
    ids=str,
)
def test_chances_of_two_uses_steps_tensors_pieces_and_seeds_are_independent(other: dict[str, Any]) -> None:
    one = bits_of("weight").double() / 2**16 - 0.5
    two = bits_of(**{"use": "weight", **other}).double() / 2**16 - 0.5
    for lag in (0, 1):
        error = (one[lag:] * two[: COUNT - lag]).mean() * 12 * math.sqrt(COUNT)
        assert abs(float(error)) < LIMIT


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 0.02, 1.0, 300.0])
def test_rounding_is_right_in_the_mean_and_takes_a_neighbour(scale: float) -> None:
    exact = torch.randn(COUNT, generator=torch.Generator().manual_seed(3)) * scale
    found = rounded(exact, bits_of("weight")).float()
    error = (found.double() - exact.double()) / exact.double().abs()
    assert abs(float(error.mean() / error.std()) * math.sqrt(COUNT)) < LIMIT
    assert float(error.abs().max()) < 2**-7
    assert 0.4 < float((error > 0).double().mean()) < 0.6


def test_rounding_near_a_power_of_two_and_of_what_bf16_holds() -> None:
    exact = torch.full((COUNT,), 1.0 - 2.0**-12)
    found = rounded(exact, bits_of("weight")).double()
    assert {*found.unique().tolist()} == {1 - 2.0**-8, 1.0}
    assert float((found == 1.0).double().mean()) == pytest.approx(15 / 16, abs=0.003)
    held = torch.tensor([0.0, -0.0, 1.0, -0.375, math.inf, -math.inf])
    most = torch.full_like(held, 0xFFFF, dtype=torch.int32)
    assert rounded(held, most).tolist() == held.tolist()
    assert rounded(torch.tensor([math.nan]), most[:1]).isnan().all()


def test_a_range_of_a_weight_is_rounded_as_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_bf16, "_PIECE", 64)
    exact = torch.randn(10, 30, generator=torch.Generator().manual_seed(0))
    whole = round_by_chance(exact, 5, "save", "w")
    assert whole.shape == exact.shape
    assert torch.equal(whole.view(-1)[77:201], round_by_chance(exact.view(-1)[77:201], 5, "save", "w", 77))
    assert not torch.equal(whole, round_by_chance(exact, 6, "save", "w"))
    assert not torch.equal(whole[0], whole[0].new_tensor(exact[0].tolist()))


def mixed(bits: np.ndarray) -> np.ndarray:
    bits = bits ^ (bits >> np.uint32(16))
    bits = bits * np.uint32(0x85EBCA6B)
    bits = bits ^ (bits >> np.uint32(13))
    bits = bits * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> np.uint32(16))


def chance(step: int, name: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chances from 0 to 1 of a weight, its first and second moment, by unsigned numbers."""
    digest = hashlib.blake2b(f"{seed} {step} 0 {name}".encode(), digest_size=16).digest()
    keys = np.frombuffer(digest, "<u4")
    numbers = np.arange(count, dtype=np.uint32)
    both, second = (mixed(mixed(numbers ^ keys[i]) + keys[i + 1]) for i in (0, 2))
    return (both & 0xFFFF) / 2**16, (both >> np.uint32(16)) / 2**16, (second & 0xFFFF) / 2**16


def by_chance(exact: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Float64 values on the grid of bf16: 8 bits of each."""
    _, exponents = np.frexp(exact)
    unit = np.ldexp(1.0, exponents - 8)
    size = np.abs(exact) / unit
    up = (size - np.floor(size)) + chances >= 1
    return np.copysign((np.floor(size) + up) * unit, exact)


class Alone:
    """The optimizer on one whole weight named "w", without DeepSpeed."""

    def __init__(
        self,
        start: Tensor,
        cuts: Sequence[int] = (),
        *,
        lr: float,
        decay: float = 0.0,
        seed: int = 0,
        compiles: bool = False,
    ):
        weight = nn.Parameter(start)
        bounds = [0, *cuts, start.numel()]
        self.flats = []
        ranges = {}
        for first, end in pairwise(bounds):
            # Padding before and behind the part, which must stay what it is.
            flat = start.new_full((end - first + 5,), 7.0)
            flat[2 : 2 + end - first] = start[first:end]
            self.flats.append(flat.requires_grad_())
            ranges[flat] = [(weight, 2, first, end - first)] if end > first else []
        self.bounds = bounds
        self.inner = AdamWBF16(self.flats, lr, (0.9, 0.999), 1e-8, seed, compiles)
        self.inner.param_groups[0]["weight_decay"] = decay
        self.inner.ranges = ranges
        self.inner.names = {weight: "w"}

    def step(self, gradient: Tensor) -> None:
        for flat, (first, end) in zip(self.flats, pairwise(self.bounds), strict=True):
            flat.grad = torch.full_like(flat, 3.0)
            flat.grad[2 : 2 + end - first] = gradient[first:end]
        self.inner.step()

    def whole(self, state: str | None = None) -> Tensor:
        tensors = [flat.detach() if state is None else self.inner.state[flat][state] for flat in self.flats]
        return torch.cat([tensor[2:-3] for tensor in tensors])


def weights_and_gradients(count: int, steps: int) -> tuple[Tensor, list[Tensor]]:
    """Gradients fall to a tenth at half of the steps, so that the second moment has to."""
    draw = torch.Generator().manual_seed(1)
    start = (torch.randn(count, generator=draw) * 0.02).bfloat16()
    gradients = []
    for step in range(steps):
        scale = 1.0 if 2 * step < steps else 0.1
        gradients.append(((torch.randn(count, generator=draw) + 0.3) * scale).bfloat16())
    return start, gradients


@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_steps_are_those_of_adamw_in_numpy_with_the_same_chance(number: Any) -> None:
    """To the bit in float32, where each operation rounds once; close to it in float64.

    So many elements, because the chance hides the last bits of float32 but once in 65,536 times.
    """
    start, gradients = weights_and_gradients(2**19, 4)
    optimizer = Alone(start, lr=1e-3, decay=0.1, seed=4)
    weight = start.float().numpy().astype(number)
    first = np.zeros_like(weight)
    second = np.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        optimizer.step(gradient)
        g = gradient.float().numpy().astype(number)
        exact_first = first * 0.9 + g * (1 - 0.9)
        exact_second = second * 0.999 + g * g * (1 - 0.999)
        move = exact_first / (np.sqrt(exact_second * (1 / (1 - 0.999**step))) + 1e-8)
        exact = weight * (1 - 1e-3 * 0.1) - move * (1e-3 / (1 - 0.9**step))
        assert exact.dtype == number
        chances = chance(step, "w", len(weight), seed=4)
        ours = []
        for state, value, chances_of in zip(
            (None, FIRST, SECOND), (exact, exact_first, exact_second), chances, strict=True
        ):
            expected = by_chance(value.astype(np.float64), chances_of)
            found = optimizer.whole(state).double().numpy()
            # float32 and float64 are on two sides of a chance once in thousands, a step of the grid apart.
            assert (found != expected).mean() < (3e-3 if number is np.float64 else 1e-30)
            assert np.allclose(found, expected, rtol=2**-7, atol=2**-20 * np.abs(expected).max())
            ours.append(found.astype(number))
        weight, first, second = ours


@pytest.mark.parametrize("piece", [64, 2**22])
@pytest.mark.parametrize(
    "cuts",
    [(1,), (501,), (334, 668), (143, 286, 429, 572, 715, 858), (0, 0, 1, 2, 999, 1001)],
    ids=str,
)
def test_parts_of_any_size_equal_the_whole(
    cuts: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw_bf16, "_PIECE", piece)
    start, gradients = weights_and_gradients(1001, 10)
    whole = Alone(start, lr=1e-3, decay=0.1)
    parts = Alone(start, cuts, lr=1e-3, decay=0.1)
    for gradient in gradients:
        whole.step(gradient)
        parts.step(gradient)
    for state in (None, FIRST, SECOND):
        assert torch.equal(whole.whole(state), parts.whole(state))
    for flat in parts.flats:
        assert parts.inner.state[flat][STEP] == 10
        padding = torch.cat([flat[:2], flat[-3:]])
        assert padding.eq(7.0).all()


@pytest.mark.slow
def test_a_compiled_update_has_the_bits_of_the_other_one() -> None:
    start, gradients = weights_and_gradients(2**17 + 77, 3)
    plain = Alone(start, lr=1e-3, decay=0.1)
    compiled = Alone(start, (501, 70_001), lr=1e-3, decay=0.1, compiles=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for gradient in gradients:
        plain.step(gradient)
        compiled.step(gradient)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    for state in (None, FIRST, SECOND):
        assert torch.equal(plain.whole(state), compiled.whole(state))


@pytest.mark.parametrize("lr", [1e-7, 1e-5])
def test_weights_and_second_moment_follow_float32(lr: float) -> None:
    start, gradients = weights_and_gradients(4096, 300)
    by_chance = Alone(start, lr=lr)
    exact = nn.Parameter(start.float())
    adamw = torch.optim.AdamW([exact], lr, weight_decay=0.0)
    for gradient in gradients:
        by_chance.step(gradient)
        exact.grad = gradient.float()
        adamw.step()
    moved = exact.detach().double() - start.double()
    found = by_chance.whole().double() - start.double()
    error = found - moved
    assert float(found @ moved / (moved @ moved)) == pytest.approx(1, abs=0.1)
    assert abs(float(error.mean() / error.std())) * math.sqrt(4096) < LIMIT
    second = by_chance.whole(SECOND).double().mean() / adamw.state[exact][SECOND].double().mean()
    assert float(second) == pytest.approx(1, abs=0.02)
