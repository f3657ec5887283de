"""From hidden states to log-probs: per token without a [tokens, vocab] tensor, summed per response."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of float32 logits at a time: what stays in a CPU's caches and memory, what fills a GPU's matrix units.
_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of pairs, summed over completion tokens.

    Attributes:
        chosen: float32 [pairs], sum of log p(token) over the chosen response, end-of-turn token included.
        rejected: float32 [pairs], the same for the rejected response.
        chosen_tokens: float32 [pairs], number of completion tokens of the chosen response.
        rejected_tokens: float32 [pairs], the same for the rejected response.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


def sum_by_response(token_logps: Tensor, response_tokens: Tensor) -> PairLogps:
    """Sum per-token log-probs to pairs.

    Args:
        token_logps: float32 [targets], response after response: chosen and rejected of the first pair, of the
            second, and so on.
        response_tokens: int64 [2 * pairs], completion tokens of each response in that order.
    """
    # unsafe: that the lengths fit is known; to check it, the host would wait for the device.
    sums = torch.segment_reduce(token_logps, "sum", lengths=response_tokens, unsafe=True)
    chosen, rejected = sums.view(-1, 2).unbind(1)
    chosen_tokens, rejected_tokens = response_tokens.to(torch.float32).view(-1, 2).unbind(1)
    return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens)


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Log-prob of each target under softmax(hidden @ weight.T + bias), chunk by chunk.

    Logits exist for one chunk of positions at a time, in forward and again in backward; log-sum-exp is taken
    in float32.

    Args:
        hidden: [targets, hidden_size], the state that predicts each target.
        weight: [vocab, hidden_size].
        bias: [vocab] or None.
        targets: int64 [targets].

    Returns:
        float32 [targets].
    """
    logps: Tensor = _ChunkedTokenLogps.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return logps


def _chunks(positions: int, weight: Tensor) -> list[slice]:
    size = max(1, _CHUNK_BYTES[weight.device.type] // (4 * len(weight)))
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


def _chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).float()


class _ChunkedTokenLogps(torch.autograd.Function):
    """d logp / d logits = onehot(target) - softmax, so backward needs only the logits of one chunk again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normalizers = torch.empty_like(logps)
        for chunk in _chunks(len(targets), weight):
            logits = _chunk_logits(hidden[chunk], weight, bias)
            normalizers[chunk] = torch.logsumexp(logits, dim=-1)
            logps[chunk] = logits.gather(1, targets[chunk, None]).squeeze(1) - normalizers[chunk]
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for chunk in _chunks(len(targets), weight):
            logits = _chunk_logits(hidden[chunk], weight, bias)
            minus_probabilities = (logits - normalizers[chunk, None]).exp_().neg_()
            minus_probabilities.mul_(grad_logps[chunk, None])
            grad_logits = minus_probabilities.scatter_add_(
                1, targets[chunk, None], grad_logps[chunk, None]
            ).to(hidden.dtype)
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
        )


def _add_outer(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits.T @ hidden to the float32 `total`; only low precision needs a temporary."""
    if hidden.dtype == total.dtype:
        total.addmm_(grad_logits.T, hidden)
    else:
        total.add_(grad_logits.T @ hidden)
