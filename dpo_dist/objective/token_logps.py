"""Log-probs of tokens from hidden states, in chunks: no [tokens, vocab] tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_dist.objective.distillation import SoftTargets, SparseRows

# Float32 logits computed at a time: they fit in a CPU's caches, and fill a GPU's matrix units.
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
# A GPU has memory for so many chunks: those of one with less than 64 GiB are smaller.
_CHUNKS_IN_MEMORY = 128
# Rows of the output layer's weight converted to float32 at a time, on a CPU.
_BLOCK_ROWS = 2048
# Chunks of probabilities kept for backward: to keep all would save up to a quarter of the head's time.
_KEPT_CHUNKS = 4

Statistic = Literal["collisions", "entropy", "most_likely", "of_teacher", "as_teacher"]
"""A value of the distribution at each target, beside the log-prob of the target (`token_logps`).

Two are of a packed model and what its batch has of a teacher: the mean of the model's log-probs under the
teacher's rows, which comes first and has a gradient; and the rows of the model as a teacher, in place of all
other values.
"""


@dataclass(frozen=True)
class LogitChange:
    """A change of logits before softmax: x becomes softcap * tanh(scale * x / softcap).

    Without a softcap (Gemma 2, arXiv 2408.00118) it becomes scale * x.
    """

    scale: float = 1.0
    softcap: float | None = None


UNCHANGED = LogitChange()


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    statistics: Sequence[Statistic] = (),
    change: LogitChange = UNCHANGED,
    soft: SoftTargets | None = None,
) -> Tensor:
    """Return the log-prob of each target under softmax(change(hidden @ weight.T + bias)), in chunks.

    Logits exist for one chunk of positions at a time. Backward keeps the probabilities of the last few chunks
    and recomputes the others. Logits and softmax are float32.

    Args:
        hidden: [targets, hidden_size], the state that predicts each target.
        weight: [vocab, hidden_size], possibly more precise than the states.
        statistics: also return these, without a graph. `collisions`: the log of the sum of p(v)^2 over the
            vocabulary. `entropy`: the negative sum of p(v) log p(v), in nats. `most_likely`: the id with the
            largest p(v).
        soft: also return the mean of log-probs over these distributions, as differentiable as the log-probs.

    Returns:
        float32 [targets]; with `soft` or statistics float32 [1 + soft + statistics, targets], in this order.
    """
    kept_chunks = _KEPT_CHUNKS if torch.is_grad_enabled() else 0
    # A kept chunk may also have slopes, or a second softmax, as large as its probabilities.
    has_other_softmax = soft is not None and soft.temperature != 1
    kept_chunks //= 1 + (change.softcap is not None) + has_other_softmax
    values: Tensor = _ChunkedTokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden.to(weight.dtype), weight, bias, targets, kept_chunks, tuple(statistics), change, soft
    )
    return values


def logps_of_logits(
    logits: Tensor, targets: Tensor, statistics: Sequence[Statistic] = (), soft: SoftTargets | None = None
) -> Tensor:
    """Return the same as `token_logps` from logits that exist, [targets, vocab]; the softmax is float32."""
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    logps = log_probabilities.gather(1, targets[:, None]).squeeze(1)
    if not statistics and soft is None:
        return logps
    probabilities = log_probabilities.detach().exp()
    rows = [logps]
    if soft is not None:
        softened = torch.log_softmax(logits.float() / soft.temperature, dim=-1)
        rows.append((softened.gather(1, soft.ids) * soft.shares).sum(1))
    rows += [_statistic(probabilities, statistic) for statistic in statistics]
    return torch.stack(rows)


@torch.no_grad()
def teacher_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    uniforms: Tensor,
    kept: SparseRows,
    change: LogitChange = UNCHANGED,
) -> Tensor:
    """Return the rows of the distributions whose log-probs `token_logps` computes, in chunks.

    `hidden`: [positions, hidden_size]; `uniforms`: [positions, kept.drawn]. Returns float32
    [positions, kept.width].
    """
    rows = torch.empty(len(hidden), kept.width, dtype=torch.float32, device=hidden.device)
    for chunk in _chunks(len(hidden), weight):
        logits, _ = _changed_logits(hidden[chunk].to(weight.dtype), weight, bias, change)
        rows[chunk] = kept.rows(torch.softmax(logits / kept.temperature, dim=-1), uniforms[chunk])
    return rows


def rows_of_logits(logits: Tensor, uniforms: Tensor, kept: SparseRows) -> Tensor:
    """Return the same as `teacher_rows` from logits that exist, [positions, vocab]."""
    return kept.rows(torch.softmax(logits.float() / kept.temperature, dim=-1), uniforms)


def float32_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden @ weight.T + bias as float32, with a graph."""
    logits = torch.nn.functional.linear(hidden.float(), weight.float())
    return logits if bias is None else logits + bias.float()


def chunk_bytes(memory: float) -> float:
    """Return the bytes of float32 logits that a GPU with so many bytes of memory computes at a time."""
    return min(_CHUNK_BYTES["cuda"], memory / _CHUNKS_IN_MEMORY)


