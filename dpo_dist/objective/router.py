"""The load-balancing loss of the routers of a mixture of experts, over the global batch.

The load-balancing loss is E * sum over the experts e of f_e * P_e: f_e is the mean number of times that e is
selected for a token, P_e its mean probability, both over the tokens of all layers (Switch Transformer, arXiv
2101.03961, equations 4 to 6, as `load_balancing_loss_func` of transformers joins the layers). It is a product
of means, so a mean over micro-batches would be another loss. f_e has no gradient: with the f_e of the global
batch the loss is linear in the probabilities, and each micro-batch adds its part.

Tokens are those of the plain batch with one response per row: a prompt token counts once for each response.
The last token of a response predicts nothing and is not computed, so it does not count; in transformers' own
loss it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AUX_LOSS = "router/aux_loss"
BUSIEST = "router/busiest_expert"
"""Metrics of a step; the last is the largest share of the tokens of a layer that one expert computes."""


def routing_sums(logits: Sequence[Tensor], rows: Tensor, top_k: int) -> Tensor:
    """Return sums over the tokens of a micro-batch, at least float32 [layers, 2 * experts].

    Columns: how often each expert is selected, without a gradient; the sum of its probabilities.

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
        layers.append(torch.cat((counts, weights @ probabilities)))
    return torch.stack(layers)


def selections(sums: Tensor) -> Tensor:
    """Return how often each expert is selected, [layers, experts], given `routing_sums`."""
    return sums[:, : sums.shape[1] // 2].detach()


@dataclass(frozen=True)
class RouterLoss:
    """A run's load-balancing loss, by its coefficient."""

    aux: float

    def part(self, sums: Tensor, selected: Tensor, unshared_tokens: int) -> Tensor:
        """Return a micro-batch's part of the loss of the global batch without its coefficient, a scalar.

        `sums`: `routing_sums` of the micro-batch. `selected`: `selections` of the global batch.
        `unshared_tokens`: tokens of the global batch, a prompt once per response.
        """
        layers = len(sums)
        experts = sums.shape[1] // 2
        tokens = layers * unshared_tokens
        probabilities = sums[:, experts:].sum(dim=0)
        shares = selected.to(sums.dtype).sum(dim=0) / tokens
        return experts * (shares @ probabilities) / tokens
