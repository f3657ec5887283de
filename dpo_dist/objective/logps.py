"""From hidden states to log-probs: per token without a [tokens, vocab] tensor, summed per response."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of float32 logits at a time: what stays in a CPU's caches, what fills a GPU's matrix units.
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
# Of probabilities that backward finds ready. More is faster by up to a quarter of the head's time.
_KEPT_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}


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
    # Added one by one in float32, some hundred tokens are off in the fourth decimal. unsafe: that the lengths
    # fit is known; to check it, the host would wait for the device.
    sums = torch.segment_reduce(token_logps.double(), "sum", lengths=response_tokens, unsafe=True).float()
    chosen, rejected = sums.view(-1, 2).unbind(1)
    chosen_tokens, rejected_tokens = response_tokens.to(torch.float32).view(-1, 2).unbind(1)
    return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens)


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Log-prob of each target under softmax(hidden @ weight.T + bias), chunk by chunk.

    Logits exist for one chunk of positions at a time; backward keeps the probabilities of the last few chunks
    and computes the others again. Softmax is taken in float32.

    Args:
        hidden: [targets, hidden_size], the state that predicts each target.
        weight: [vocab, hidden_size].
        bias: [vocab] or None.
        targets: int64 [targets].

    Returns:
        float32 [targets].
    """
    kept = (
        _KEPT_BYTES[weight.device.type] // _CHUNK_BYTES[weight.device.type] if torch.is_grad_enabled() else 0
    )
    logps: Tensor = _ChunkedTokenLogps.apply(hidden, weight, bias, targets, kept)  # type: ignore[no-untyped-call]
    return logps


def _chunks(positions: int, weight: Tensor) -> list[slice]:
    size = max(1, _CHUNK_BYTES[weight.device.type] // (4 * len(weight)))
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


def _softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 probabilities [n, vocab] and the log-prob of each target [n].

    The largest probability is at least 1 / vocab, so its logarithm gives the normalizer without another pass
    of exponentials.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    largest, where = logits.max(dim=-1, keepdim=True)
    normalizers = largest.float() - probabilities.gather(1, where).log()
    return probabilities, (logits.gather(1, targets[:, None]).float() - normalizers).squeeze(1)


class _ChunkedTokenLogps(torch.autograd.Function):
    """d logp / d logits = onehot(target) - softmax, so backward needs the softmax of one chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kept_chunks: int
    ) -> Tensor:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        chunks = _chunks(len(targets), weight)
        ctx.kept = {}
        for number, chunk in enumerate(chunks):
            probabilities, logps[chunk] = _softmax(hidden[chunk], weight, bias, targets[chunk])
            if number >= len(chunks) - kept_chunks:
                ctx.kept[chunk.start] = probabilities
        ctx.save_for_backward(hidden, weight, bias, targets)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
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
        )


def _add_outer(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits.T @ hidden to the float32 `total`, which many chunks would else round as many times."""
    if hidden.dtype == total.dtype:
        total.addmm_(grad_logits.T, hidden)
    elif hidden.device.type == "cuda":
        total.add_(torch.mm(grad_logits.T, hidden, out_dtype=torch.float32))
    else:
        total.addmm_(grad_logits.T.float(), hidden.float())
