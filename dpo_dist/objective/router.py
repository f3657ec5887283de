"""Losses of the routers of a mixture of experts, over the global batch.

The load-balancing loss is E * sum over the experts e of f_e * P_e: f_e is the mean number of times that e is
selected for a token, P_e its mean probability, both over the tokens of all layers (Switch Transformer, arXiv
2101.03961, equations 4 to 6, as `load_balancing_loss_func` of transformers joins the layers). It is a product
of means, so a mean over micro-batches would be another loss. f_e has no gradient: with the f_e of the global
batch the loss is linear in the probabilities, and each micro-batch adds its part.

The z-loss is the mean of logsumexp(router logits)^2 over the tokens of all layers (ST-MoE, arXiv 2202.08906,
equation 5).

Tokens are those of the plain batch with one response per row: a prompt token counts once for each response.
The last token of a response predicts nothing and is not computed, so it does not count; in transformers' own
loss it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AUX_LOSS = "router/aux_loss"
Z_LOSS = "router/z_loss"
BUSIEST = "router/busiest_expert"
"""Metrics of a step; the last is the largest share of the tokens of a layer that one expert computes."""


def routing_sums(logits: Sequence[Tensor], rows: Tensor, top_k: int) -> Tensor:
    """Return sums over the tokens of a micro-batch, at least float32 [layers, 2 * experts + 1].

    Columns: how often each expert is selected, without a gradient; the sum of its probabilities; the sum of
    squared logsumexps.

    `logits`: of each layer's router, [tokens, experts]. `rows`: [tokens], the number of rows of the plain
    batch that have the token; 0 for a dummy. `top_k`: experts of a token.
    """
    layers = []
    for layer_logits in logits:
        wide = layer_logits.to(torch.promote_types(layer_logits.dtype, torch.float32))
        weights = rows.to(wide.dtype)
        probabilities = torch.softmax(wide, dim=-1)
        selected = probabilities.detach().topk(top_k, dim=-1).indices.flatten()
        counts = wide.new_zeros(wide.shape[-1]).index_add(0, selected, weights.repeat_interleave(top_k))
        squares = weights @ torch.logsumexp(wide, dim=-1).square()
        layers.append(torch.cat((counts, weights @ probabilities, squares[None])))
    return torch.stack(layers)


def selections(sums: Tensor) -> Tensor:
    """Return how often each expert is selected, [layers, experts], given `routing_sums`."""
    return sums[:, : sums.shape[1] // 2].detach()


@dataclass(frozen=True)
class RouterLoss:
    """A run's router losses, by the coefficients of load balancing (`aux`) and z-loss; None: no such loss."""

    aux: float | None
    z: float | None

    def parts(self, sums: Tensor, selected: Tensor | None, unshared_tokens: int) -> dict[str, Tensor]:
        """Return a micro-batch's part of each loss of the global batch, by the name of its metric.

        `sums`: `routing_sums` of the micro-batch. `selected`: `selections` of the global batch; None: without
        the load-balancing loss. `unshared_tokens`: tokens of the global batch, a prompt once per response.
        """
        layers = len(sums)
        experts = sums.shape[1] // 2
        tokens = layers * unshared_tokens
        parts = {}
        if selected is not None:
            probabilities = sums[:, experts : 2 * experts].sum(dim=0)
            shares = selected.to(sums.dtype).sum(dim=0) / tokens
            parts[AUX_LOSS] = experts * (shares @ probabilities) / tokens
        if self.z is not None:
            parts[Z_LOSS] = sums[:, -1].sum() / tokens
        return parts

    def weighted(self, parts: dict[str, Tensor]) -> Tensor:
        """Return the sum of `parts` times their coefficients, a scalar."""
        coefficients = {AUX_LOSS: self.aux, Z_LOSS: self.z}
        return torch.stack([part * (coefficients[name] or 0.0) for name, part in parts.items()]).sum()
