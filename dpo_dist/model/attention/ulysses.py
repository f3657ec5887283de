"""Sequence parallelism: several ranks share the tokens of every micro-batch.

The method of DeepSpeed Ulysses (arXiv:2309.14509) on packed sequences. Rank r of n computes the tokens r,
r + n, r + 2n, ... in every layer, and the log-probs of the targets that these tokens predict. In attention,
an all-to-all exchanges tokens for heads: each rank attends over the whole sequence with 1/n of the heads,
prompts shared as without sequence parallelism, and a second all-to-all returns the tokens. The tokens are
dealt out in turn because a long prompt has no targets: with contiguous slices, few ranks would compute the
output layer.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.pack import copy_to_device
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.architectures import WITH_STATES, recorded_arrangement
from dpo_dist.model.attention.kernels import PackedAttention, layer_heads
from dpo_dist.model.attention.sdpa import Scores

KEY = "parallelism.sequence_parallel"


class TokenExchange(Protocol):
    """Differentiable communication between the ranks that share the tokens of a micro-batch."""

    @property
    def rank(self) -> int:
        """Index of this rank in the group."""

    @property
    def ranks(self) -> int:
        """Number of ranks in the group."""

    def all_to_all(self, parts: Tensor) -> Tensor:
        """Send entry i of [ranks, ...] to rank i; return the received entries, [ranks, ...]. Collective."""

    def all_gather(self, part: Tensor) -> Tensor:
        """Return `part` of every rank, [ranks, ...]. Collective.

        Backward returns only the gradient of this rank's entry, because every rank computes the same loss
        from the result.
        """


def check_shared_tokens(model_config: Any, ranks: int) -> None:
    """Check by config.json that `ranks` ranks can share the tokens of a micro-batch.

    If there are more ranks than key heads, several ranks compute with the same key head.
    """
    text = model_config.get_text_config()
    for heads in layer_heads(text):
        if heads.query % ranks or (heads.key % ranks and ranks % heads.key):
            raise ConfigError(
                "the attention heads of this model cannot be divided among so many ranks",
                where=KEY,
                got=f"{ranks}, and the model has {heads.query} query heads and {heads.key} key heads",
                expected="a divisor of the query heads that divides the key heads, or is a multiple of them",
                remedy=f"set {KEY} to such a number",
            )
    if ranks > 1 and recorded_arrangement(text.model_type) is not Arrangement.packed:
        raise sharing_error(text.model_type, ranks)
    if ranks > 1 and text.model_type in WITH_STATES:
        raise sharing_error(text.model_type, ranks, "whose layers hand a state from token to token")


def sharing_error(model_type: str, ranks: int, fault: str = "") -> ConfigError:
    """Return the error for a model whose tokens ranks cannot share, by `fault` or its architecture."""
    why = fault or "which computes each response in a row of its own"
    return ConfigError(
        "sequence parallelism needs layers that mix tokens in packed attention only",
        where=f"{KEY}, model.path",
        got=f"{ranks}, {model_type}, {why}",
        expected=f"{KEY}=1, or a model whose layers mix tokens in attention only",
        remedy=f"set {KEY}=1; model.gradient_checkpointing=full saves memory for long sequences",
    )


@dataclass(frozen=True)
class TokenShare:
    """One rank's share of the tokens and targets of a packed sequence.

    All shares have the same length: a shorter one repeats the last token.
    """

    exchange: TokenExchange
    tokens: Tensor  # int64 [ceil(tokens / ranks)], indices in the sequence
    targets: Tensor  # int64 [own targets], indices of the targets that this rank's tokens predict
    predictors: Tensor  # int64 [own targets], index in `tokens` of the token that predicts each
    _most_targets: int
    _gathered: Tensor

    @classmethod
    def from_predictors(
        cls, exchange: TokenExchange, tokens: int, predictors: npt.NDArray[np.int64], device: torch.device
    ) -> "TokenShare":
        """Return this rank's share; `predictors`, int64 [targets], are indices of tokens."""
        ranks = exchange.ranks
        mine = torch.arange(exchange.rank, exchange.rank + -(-tokens // ranks) * ranks, ranks, device=device)
        owners = predictors % ranks
        by_owner = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=ranks)
        most = int(counts.max())
        starts = np.cumsum(counts) - counts
        targets = by_owner[starts[exchange.rank] :][: counts[exchange.rank]]
        # Where the gather puts target i: each rank has `most` places, filled in the order of its targets.
        numbers = np.empty_like(by_owner)
        numbers[by_owner] = np.arange(len(by_owner))
        gathered = owners * most + numbers - starts[owners]
        copies = (
            copy_to_device(device, values) for values in (targets, predictors[targets] // ranks, gathered)
        )
        own_targets, own_predictors, on_device = copies
        return cls(exchange, mine.clamp(max=tokens - 1), own_targets, own_predictors, most, on_device)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of all targets [..., targets] from own ones [..., own targets]; collective."""
        padded = torch.nn.functional.pad(values, (0, self._most_targets - values.shape[-1]))
        rows = self.exchange.all_gather(padded.movedim(-1, 0).contiguous())
        return rows.flatten(0, 1).index_select(0, self._gathered).movedim(0, -1)

    def local(self, values: Tensor) -> Tensor:
        """Return this rank's part of `values` [tokens], with 0 for a repeated last token."""
        ranks = self.exchange.ranks
        padded = torch.nn.functional.pad(values, (0, len(self.tokens) * ranks - len(values)))
        return padded[self.exchange.rank :: ranks]

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum of `part` over the ranks, equal on all of them; collective.

        Backward returns only the gradient of `part`, because every rank computes the same loss from the sum.
        """
        return self.exchange.all_gather(part).sum(dim=0)


@dataclass
class ExchangedAttention:
    """Packed attention over a sequence of `tokens` tokens, with a share of the heads on each rank."""

    whole: PackedAttention
    exchange: TokenExchange
    tokens: int

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """See `PackedAttention`; the tensors have this rank's tokens and all heads. Collective."""
        ranks = self.exchange.ranks
        repeats = max(1, ranks // key.shape[1])
        if repeats > 1:
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        parts = [tensor.reshape(len(tensor), ranks, -1) for tensor in (query, key, value)]
        received = self.exchange.all_to_all(torch.cat(parts, dim=-1).transpose(0, 1).contiguous())
        sequence = received.transpose(0, 1).flatten(0, 1)[: self.tokens]
        pieces = torch.split(sequence, [part.shape[-1] for part in parts], dim=-1)
        dims = [tensor.shape[-1] for tensor in (query, key, value)]
        heads = [tensor.reshape(self.tokens, -1, dim) for tensor, dim in zip(pieces, dims, strict=True)]
        if scores.sinks is not None:
            scores = replace(scores, sinks=scores.sinks.view(ranks, -1)[self.exchange.rank])
        attended = self.whole(heads[0], heads[1], heads[2], scores).flatten(1)
        padding = len(query) * ranks - self.tokens
        padded = torch.nn.functional.pad(attended, (0, 0, 0, padding)).view(len(query), ranks, -1)
        returned = self.exchange.all_to_all(padded.transpose(0, 1).contiguous())
        return returned.transpose(0, 1).reshape(len(query), query.shape[1], -1)
