"""Log-probs of tokens from hidden states, without a [tokens, vocab] tensor, and their sums per response."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Float32 logits computed at a time: they fit in a CPU's caches, and fill a GPU's matrix units.
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
# Rows of the output layer's weight converted to float32 at a time, on a CPU.
_BLOCK_ROWS = 2048
# Probabilities kept for backward. More saves up to a quarter of the head's time.
_KEPT_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}


Statistic = Literal["collisions", "entropy"]
"""A value of the distribution at each target, beside the log-prob of the target (`token_logps`)."""


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of pairs, or of rankings, summed over completion tokens.

    `sum_by_response` returns float64, because a log-ratio is a small difference of large sums. The losses
    accept any floating dtype and compute in it.

    Attributes:
        chosen: [pairs], sum of log p(token) over the best response, end-of-turn token included.
        rejected: [pairs], the same for the worst response; 0 for a pair of one response.
        chosen_tokens: [pairs], number of completion tokens of the chosen response.
        rejected_tokens: [pairs], the same for the rejected response; 0 for a pair of one response.
        between: [pairs, n], sums of the responses ranked between these, best first; None for plain pairs.
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
        """[pairs], mean over the tokens of the chosen response."""
        return self.chosen / self.chosen_tokens

    @property
    def mean_rejected(self) -> Tensor:
        """[pairs], mean over the tokens of the rejected response; 0 for a pair of one response."""
        return self.rejected / self.rejected_tokens.clamp(min=1)

    @property
    def margin(self) -> Tensor:
        """[pairs], `chosen` minus `rejected`."""
        return self.chosen - self.rejected

    def minus(self, reference: "PairLogps") -> "PairLogps":
        """Return log-ratios of the same responses; nan for a ranked response that the reference lacks.

        Raises:
            ValueError: the reference has another number of pairs or of ranked responses.
        """
        if (self._shape, reference._shape) != (self._shape, self._shape):
            raise ValueError(
                f"policy and reference log-probs have different [pairs, responses]: "
                f"{list(self._shape)} and {list(reference._shape)}"
            )
        return replace(
            self,
            chosen=self.chosen - reference.chosen,
            rejected=self.rejected - reference.rejected,
            between=self._between_ratios(reference),
            whole_chosen=None,
        )

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.chosen), 2 if self.between is None else 2 + self.between.shape[1]

    def _between_ratios(self, reference: "PairLogps") -> Tensor | None:
        if self.between is None or reference.between is None:
            return None
        if self.between_tokens is None or reference.between_tokens is None:
            raise ValueError("between_tokens is missing: ranked responses need their numbers of tokens")
        # No error is raised here: the host would have to wait for the device.
        is_missing = (reference.between_tokens == 0) & (self.between_tokens > 0)
        return (self.between - reference.between).masked_fill(is_missing, torch.nan)

    def detached(self) -> "PairLogps":
        """Return the same values without an autograd graph."""
        return replace(self, **{n: v.detach() for n, v in vars(self).items() if isinstance(v, Tensor)})


def sum_by_response(
    token_logps: Tensor,
    response_tokens: Tensor,
    ranking: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> PairLogps:
    """Sum per-token log-probs by response, in float64, and group the sums by pair.

    Args:
        token_logps: float32 [targets], response after response of the first pair, of the second, and so on.
        response_tokens: int64 [responses], completion tokens of each response in that order.
        ranking: int64 [pairs, 2 + n], indices in `response_tokens` of each pair's best response, its worst,
            and those between them; -1 for none. None: every pair has two responses, best first.
        token_weights: float32 [targets], factors of the log-probs (`desensitised_weights`); None: all 1.
    """
    tokens = _by_pair(response_tokens.double(), ranking)
    whole = _by_pair(_response_sums(token_logps.double(), response_tokens), ranking)
    sums = whole
    if token_weights is not None:
        weighted = token_logps.double() * token_weights.double()
        sums = _by_pair(_response_sums(weighted, response_tokens), ranking)
    pairs = PairLogps(sums[:, 0], sums[:, 1], tokens[:, 0], tokens[:, 1])
    if sums.shape[1] > 2:
        pairs = replace(pairs, between=sums[:, 2:], between_tokens=tokens[:, 2:])
    return pairs if token_weights is None else replace(pairs, whole_chosen=whole[:, 0])


def _response_sums(values: Tensor, response_tokens: Tensor) -> Tensor:
    # unsafe: skips the check of the lengths, for which the host would wait for the device.
    return torch.segment_reduce(values, "sum", lengths=response_tokens, unsafe=True)


def _by_pair(values: Tensor, ranking: Tensor | None) -> Tensor:
    """Return [pairs, 2 + n] of [responses]; index -1 selects the appended zero."""
    return values.view(-1, 2) if ranking is None else torch.cat((values, values.new_zeros(1)))[ranking]


def desensitised_weights(pair_tokens: Sequence[Sequence[int]], ld_alpha: float) -> Tensor:
    """Return the weights of tokens for length-desensitised losses (arXiv 2409.06411).

    Args:
        pair_tokens: completion tokens of each pair's responses.
        ld_alpha: weight of a response's tokens beyond the length of its pair's shortest response.

    Returns:
        float32 [targets], 1 or `ld_alpha`, response after response.
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

    Args:
        token_logps: float32 [targets], of the policy.
        collisions: float32 [targets], log of the sum of p(v)^2 over the vocabulary at each target.
        sums: sums values of targets by response (`sum_by_response`).

    Returns:
        float64 [pairs], product over both responses of exp(mean over tokens of `token_logps - collisions`).
    """
    typicality = sums(token_logps - collisions)
    return torch.exp(typicality.mean_chosen + typicality.mean_rejected)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    statistics: Sequence[Statistic] = (),
) -> Tensor:
    """Return the log-prob of each target under softmax(hidden @ weight.T + bias), computed in chunks.

    Logits exist for one chunk of positions at a time. Backward keeps the probabilities of the last few chunks
    and recomputes the others. Logits and softmax are float32.

    Args:
        hidden: [targets, hidden_size], the state that predicts each target.
        weight: [vocab, hidden_size].
        bias: [vocab] or None.
        targets: int64 [targets].
        statistics: also return these, without a graph. `collisions`: the log of the sum of p(v)^2 over the
            vocabulary, the log-probability that two tokens drawn at that position are equal. `entropy`: the
            negative sum of p(v) log p(v), in nats.

    Returns:
        float32 [targets]; with statistics float32 [1 + statistics, targets], log-probs first.
    """
    device = weight.device.type
    kept_chunks = _KEPT_BYTES[device] // _CHUNK_BYTES[device] if torch.is_grad_enabled() else 0
    values: Tensor = _ChunkedTokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, kept_chunks, tuple(statistics)
    )
    return values


def _chunks(positions: int, weight: Tensor) -> list[slice]:
    size = max(1, _CHUNK_BYTES[weight.device.type] // (4 * len(weight)))
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


def _softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 probabilities [n, vocab] and the log-prob of each target [n].

    The largest probability is at least 1 / vocab, so its logarithm gives the normalizer without a second
    pass of exponentials.
    """
    logits = _logits(hidden, weight)
    if bias is not None:
        logits += bias
    probabilities = torch.softmax(logits, dim=-1)
    largest, index = logits.max(dim=-1, keepdim=True)
    normalizers = largest - probabilities.gather(1, index).log()
    return probabilities, (logits.gather(1, targets[:, None]) - normalizers).squeeze(1)


