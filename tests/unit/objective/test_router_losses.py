"""Losses of routers equal those of transformers, in whatever parts they are computed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpo_dist.objective.router import (
    AUX_LOSS,
    Z_LOSS,
    RouterLoss,
    busiest_share,
    routing_sums,
    selections,
)

LOSS = RouterLoss(aux=0.5, z=0.25)


def invented(layers: int, tokens: int, experts: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, experts, generator=generator) for _ in range(layers)]


@settings(deadline=None, max_examples=40)
@given(
    layers=st.integers(1, 3),
    rows=st.lists(st.integers(0, 3), min_size=2, max_size=9).filter(any),
    experts=st.integers(2, 6),
    cut=st.integers(0, 9),
    top_k=st.integers(1, 2),
)
def test_parts_of_the_batch_add_up_to_the_loss_and_gradient_of_transformers(
    layers: int, rows: list[int], experts: int, cut: int, top_k: int
) -> None:
    logits = [of_layer.requires_grad_() for of_layer in invented(layers, len(rows), experts)]
    weights = torch.tensor(rows, dtype=torch.float32)
    # The plain batch has a token in as many rows as it counts, beside padding that counts for nothing.
    places = torch.cat((torch.repeat_interleave(torch.tensor(rows)), torch.zeros(2, dtype=torch.int64)))
    mask = torch.cat((torch.ones(sum(rows)), torch.zeros(2)))[None]
    expected = load_balancing_loss_func(tuple(x[places] for x in logits), experts, top_k, mask)
    wanted = torch.autograd.grad(expected, logits)

    parts = [slice(None, cut), slice(cut, None)]
    sums = [routing_sums([x[part] for x in logits], weights[part], top_k) for part in parts]
    selected = selections(sums[0]) + selections(sums[1])
    values = [LOSS.parts(of_part, selected, sum(rows)) for of_part in sums]
    ours = values[0][AUX_LOSS] + values[1][AUX_LOSS]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(torch.autograd.grad(ours, logits, retain_graph=True), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)
    squares = [torch.logsumexp(x, -1).square() @ weights for x in logits]
    z_loss = torch.stack(squares).sum() / (sum(rows) * layers)
    torch.testing.assert_close(values[0][Z_LOSS] + values[1][Z_LOSS], z_loss, rtol=1e-5, atol=1e-6)
    weighted = LOSS.weighted(values[0]) + LOSS.weighted(values[1])
    torch.testing.assert_close(weighted, 0.5 * expected + 0.25 * z_loss, rtol=1e-5, atol=1e-6)


def test_the_mean_over_micro_batches_would_be_another_loss() -> None:
    logits, rows = invented(1, 8, 4), torch.ones(4)
    parts = [routing_sums([logits[0][part]], rows, 2) for part in (slice(4), slice(4, 8))]
    means = [LOSS.parts(part, selections(part), 4)[AUX_LOSS] for part in parts]
    whole = routing_sums(logits, torch.ones(8), 2)
    assert abs(sum(means) / 2 - LOSS.parts(whole, selections(whole), 8)[AUX_LOSS]) > 0.01


def test_the_busiest_expert_is_that_of_any_layer() -> None:
    logits = torch.tensor([[3.0, 0.0, 1.0], [3.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    sums = routing_sums([logits, logits[:, [1, 0, 2]]], torch.tensor([2.0, 1.0, 1.0]), 1)
    assert busiest_share(selections(sums), 4) == 0.75
