"""Rotary frequencies that depend on the length of a sequence, computed for each response by its own length.

`dynamic` and `longrope` RoPE choose the frequencies of all tokens of a forward by its longest sequence, and
`dynamic` also by the forwards before it. In a packed forward every response has the frequencies that a new
model uses for the prompt with this response alone, its last token included. A prompt cannot be shared by
responses with different frequencies: it is repeated (data/regroup.py). Other kinds of RoPE depend on the
position of a token only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_dist.data.packing import PackedBatch, copied_to
from dpo_dist.data.regroup import regroup
from dpo_dist.data.rope_limits import RopeLimits

_ORIGINAL = "original_inv_freq"


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
    """The batch of a forward, in consecutive parts whose frequencies are those of one length.

    Attributes:
        parts: (number of tokens, or of rows; representative length).
        positions: int64 [tokens] of one packed sequence; None: the batch has a response in each row.
        rows: number of inputs of each row.
        own: int64, indices of the tokens that this rank computes; None: all.
    """

    parts: tuple[tuple[int, int], ...]
    positions: Tensor | None = None
    rows: tuple[int, ...] = ()
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
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        for parent in list(causal_lm.modules()):
            for name, child in list(parent.named_children()):
                if _originals(child):
                    self._replaced.append((parent, name, child))
                    setattr(parent, name, _Rotary(child, self))

    @classmethod
    def of(cls, causal_lm: Any) -> "RotaryByLength | None":
        """Return those of a model; None if its frequencies are fixed."""
        limits = rope_limits(causal_lm.config.get_text_config())
        return None if limits is None else cls(causal_lm, limits)

    def mixes(self, longest: int) -> bool:
        """Return whether responses of up to `longest` tokens change the frequencies of others in a forward.

        They do in code of the model's own, which keeps no frequencies of short sequences to return to.
        """
        return not self._replaced and bool(self._limits.representatives(np.array([longest])).any())

    def arrange(self, batch: PackedBatch) -> PackedBatch:
        """Return `batch` for the next packed forward: examples divided by the frequencies of their responses.

        Its layout, tokens and predictors change; its targets and their order do not.
        """
        lengths = self._representatives(
            [prompt + tokens for prompt, *responses in batch.layout for tokens in responses]
        )
        if len(set(lengths)) == 1:
            parts = _parts([len(batch.input_ids)], lengths[:1])
        else:
            regrouped = regroup(batch, lengths)
            batch = replace(
                batch,
                input_ids=batch.input_ids[regrouped.tokens],
                position_ids=batch.position_ids[regrouped.tokens],
                layout=regrouped.layout,
                target_places=np.stack((batch.target_places[0], regrouped.predictors)),
            )
            parts = _parts(map(sum, regrouped.layout), regrouped.groups)
        self.arranged = _Arranged(parts, batch.position_ids)
        return batch

    def arrange_rows(self, lengths: Sequence[int]) -> None:
        """Compute one response in each row of the next forward; with its prompt it has so many inputs."""
        parts = _parts([1] * len(lengths), self._representatives(lengths))
        self.arranged = _Arranged(parts, rows=tuple(lengths))

    def share(self, tokens: Tensor) -> None:
        """Compute a share of the tokens in the next forward: int64 indices in the arranged batch."""
        assert self.arranged is not None
        self.arranged = replace(self.arranged, own=tokens)

    def release(self) -> None:
        """Let the embeddings compute padded batches, as transformers does."""
        self.arranged = None

    def restore(self) -> None:
        """Give the model its own embeddings back, as if they had seen no sequence."""
        for parent, name, own in self._replaced:
            _forget(own)
            setattr(parent, name, own)

    def _representatives(self, inputs: Sequence[int]) -> list[int]:
        lengths = np.array(inputs) + 1  # the last token of a response is no input
        found: list[int] = self._limits.representatives(lengths).tolist()
        return found


def _parts(sizes: Iterable[int], lengths: Iterable[int]) -> tuple[tuple[int, int], ...]:
    entries = groupby(zip(sizes, lengths, strict=True), key=lambda entry: entry[1])
    return tuple((sum(size for size, _ in group), length) for length, group in entries)


class _Rotary(nn.Module):
    """A model's rotary embedding, called once for each part of a batch."""

    def __init__(self, rotary: nn.Module, lengths: RotaryByLength):
        super().__init__()
        self.rotary = rotary
        self._lengths = lengths

    def forward(self, hidden: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        arranged = self._lengths.arranged
        if arranged is None:
            return self.rotary(hidden, position_ids, *args, **kwargs)
        sizes = [size for size, _ in arranged.parts]
        if arranged.positions is None:
            ends = copied_to(position_ids.device, np.array(arranged.rows))[:, None]
            # Positions of padding would make a row longer.
            positions, dim = torch.minimum(position_ids, ends - 1), -2
        else:
            positions, dim = arranged.positions.expand(*position_ids.shape[:-1], -1), -1
        outputs = []
        for part, (_, length) in zip(torch.split(positions, sizes, dim), arranged.parts, strict=True):
            _forget(self.rotary)
            # The module finds the length of a sequence as its last position and 1.
            last = part.new_full((*part.shape[:-1], 1 if length else 0), length - 1)
            # `forward`, not a call: ZeRO-3 expects of all ranks the same calls of modules (law L2).
            computed = self.rotary.forward(hidden, torch.cat((part, last), dim=-1), *args, **kwargs)
            outputs.append([values[..., : part.shape[-1], :] for values in computed])  # cosines and sines
        _forget(self.rotary)
        joined = [torch.cat(values, dim=dim - 1) for values in zip(*outputs, strict=True)]
        return tuple(values if arranged.own is None else values[..., arranged.own, :] for values in joined)


def _originals(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the names and values of a module's buffers that keep the frequencies of short sequences.

    They may be the same tensors as the frequencies in use.
    """
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return [(name, buffer) for name, buffer in buffers if name.endswith(_ORIGINAL)]


def _forget(rotary: Any) -> None:
    """Make an embedding that of a model that has seen no sequence."""
    for name, original in _originals(rotary):
        prefix = name.removesuffix(_ORIGINAL)
        if isinstance(getattr(rotary, f"{prefix}max_seq_len_cached", None), Tensor):  # of a long sequence
            setattr(rotary, f"{prefix}inv_freq", original)
            setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