def _chunks(positions: int, weight: Tensor) -> list[slice]:
    device = weight.device
    chunk: float = _CHUNK_BYTES["cpu"]
    if device.type == "cuda":
        chunk = chunk_bytes(torch.cuda.get_device_properties(device).total_memory)
    size = max(1, int(chunk) // (4 * len(weight)))
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


@dataclass(frozen=True)
class _Chunk:
    """The distributions at some positions, float32 [n, vocab], and the log-probs of the targets.

    `slopes`: float32 [n, vocab], derivative of each changed logit with respect to the product of the output
    layer, without the factor `LogitChange.scale`; None: 1. `expected` and `softened` are of soft targets:
    the mean log-probs, and the distributions at another temperature than 1.
    """

    probabilities: Tensor
    logps: Tensor
    slopes: Tensor | None
    expected: Tensor | None = None
    softened: Tensor | None = None


def _changed_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, change: LogitChange
) -> tuple[Tensor, Tensor | None]:
    """Return logits after their change, and the slopes of `_Chunk`."""
    logits = _logits(hidden, weight)
    if bias is not None:
        logits += bias
    slopes = None
    if change.softcap is not None:  # d (c tanh(x / c)) / dx = 1 - tanh(x / c)^2
        logits.mul_(change.scale / change.softcap).tanh_()
        slopes = 1 - logits.square()
        logits *= change.softcap
    elif change.scale != 1:
        logits *= change.scale
    return logits, slopes


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities [n, vocab], and the logarithm of the sum of exponentials, [n, 1].

    The largest probability is at least 1 / vocab, so its logarithm gives the sum without a second pass of
    exponentials.
    """
    probabilities = torch.softmax(logits, dim=-1)
    largest, index = logits.max(dim=-1, keepdim=True)
    return probabilities, largest - probabilities.gather(1, index).log()


def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    change: LogitChange,
    soft: SoftTargets | None,
) -> _Chunk:
    """Return the distributions at positions with these hidden states."""
    logits, slopes = _changed_logits(hidden, weight, bias, change)
    probabilities, normalizers = _softmax(logits)
    logps = (logits.gather(1, targets[:, None]) - normalizers).squeeze(1)
    if soft is None:
        return _Chunk(probabilities, logps, slopes)
    softened = None
    if soft.temperature != 1:
        logits /= soft.temperature
        softened, normalizers = _softmax(logits)
    expected = ((logits.gather(1, soft.ids) - normalizers) * soft.shares).sum(1)
    return _Chunk(probabilities, logps, slopes, expected, softened)


def _part(soft: SoftTargets | None, chunk: slice) -> SoftTargets | None:
    return None if soft is None else soft._replace(ids=soft.ids[chunk], shares=soft.shares[chunk])


def _statistic(probabilities: Tensor, statistic: Statistic) -> Tensor:
    """Return a statistic of distributions [n, vocab], float32 [n]."""
    values: Tensor
    match statistic:
        case "collisions":
            values = torch.linalg.vector_norm(probabilities, dim=-1).log() * 2
        case "entropy":
            values = torch.special.entr(probabilities).sum(dim=-1)
        case "most_likely":  # exact: ids are below 2^24
            values = probabilities.argmax(dim=-1).float()
        case "of_teacher" | "as_teacher":
            raise ValueError(f"{statistic} needs what a batch has of a teacher")
    return values


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden @ weight.T as float32 [n, vocab]: in bf16, logits are wrong by hundredths of a nat."""
    if hidden.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.device.type == "cuda":
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    # On CPUs torch.mm has no float32 output for bf16. The weight is converted by blocks, which fit in caches.
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
        change: LogitChange,
        soft: SoftTargets | None,
    ) -> Tensor:
        count = 1 + (soft is not None) + len(statistics)
        values = torch.empty(count, len(targets), dtype=torch.float32, device=hidden.device)
        chunks = _chunks(len(targets), weight)
        ctx.kept = {}
        for number, chunk in enumerate(chunks):
            computed = _compute(hidden[chunk], weight, bias, targets[chunk], change, _part(soft, chunk))
            rows = [computed.logps]
            if computed.expected is not None:
                rows.append(computed.expected)
            rows += [_statistic(computed.probabilities, statistic) for statistic in statistics]
            for row, of_chunk in enumerate(rows):
                values[row, chunk] = of_chunk
            if number >= len(chunks) - kept_chunks:
                ctx.kept[chunk.start] = computed
        ctx.change = change
        ctx.temperature = 1.0 if soft is None else soft.temperature
        ctx.save_for_backward(hidden, weight, bias, targets, *(soft or ())[:2])
        return values if count > 1 else values[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        grad_logps = grad_values if grad_values.dim() == 1 else grad_values[0]
        hidden, weight, bias, targets, *of_teacher = ctx.saved_tensors
        soft = SoftTargets(of_teacher[0], of_teacher[1], ctx.temperature) if of_teacher else None
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for chunk in reversed(_chunks(len(targets), weight)):  # kept chunks first, to free them
            computed = ctx.kept.pop(chunk.start, None)
            part = _part(soft, chunk)
            if computed is None:
                computed = _compute(hidden[chunk], weight, bias, targets[chunk], ctx.change, part)
            upstream = grad_logps[chunk, None] * ctx.change.scale
            if part is None:
                gradient = computed.probabilities.mul_(-upstream)  # in the chunk's own memory
            else:
                pull = grad_values[1, chunk, None] * (ctx.change.scale / part.temperature)
                wanted = pull * part.shares
                all_wanted = wanted.sum(1, keepdim=True)
                if computed.softened is None:
                    gradient = computed.probabilities.mul_(-upstream - all_wanted)
                else:
                    gradient = computed.probabilities.mul_(-upstream)
                    gradient.addcmul_(computed.softened, -all_wanted)
                gradient.scatter_add_(1, part.ids, wanted)
            gradient.scatter_add_(1, targets[chunk, None], upstream)
            if computed.slopes is not None:
                gradient.mul_(computed.slopes)
            grad_logits = gradient.to(hidden.dtype)
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
            *[None] * 5,
        )


def _add_outer(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits.T @ hidden to `total`, which is float32: in bf16 every chunk would round it again."""
    if hidden.dtype == total.dtype:
        total.addmm_(grad_logits.T, hidden)
    elif hidden.device.type == "cuda":
        torch.addmm(total, grad_logits.T, hidden, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(grad_logits.T.float(), hidden.float())
