"""The chunked head: what log_softmax and gather give, without the logits of all positions."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_dist.objective import token_logps as token_logps_module
from dpo_dist.objective.logps import desensitised_weights, sum_by_response
from dpo_dist.objective.token_logps import LogitChange, token_logps

VOCABULARY, HIDDEN, POSITIONS = 50, 8, 23


@pytest.fixture(params=[(1, 0), (3, 1), (3, 1000), (1000, 1)])
def chunk_positions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    positions, kept_chunks = request.param
    monkeypatch.setattr(token_logps_module, "_CHUNK_BYTES", {"cpu": 4 * VOCABULARY * positions})
    monkeypatch.setattr(token_logps_module, "_KEPT_CHUNKS", kept_chunks)
    return int(positions)


def head(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((POSITIONS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    hidden, weight, offset = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, offset)]
    return leaves[0], leaves[1], leaves[2] if bias else None, targets


CHANGES = [LogitChange(), LogitChange(0.125), LogitChange(0.5, 2.0)]


def changed_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, change: LogitChange) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias) * change.scale
    return logits if change.softcap is None else change.softcap * torch.tanh(logits / change.softcap)


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    change: LogitChange = LogitChange(),  # noqa: B008  (frozen)
) -> Tensor:
    """Log-probs by their definition."""
    log_probs = changed_logits(hidden, weight, bias, change).log_softmax(-1)
    return log_probs.gather(1, targets[:, None]).squeeze(1)


def results(function: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor]) -> list[Tensor]:
    """Log-probs, and gradients of a sum that weighs every position differently, in float64."""
    values = function(*inputs)
    slopes = torch.linspace(-1, 2, POSITIONS, dtype=values.dtype)
    leaves = [leaf for leaf in inputs[:3] if leaf is not None]
    return [tensor.detach().double() for tensor in (values, *torch.autograd.grad(values @ slopes, leaves))]


@pytest.mark.usefixtures("chunk_positions")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_values_and_gradients_equal_log_softmax(change: LogitChange, bias: bool) -> None:
    exact = results(partial(plain, change=change), head(torch.float64, bias))
    ours = results(partial(token_logps, change=change), head(torch.float32, bias))
    for value, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("chunk_positions")
@pytest.mark.parametrize("change", CHANGES)
def test_statistics_are_of_the_whole_distribution_and_change_nothing_else(change: LogitChange) -> None:
    hidden, weight, bias, _ = head(torch.float32)
    logits = changed_logits(hidden, weight, bias, change)

    def first(*inputs: Any) -> Tensor:
        logps, entropy, collisions = token_logps(*inputs, ("entropy", "collisions"), change)
        torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
        torch.testing.assert_close(collisions, logits.softmax(-1).square().sum(-1).log())
        return logps

    alone = results(partial(token_logps, change=change), head(torch.float32))
    for ours, expected in zip(results(first, head(torch.float32)), alone, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.usefixtures("chunk_positions")
@pytest.mark.parametrize("vocabulary_block", [7, 1000])
def test_bf16_weights_and_states_are_multiplied_to_float32(
    vocabulary_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_logps_module, "_BLOCK_ROWS", vocabulary_block)
    hidden, weight, bias, targets = head(torch.bfloat16)
    assert bias is not None
    exact = plain(hidden.double() * 8, weight.double(), bias.double(), targets)
    torch.testing.assert_close(
        token_logps(hidden * 8, weight, bias, targets).double(), exact, rtol=1e-5, atol=1e-5
    )


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_exist_beyond_one_chunk(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(token_logps_module, "_CHUNK_BYTES", {"cpu": 4 * VOCABULARY * HIDDEN})
    inputs = head(dtype)
    with LargestTensor() as largest:
        token_logps(*inputs).sum().backward()  # type: ignore[no-untyped-call]
    # A chunk of 8 positions is as large as the weight; all 23 would be three times that.
    assert largest.elements == VOCABULARY * HIDDEN
    with LargestTensor() as largest:
        plain(*inputs)
    assert largest.elements == VOCABULARY * POSITIONS


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_token_values_are_summed_per_response(lengths: list[int]) -> None:
    lengths = lengths + lengths[::-1]
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0), requires_grad=True)
    pairs = sum_by_response(values, torch.tensor(lengths))
    parts = torch.split(values.detach(), lengths)
    assert pairs.chosen.tolist() == pytest.approx([float(part.sum()) for part in parts[::2]], abs=1e-5)
    assert pairs.rejected.tolist() == pytest.approx([float(part.sum()) for part in parts[1::2]], abs=1e-5)
    assert pairs.chosen_tokens.tolist() == lengths[::2]
    assert pairs.rejected_tokens.tolist() == lengths[1::2]
    slopes = torch.arange(1.0, len(lengths) // 2 + 1, dtype=torch.float64)
    (pairs.chosen @ slopes - pairs.rejected @ slopes).backward()  # type: ignore[no-untyped-call]
    signed = [sign * slope for slope in slopes.tolist() for sign in (1, -1)]
    expected = [slope for slope, length in zip(signed, lengths, strict=True) for _ in range(length)]
    assert values.grad is not None
    assert values.grad.tolist() == expected


def test_log_ratios_of_long_responses_are_not_rounded() -> None:
    """Sums of -1e6 over 128k tokens: float32 knows them to 0.06, and the log-ratio is -0.0808."""
    tokens = 128 * 1024
    generator = torch.Generator().manual_seed(0)
    reference = -8 - torch.rand(2 * tokens, generator=generator)
    policy = reference - torch.tensor([2.0**-20, 0.0]).repeat_interleave(tokens)
    lengths = torch.tensor([tokens, tokens])
    ratios = sum_by_response(policy, lengths).minus(sum_by_response(reference, lengths))
    exact = (policy.double() - reference.double()).view(2, tokens).sum(1)
    assert float(exact[0]) < -0.05
    assert [float(ratios.chosen), float(ratios.rejected)] == pytest.approx(
        exact.tolist(), rel=1e-7, abs=1e-12
    )


def test_whole_chosen_has_weight_one_for_every_token() -> None:
    values = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    weights = desensitised_weights([(3, 1)], 0.25)
    pairs = sum_by_response(values, torch.tensor([3, 1]), token_weights=weights)
    assert (pairs.chosen.tolist(), pairs.rejected.tolist()) == ([-2.5], [-8.0])
    assert pairs.whole_chosen is not None
    assert pairs.whole_chosen.tolist() == [-7.0]
    assert sum_by_response(values, torch.tensor([3, 1])).whole_chosen is None
