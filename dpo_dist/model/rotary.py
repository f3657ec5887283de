"""Rotary frequencies that depend on the length of a sequence, computed for each response by its own length.

`dynamic` and `longrope` RoPE choose the frequencies of all tokens of a forward by its longest sequence, and
`dynamic` also by the forwards before it. In a packed forward every response has the frequencies that a new
model uses for the prompt with this response alone, its last token included. A prompt cannot be shared by
responses with different frequencies: it is repeated (data/regroup.py). Other kinds of RoPE depend on the
position of a token only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dpo_dist.data.packing import PackedBatch
from dpo_dist.data.regroup import regroup

_ORIGINAL = "original_inv_freq"


@dataclass(frozen=True)
class RopeLimits:
    """Lengths above which a model's rotary frequencies change, in tokens.

    Attributes:
        longrope: of layers with two sets of frequencies.
        dynamic: of layers with frequencies of their own for each length; None: there are none.
    """

    longrope: tuple[int, ...]
    dynamic: int | None

    def representative(self, length: int) -> int:
        """Return one length for all that have the frequencies of `length`; 0: those of short sequences."""
        if self.dynamic is not None and length > self.dynamic:
            return length
        return max((limit + 1 for limit in self.longrope if length > limit), default=0)


def rope_limits(model_config: Any) -> RopeLimits | None:
    """Return the limits of a text model's transformers configuration; None if frequencies are fixed."""
    if not getattr(model_config, "rope_parameters", None):
        return None
    model_config.standardize_rope_params()  # as the model does; it may replace the original length
    parameters = model_config.rope_parameters
    of_layers = [value for value in parameters.values() if isinstance(value, dict)]
    longrope, dynamic = set(), None
    for rope in of_layers or [parameters]:
        rope_type = rope.get("rope_type", "default")
        if rope_type == "longrope":
            longrope.add(rope["original_max_position_embeddings"])
        elif "dynamic" in rope_type:
            dynamic = model_config.max_position_embeddings
    return RopeLimits(tuple(sorted(longrope)), dynamic) if longrope or dynamic is not None else None


@dataclass(frozen=True)
class _Arranged:
    """The batch of a packed forward: consecutive tokens whose frequencies are those of one length.

    Attributes:
        positions: int64 [tokens].
        spans: (number of tokens, representative length).
        own: int64, indices of the tokens that this rank computes; None: all.
    """

    positions: Tensor
    spans: tuple[tuple[int, int], ...]
    own: Tensor | None = None


class RotaryByLength:
    """The rotary embeddings of a model, replaced by those that compute each response by its own length.

    Args:
        causal_lm: a transformers model.
        limits: of the model.
    """

    def __init__(self, causal_lm: nn.Module, limits: RopeLimits):
        self._limits = limits
        self.arranged: _Arranged | None = None
        for parent in list(causal_lm.modules()):
            for name, child in list(parent.named_children()):
                if any(buffer.endswith(_ORIGINAL) for buffer, _ in child.named_buffers(recurse=False)):
                    setattr(parent, name, _Rotary(child, self))

    def arrange(self, batch: PackedBatch) -> PackedBatch:
        """Return `batch` for the next forward: examples divided by the frequencies of their responses.

        Its layout, tokens and predictors change; its targets and their order do not.
        """
        lengths = [
            self._limits.representative(prompt + tokens + 1)  # the last token of a response is no input
            for prompt, *responses in batch.layout
            for tokens in responses
        ]
        if len(set(lengths)) == 1:
            spans = _spans([(len(batch.input_ids),)], lengths[:1])
        else:
            regrouped = regroup(batch, lengths)
            batch = replace(
                batch,
                input_ids=batch.input_ids[regrouped.tokens],
                position_ids=batch.position_ids[regrouped.tokens],
                layout=regrouped.layout,
                predictors=regrouped.predictors,
            )
            spans = _spans(regrouped.layout, regrouped.groups)
        self.arranged = _Arranged(batch.position_ids, spans)
        return batch

    def share(self, tokens: Tensor) -> None:
        """Compute a share of the tokens in the next forward: int64 indices in the arranged batch."""
        assert self.arranged is not None
        self.arranged = replace(self.arranged, own=tokens)

    def release(self) -> None:
        """Let the embeddings compute padded batches, as transformers does."""
        self.arranged = None


def _spans(layout: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    entries = groupby(zip(lengths, layout, strict=True), key=lambda entry: entry[0])
    return tuple((sum(sum(pieces) for _, pieces in group), length) for length, group in entries)


class _Rotary(nn.Module):
    """A model's rotary embedding, called once for each length of a packed batch."""

    def __init__(self, rotary: nn.Module, lengths: RotaryByLength):
        super().__init__()
        self.rotary = rotary
        self._lengths = lengths

    def forward(self, hidden: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        arranged = self._lengths.arranged
        if arranged is None:
            return self.rotary(hidden, position_ids, *args, **kwargs)
        positions = arranged.positions.expand(*position_ids.shape[:-1], -1)
        outputs = []
        for span, (tokens, length) in zip(
            torch.split(positions, [tokens for tokens, _ in arranged.spans], dim=-1),
            arranged.spans,
            strict=True,
        ):
            self._forget()
            # The module finds the length of a sequence as its last position and 1.
            last = span.new_full((*span.shape[:-1], 1 if length else 0), length - 1)
            computed = self.rotary(hidden, torch.cat((span, last), dim=-1), *args, **kwargs)
            outputs.append([part[..., :tokens, :] for part in computed])  # cosines and sines
        self._forget()
        parts = [torch.cat(part, dim=-2) for part in zip(*outputs, strict=True)]
        return tuple(part if arranged.own is None else part[..., arranged.own, :] for part in parts)

    def _forget(self) -> None:
        """Make the embedding that of a model that has seen no sequence."""
        rotary: Any = self.rotary
        for name, original in list(rotary.named_buffers(recurse=False)):
            if not name.endswith(_ORIGINAL):
                continue
            prefix = name.removesuffix(_ORIGINAL)
            if isinstance(getattr(rotary, f"{prefix}max_seq_len_cached", None), Tensor):  # of a long sequence
                setattr(rotary, f"{prefix}inv_freq", original)
                setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
