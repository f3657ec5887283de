"""Log-probs of tokens from hidden states, in chunks: no [tokens, vocab] tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_dist.objective.distillation import SoftTargets, SparseRows, WholeTargets, generalized_jsd

# Float32 logits computed at a time: they fit in a CPU's caches, and fill a GPU's matrix units.
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
# A GPU has memory for so many chunks: those of one with less than 64 GiB are smaller.
_CHUNKS_IN_MEMORY = 128
# Rows of the output layer's weight converted to float32 at a time, on a CPU.
_BLOCK_ROWS = 2048
# Chunks of probabilities kept for backward: to keep all would save up to a quarter of the head's time.
_KEPT_CHUNKS = 4

Statistic = Literal["collisions", "entropy", "agreement", "of_teacher", "as_teacher"]
"""A value of the distribution at each target, beside the log-prob of the target (`token_logps`).

Two are of a packed model and what its batch has of a teacher: the mean of the model's log-probs under the
teacher's rows, or the divergence from its whole distributions, which comes first and has a gradient; and the
rows or states of the model as a teacher, in place of all other values.
"""

_Wanted = SoftTargets | WholeTargets


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
    soft: _Wanted | None = None,
) -> Tensor:
    """Return the log-prob of each target under softmax(change(hidden @ weight.T + bias)), in chunks.

    Logits exist for one chunk of positions at a time. Backward keeps the probabilities of the last few chunks
    and recomputes the others. Logits and softmax are float32.

    Args:
        hidden: [targets, hidden_size], the state that predicts each target.
        weight: [vocab, hidden_size], possibly more precise than the states.
        statistics: also return these, without a graph. `collisions`: the log of the sum of p(v)^2 over the
            vocabulary. `entropy`: the negative sum of p(v) log p(v), in nats. `agreement`: 1 where the
            largest p(v) is that of the id that `soft` has as most likely, else 0.
        soft: also return the mean of log-probs over these distributions, or the divergence from whole ones,
            as differentiable as the log-probs.

    Returns:
        float32 [targets]; with `soft` or statistics float32 [1 + soft + statistics, targets], in this order.
    """
    kept_chunks = _KEPT_CHUNKS if torch.is_grad_enabled() else 0
    # A kept chunk may also have slopes, or what `soft` needs, as large as its probabilities.
    has_pull = isinstance(soft, WholeTargets) or (soft is not None and soft.temperature != 1)
    kept_chunks //= 1 + (change.softcap is not None) + has_pull
    values: Tensor = _ChunkedTokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden.to(weight.dtype), weight, bias, targets, kept_chunks, tuple(statistics), change, soft
    )
    return values


def logps_of_logits(
    logits: Tensor, targets: Tensor, statistics: Sequence[Statistic] = (), soft: _Wanted | None = None
) -> Tensor:
    """Return the same as `token_logps` from logits that exist, [targets, vocab]; the softmax is float32."""
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    logps = log_probabilities.gather(1, targets[:, None]).squeeze(1)
    if not statistics and soft is None:
        return logps
    probabilities = log_probabilities.detach().exp()
    rows = [logps]
    likeliest = None
    if isinstance(soft, WholeTargets):
        wanted = soft.log_softmax()
        rows.append(generalized_jsd(soft.kept.log_softmax(logits), wanted, soft.kept.mix)[0])
        likeliest = wanted.argmax(1)
    elif soft is not None:
        softened = torch.log_softmax(logits.float() / soft.temperature, dim=-1)
        rows.append((softened.gather(1, soft.ids) * soft.shares).sum(1))
        likeliest = soft.ids[:, 0]
    rows += [_statistic(probabilities, statistic, likeliest) for statistic in statistics]
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
        logits = changed_logits(hidden[chunk], weight, bias, change)
        rows[chunk] = kept.rows(torch.softmax(logits / kept.temperature, dim=-1), uniforms[chunk])
    return rows


def rows_of_logits(logits: Tensor, uniforms: Tensor, kept: SparseRows) -> Tensor:
    """Return the same as `teacher_rows` from logits that exist, [positions, vocab]."""
    return kept.rows(torch.softmax(logits.float() / kept.temperature, dim=-1), uniforms)


def changed_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, change: LogitChange = UNCHANGED
) -> Tensor:
    """Return change(hidden @ weight.T + bias), float32 [n, vocab], without a graph."""
    return _changed_logits(hidden.to(weight.dtype), weight, bias, change)[0]


def float32_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden @ weight.T + bias as float32, with a graph."""
    logits = torch.nn.functional.linear(hidden.float(), weight.float())
    return logits if bias is None else logits + bias.float()


def chunk_bytes(memory: float) -> float:
    """Return the bytes of float32 logits that a GPU with so many bytes of memory computes at a time."""
    return min(_CHUNK_BYTES["cuda"], memory / _CHUNKS_IN_MEMORY)


