"""From hidden states to log-probs: per token without a [tokens, vocab] tensor, summed per response."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of float32 logits at a time: what stays in a CPU's caches, what fills a GPU's matrix units.
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
# Of the output layer's weight, converted to float32 at a time on a CPU.
_BLOCK_ROWS = 2048
# Of probabilities that backward finds ready. More is faster by up to a quarter of the head's time.
_KEPT_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of pairs, or of rankings, summed over completion tokens.

    `sum_by_response` makes float64 of them: a log-ratio is a small difference of large sums. Any floating
    dtype is accepted by the losses, which compute in it.

    Attributes:
        chosen: [pairs], sum of log p(token) over the best response, end-of-turn token included.
        rejected: [pairs], the same for the worst response; 0 where there is none.
        chosen_tokens: [pairs], number of completion tokens of the chosen response.
        rejected_tokens: [pairs], the same for the rejected response; 0 where there is none.
        between: [pairs, n], of the responses ranked between these, best first; None: there are none.
        between_tokens: [pairs, n], the same; 0 where a ranking has fewer than n.
        whole_chosen: [pairs], `chosen` with every token counted once, where `ld_alpha` has changed the sums
            above; None: `chosen` is that sum.
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
        """[pairs], mean over the tokens of the rejected response; 0 where there is none."""
        return self.rejected / self.rejected_tokens.clamp(min=1)

    def minus(self, reference: "PairLogps") -> "PairLogps":
        """Log-ratios of the same responses; nan where the reference counts no tokens of a ranked response.

        Raises:
            ValueError: the reference has other numbers of pairs or of ranked responses.
        """
        if (self._shape, reference._shape) != (self._shape, self._shape):
            raise ValueError(
                f"the reference's log-probs are not of the policy's responses: [pairs, responses] "
                f"{list(reference._shape)}, expected {list(self._shape)}"
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
            raise ValueError("log-probs of ranked responses without their numbers of tokens")
        # Not raised: for it the host would wait for the device.
        is_missing = (reference.between_tokens == 0) & (self.between_tokens > 0)
        return (self.between - reference.between).masked_fill(is_missing, torch.nan)

    def detached(self) -> "PairLogps":
        """The same without a graph."""
        return replace(self, **{n: v.detach() for n, v in vars(self).items() if isinstance(v, Tensor)})


def sum_by_response(
    token_logps: Tensor,
    response_tokens: Tensor,
    ranking: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> PairLogps:
    """Sum per-token log-probs to pairs, in float64.

    Args:
        token_logps: float32 [targets], response after response of the first pair, of the second, and so on.
        response_tokens: int64 [responses], completion tokens of each response in that order.
        ranking: int64 [pairs, 2 + n], places in `response_tokens` of each pair's best response, its worst,
            and those between them; -1 where there is none. None: every pair has two responses, best first.
        token_weights: float32 [targets], by which log-probs are multiplied (`desensitised_weights`); None: 1.
    """
    tokens = _by_pair(response_tokens.double(), ranking)
    whole = _by_pair(_response_sums(token_logps.double(), response_tokens), ranking)
    sums = whole
    if token_weights is not None:
        weighted = token_logps.double() * token_weights.double()
        sums = _by_pair(_response_sums(weighted, response_tokens), ranking)
    has_between = sums.shape[1] > 2
    return PairLogps(
        sums[:, 0],
        sums[:, 1],
        tokens[:, 0],
        tokens[:, 1],
        sums[:, 2:] if has_between else None,
        tokens[:, 2:] if has_between else None,
        None if token_weights is None else whole[:, 0],
    )


def _response_sums(values: Tensor, response_tokens: Tensor) -> Tensor:
    # unsafe: that the lengths fit is known; to check it, the host would wait for the device.
    return torch.segment_reduce(values, "sum", lengths=response_tokens, unsafe=True)


def _by_pair(values: Tensor, ranking: Tensor | None) -> Tensor:
    """[responses] to [pairs, 2 + n]; -1 finds the zero that is appended."""
    return values.view(-1, 2) if ranking is None else torch.cat((values, values.new_zeros(1)))[ranking]


def desensitised_weights(pair_tokens: Sequence[Sequence[int]], ld_alpha: float) -> Tensor:
    """Weights of tokens for length-desensitised losses (arXiv 2409.06411).

    Args:
        pair_tokens: completion tokens of each pair's responses.
        ld_alpha: weight of the tokens of a response past the length of its pair's shortest one.

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
    """How much each pair is like what the policy itself would write (WPO, arXiv 2406.11827, equation 2).

    Args:
        token_logps: float32 [targets], of the policy.
        collisions: float32 [targets], log of the sum of p(v)^2 over the vocabulary at each target.
        sums: adds values of targets up to pairs (`sum_by_response`).

    Returns:
        float64 [pairs], product over both responses of exp(mean over tokens of their difference).
    """
    typicality = sums(token_logps - collisions)
    return torch.exp(typicality.mean_chosen + typicality.mean_rejected)


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Log-prob of each target under softmax(hidden @ weight.T + bias), chunk by chunk.

    Logits exist for one chunk of positions at a time; backward keeps the probabilities of the last few chunks
    and computes the others again. Logits and softmax are float32.

    Args:
        hidden: [targets, hidden_size], the state that predicts each target.
        weight: [vocab, hidden_size].
        bias: [vocab] or None.
        targets: int64 [targets].

    Returns:
        float32 [targets].
    """
    logps, _ = _walk_chunks(hidden, weight, bias, targets, with_collisions=False)
    return logps


def token_logps_and_collisions(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """`token_logps`, and without a graph the log of the sum of p(v)^2 over the vocabulary at each target: the
    log-probability that two tokens drawn there are the same. Both float32 [targets].
    """
    return _walk_chunks(hidden, weight, bias, targets, with_collisions=True)


def _walk_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_collisions: bool
) -> tuple[Tensor, Tensor]:
    kept = (
        _KEPT_BYTES[weight.device.type] // _CHUNK_BYTES[weight.device.type] if torch.is_grad_enabled() else 0
    )
    walked: tuple[Tensor, Tensor] = _ChunkedTokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, kept, with_collisions
    )
    return walked


def _chunks(positions: int, weight: Tensor) -> list[slice]:
    size = max(1, _CHUNK_BYTES[weight.device.type] // (4 * len(weight)))
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


def _softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 probabilities [n, vocab] and the log-prob of each target [n].

    The largest probability is at least 1 / vocab, so its logarithm gives the normalizer without another pass
    of exponentials.
    """
    logits = _logits(hidden, weight)
    if bias is not None:
        logits += bias
    probabilities = torch.softmax(logits, dim=-1)
    largest, where = logits.max(dim=-1, keepdim=True)
    normalizers = largest - probabilities.gather(1, where).log()
    return probabilities, (logits.gather(1, targets[:, None]) - normalizers).squeeze(1)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T in float32 [n, vocab]: rounded to bf16, logits are off by hundredths of a nat."""
    if hidden.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.device.type == "cuda":
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    # CPUs have no such product. Of the weight a block is converted at a time, which stays in the caches.
    logits = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=hidden.device)
    wide = hidden.float()
    for start in range(0, len(weight), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        torch.mm(wide, weight[block].float().T, out=logits[:, block])
    return logits


class _ChunkedTokenLogps(torch.autograd.Function):
    """d logp / d logits = onehot(target) - softmax, so backward needs the softmax of one chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        kept_chunks: int,
        with_collisions: bool,
    ) -> tuple[Tensor, Tensor]:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        collisions = torch.empty_like(logps if with_collisions else logps[:0])
        chunks = _chunks(len(targets), weight)
        ctx.kept = {}
        for number, chunk in enumerate(chunks):
            probabilities, logps[chunk] = _softmax(hidden[chunk], weight, bias, targets[chunk])
            if with_collisions:
                collisions[chunk] = torch.linalg.vector_norm(probabilities, dim=-1).log() * 2
            if number >= len(chunks) - kept_chunks:
                ctx.kept[chunk.start] = probabilities
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.mark_non_differentiable(collisions)
        return logps, collisions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _grad_collisions: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for chunk in reversed(_chunks(len(targets), weight)):  # the kept ones first, to be freed
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
    """Add grad_logits.T @ hidden to the float32 `total`, which many chunks would else round as many times."""
    if hidden.dtype == total.dtype:
        total.addmm_(grad_logits.T, hidden)
    elif hidden.device.type == "cuda":
        total.add_(torch.mm(grad_logits.T, hidden, out_dtype=torch.float32))
    else:
        total.addmm_(grad_logits.T.float(), hidden.float())