def _statistic(probabilities: Tensor, statistic: Statistic) -> Tensor:
    """Return a statistic of distributions [n, vocab], float32 [n]."""
    values: Tensor
    match statistic:
        case "collisions":
            values = torch.linalg.vector_norm(probabilities, dim=-1).log() * 2
        case "entropy":
            values = torch.special.entr(probabilities).sum(dim=-1)
    return values


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden @ weight.T as float32 [n, vocab]: in bf16, logits are wrong by hundredths of a nat."""
    if hidden.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.device.type == "cuda":
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    # PyTorch has no such product on CPUs. One block of the weight is converted at a time, to fit in caches.
    logits = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=hidden.device)
    wide = hidden.float()
    for start in range(0, len(weight), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        torch.mm(wide, weight[block].float().T, out=logits[:, block])
    return logits


class _ChunkedTokenLogps(torch.autograd.Function):
    """Chunked head. d logp / d logits = onehot(target) - softmax, so backward needs one chunk's softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        kept_chunks: int,
        statistics: tuple[Statistic, ...],
    ) -> Tensor:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        others = torch.empty(len(statistics), len(targets), dtype=torch.float32, device=hidden.device)
        chunks = _chunks(len(targets), weight)
        ctx.kept = {}
        for number, chunk in enumerate(chunks):
            probabilities, logps[chunk] = _softmax(hidden[chunk], weight, bias, targets[chunk])
            for row, statistic in enumerate(statistics):
                others[row, chunk] = _statistic(probabilities, statistic)
            if number >= len(chunks) - kept_chunks:
                ctx.kept[chunk.start] = probabilities
        ctx.save_for_backward(hidden, weight, bias, targets)
        return torch.cat((logps[None], others)) if statistics else logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        grad_logps = grad_values if grad_values.dim() == 1 else grad_values[0]
        hidden, weight, bias, targets = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for chunk in reversed(_chunks(len(targets), weight)):  # kept chunks first, to free them
            probabilities = ctx.kept.pop(chunk.start, None)
            if probabilities is None:
                probabilities, _ = _softmax(hidden[chunk], weight, bias, targets[chunk])
            upstream = grad_logps[chunk, None]
            grad_logits = (
                probabilities.mul_(-upstream).scatter_add_(1, targets[chunk, None], upstream).to(hidden.dtype)
            )
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_outer(grad_weight, grad_logits, hidden[chunk])
            if grad_bias is not None:
                grad_bias.add_(grad_logits.float().sum(0))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _add_outer(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits.T @ hidden to `total`, which is float32: in bf16 every chunk would round it again."""
    if hidden.dtype == total.dtype:
        total.addmm_(grad_logits.T, hidden)
    elif hidden.device.type == "cuda":
        total.add_(torch.mm(grad_logits.T, hidden, out_dtype=torch.float32))
    else:
        total.addmm_(grad_logits.T.float(), hidden.float())