def _chunks(positions: int, weight: Tensor, soft: _Wanted | None = None) -> list[slice]:
    device = weight.device
    chunk: float = _CHUNK_BYTES["cpu"]
    if device.type == "cuda":
        chunk = chunk_bytes(torch.cuda.get_device_properties(device).total_memory)
    if isinstance(soft, WholeTargets):  # of which about eight tensors of a chunk's size live at once
        chunk /= 4
    size = max(1, int(chunk) // (4 * len(weight)))
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


@dataclass(frozen=True)
class _Chunk:
    """The distributions at some positions, float32 [n, vocab], and the log-probs of the targets.

    `slopes`: float32 [n, vocab], derivative of each changed logit with respect to the product of the output
    layer, without the factor `LogitChange.scale`; None: 1. Three are of a teacher: `of_teacher`, the mean
    log-probs or the divergence; `pull`, the distributions at another temperature than 1, or the derivatives
    of the divergence with respect to logits at its temperature; `likeliest`, the teacher's most likely ids.
    """

    probabilities: Tensor
    logps: Tensor
    slopes: Tensor | None
    of_teacher: Tensor | None = None
    pull: Tensor | None = None
    likeliest: Tensor | None = None


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
    soft: _Wanted | None,
) -> _Chunk:
    """Return the distributions at positions with these hidden states."""
    logits, slopes = _changed_logits(hidden, weight, bias, change)
    probabilities, normalizers = _softmax(logits)
    logps = (logits.gather(1, targets[:, None]) - normalizers).squeeze(1)
    if soft is None:
        return _Chunk(probabilities, logps, slopes)
    if isinstance(soft, WholeTargets):
        wanted = soft.log_softmax()
        divergences, pull = generalized_jsd(soft.kept.log_softmax(logits), wanted, soft.kept.mix)
        return _Chunk(probabilities, logps, slopes, divergences, pull, wanted.argmax(1))
    softened = None
    if soft.temperature != 1:
        logits /= soft.temperature
        softened, normalizers = _softmax(logits)
    expected = ((logits.gather(1, soft.ids) - normalizers) * soft.shares).sum(1)
    return _Chunk(probabilities, logps, slopes, expected, softened, soft.ids[:, 0])


def _part(soft: _Wanted | None, chunk: slice) -> _Wanted | None:
    if soft is None:
        return None
    if isinstance(soft, WholeTargets):
        return soft._replace(states=soft.states[chunk])
    return soft._replace(ids=soft.ids[chunk], shares=soft.shares[chunk])


def _statistic(probabilities: Tensor, statistic: Statistic, likeliest: Tensor | None) -> Tensor:
    """Return a statistic of distributions [n, vocab], float32 [n]; `likeliest`: the teacher's ids, [n]."""
    values: Tensor
    match statistic:
        case "collisions":
            values = torch.linalg.vector_norm(probabilities, dim=-1).log() * 2
        case "entropy":
            values = torch.special.entr(probabilities).sum(dim=-1)
        case "agreement":
            assert likeliest is not None
            values = (probabilities.argmax(dim=-1) == likeliest).float()
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
        soft: _Wanted | None,
    ) -> Tensor:
        count = 1 + (soft is not None) + len(statistics)
        values = torch.empty(count, len(targets), dtype=torch.float32, device=hidden.device)
        chunks = _chunks(len(targets), weight, soft)
        ctx.kept = {}
        for number, chunk in enumerate(chunks):
            computed = _compute(hidden[chunk], weight, bias, targets[chunk], change, _part(soft, chunk))
            rows = [computed.logps]
            if computed.of_teacher is not None:
                rows.append(computed.of_teacher)
            rows += [
                _statistic(computed.probabilities, statistic, computed.likeliest) for statistic in statistics
            ]
            for row, of_chunk in enumerate(rows):
                values[row, chunk] = of_chunk
            if number >= len(chunks) - kept_chunks:
                ctx.kept[chunk.start] = computed
        ctx.change = change
        ctx.soft = soft
        ctx.save_for_backward(hidden, weight, bias, targets)
        return values if count > 1 else values[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        grad_logps = grad_values if grad_values.dim() == 1 else grad_values[0]
        hidden, weight, bias, targets = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for chunk in reversed(_chunks(len(targets), weight, ctx.soft)):  # kept chunks first, to free them
            computed = ctx.kept.pop(chunk.start, None)
            part = _part(ctx.soft, chunk)
            if computed is None:
                computed = _compute(hidden[chunk], weight, bias, targets[chunk], ctx.change, part)
            upstream = grad_logps[chunk, None] * ctx.change.scale
            if part is None:
                gradient = computed.probabilities.mul_(-upstream)  # in the chunk's own memory
            elif isinstance(part, WholeTargets):
                gradient = computed.probabilities.mul_(-upstream)
                pulled = grad_values[1, chunk, None] * (ctx.change.scale / part.kept.temperature)
                gradient[:, : part.kept.vocabulary].addcmul_(computed.pull, pulled)
            else:
                pull = grad_values[1, chunk, None] * (ctx.change.scale / part.temperature)
                wanted = pull * part.shares
                all_wanted = wanted.sum(1, keepdim=True)
                if computed.pull is None:
                    gradient = computed.probabilities.mul_(-upstream - all_wanted)
                else:
                    gradient = computed.probabilities.mul_(-upstream)
                    gradient.addcmul_(computed.pull, -all_wanted)
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
