"""Log-probs of responses: token log-probs summed by response, grouped by pair, weighted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of pairs, or of rankings, summed over completion tokens; a reward model has one score each.

    `sum_by_response` returns float64, because a log-ratio is a small difference of large sums. The losses
    accept any floating dtype and compute in it.

    Attributes:
        chosen: [pairs], sum of log p(token) over the best response, end-of-turn token included.
        rejected: [pairs], the same for the worst response; 0 for a pair of one response.
        chosen_tokens: [pairs], number of completion tokens of the chosen response.
        rejected_tokens: [pairs], the same for the rejected response; 0 for a pair of one response.
        between: [pairs, n], sums of the responses ranked between best and worst; None for plain pairs.
        between_tokens: [pairs, n], their numbers of tokens; 0 after the end of a shorter ranking.
        whole_chosen: [pairs], sum over the best response with weight 1 for every token, if the sums above
            are weighted by `ld_alpha`; else None.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    between: Tensor | None = None
    between_tokens: Tensor | None = None
    whole_chosen: Tensor | None = None

    @property
    def mean_chosen(self) -> Tensor:
        """[pairs], mean over the tokens of the chosen response; 0 for a record with a bad response only."""
        return self.chosen / self.chosen_tokens.clamp(min=1)

    @property
    def mean_rejected(self) -> Tensor:
        """[pairs], mean over the tokens of the rejected response; 0 for a pair of one response."""
        return self.rejected / self.rejected_tokens.clamp(min=1)

    @property
    def margin(self) -> Tensor:
        """[pairs], `chosen` minus `rejected`."""
        return self.chosen - self.rejected

    def minus(self, reference: "PairLogps") -> "PairLogps":
        """Return log-ratios of the same responses; nan for a ranked response that the reference lacks."""
        shapes = [
            [logps.chosen.shape, None if logps.between is None else logps.between.shape]
            for logps in (self, reference)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(f"policy and reference log-probs are of different responses: {shapes}")
        between = None
        if self.between is not None and reference.between is not None:
            assert self.between_tokens is not None
            assert reference.between_tokens is not None
            # No error is raised here: the host would have to wait for the device.
            is_missing = (reference.between_tokens == 0) & (self.between_tokens > 0)
            between = (self.between - reference.between).masked_fill(is_missing, torch.nan)
        chosen, rejected = self.chosen - reference.chosen, self.rejected - reference.rejected
        return replace(self, chosen=chosen, rejected=rejected, between=between, whole_chosen=None)


def sum_by_response(
    token_logps: Tensor,
    response_tokens: Tensor,
    ranking: Tensor | None = None,
    token_weights: Tensor | None = None,
    lengths: Tensor | None = None,
) -> PairLogps:
    """Sum per-token log-probs by response, in float64, and group the sums by pair.

    Args:
        token_logps: float32 [targets], response after response of the first pair, of the second, and so on.
        response_tokens: int64 [responses], completion tokens of each response in that order.
        ranking: int64 [pairs, 2 + n], indices in `response_tokens` of each pair's best response, its worst,
            and those between them; -1 for none. None: every pair has two responses, best first.
        token_weights: float32 [targets], factors of the log-probs (`desensitised_weights`).
        lengths: int64 [responses], tokens of each response if its targets are not its tokens (scores).
    """

    def by_pair(values: Tensor) -> Tensor:
        """Return values [responses] as [pairs, 2 + n]; index -1 selects the appended zero."""
        return values.view(-1, 2) if ranking is None else torch.cat((values, values.new_zeros(1)))[ranking]

    def sum_targets(values: Tensor) -> Tensor:
        # unsafe: skips the check of the lengths, for which the host would wait for the device.
        return by_pair(torch.segment_reduce(values, "sum", lengths=response_tokens, unsafe=True))

    tokens = by_pair((response_tokens if lengths is None else lengths).double())
    unweighted = sum_targets(token_logps.double())
    sums = unweighted if token_weights is None else sum_targets(token_logps.double() * token_weights.double())
    pairs = PairLogps(sums[:, 0], sums[:, 1], tokens[:, 0], tokens[:, 1])
    if sums.shape[1] > 2:
        pairs = replace(pairs, between=sums[:, 2:], between_tokens=tokens[:, 2:])
    return pairs if token_weights is None else replace(pairs, whole_chosen=unweighted[:, 0])


def desensitised_weights(pair_tokens: Sequence[Sequence[int]], ld_alpha: float) -> Tensor:
    """Return the weights of tokens for length-desensitised losses (arXiv 2409.06411), float32 [targets].

    The weight is `ld_alpha` for tokens beyond the length of the pair's shortest response, else 1.
    `pair_tokens`: completion tokens of each pair's responses.
    """
    parts = [torch.empty(0)]
    for responses in pair_tokens:
        shortest = min(responses)
        for tokens in responses:
            parts += [torch.ones(shortest), torch.full((tokens - shortest,), ld_alpha)]
    return torch.cat(parts)


@torch.no_grad()
def wpo_weights(token_logps: Tensor, collisions: Tensor, sums: Callable[[Tensor], PairLogps]) -> Tensor:
    """Return each pair's weight by its likelihood under the policy (WPO, arXiv 2406.11827, equation 2).

    Returns float64 [pairs]: the product over both responses of exp(mean over tokens of
    `token_logps - collisions`). `collisions`: float32 [targets], log of the sum of p(v)^2 over the vocabulary
    at each target. `sums` sums values of targets by response (`sum_by_response`).
    """
    typicality = sums(token_logps - collisions)
    return torch.exp(typicality.mean_chosen + typicality.mean_rejected)
