"""Optimizer states in 8 bits (Dettmers et al., arXiv:2110.02861), as bitsandbytes keeps them, and in float32.

A state is cut into blocks of 256 elements. Each element is the number of an entry of a codebook, and each
block has a scale, its largest magnitude. A checkpoint has the products, in float32, which other worlds can
cut in other places.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dpo_dist.foundation.errors import ConfigError

_BLOCK = 256
_CHUNK = 2**14 * _BLOCK
"""Elements that are converted at a time, to bound memory."""
_MOMENTS = {"exp_avg": ("state1", "qmap1", "absmax1"), "exp_avg_sq": ("state2", "qmap2", "absmax2")}
"""Names of state, codebook and scales of bitsandbytes by the name of the state in AdamW of PyTorch."""
_MOST_ELEMENTS = 2**31 - 1
_NEIGHBOURS = (1, -1, 2, -2)
"""Distances, in float32 numbers, from a scale that is computed to the one that was divided out."""


def is_eight_bit(optimizer: object) -> bool:
    """Return whether an optimizer is one of bitsandbytes."""
    return type(optimizer).__module__.startswith("bitsandbytes")


def check_lengths(optimizer: object, masters: Iterable[Tensor]) -> None:
    """Check that the kernels of an 8-bit optimizer can number the elements of each master tensor.

    Raises:
        ConfigError: they cannot; on all ranks, whose tensors have equal lengths.
    """
    longest = max(map(torch.numel, masters), default=0)
    if is_eight_bit(optimizer) and longest > _MOST_ELEMENTS:
        raise ConfigError(
            "the kernels of adamw_8bit number the weights of a process by 31 bits",
            where="optim.kind",
            got=f"{longest:,} weights in one tensor of a process",
            expected=f"at most {_MOST_ELEMENTS:,}",
            remedy="set parallelism=zero3, which cuts them into groups of 1e9, or optim.kind=adamw",
        )


def create_states(optimizer: Any, master: Tensor, step: int) -> None:
    """Create the states of a master tensor if there are none, and set the number of updates.

    ZeRO-3 puts a master tensor into its parameter group for the time of an update only, as is done here.
    """
    if not optimizer.state[master]:
        group = optimizer.param_groups[0]
        params, group["params"] = group["params"], [master]
        optimizer.init_state(group, master, 0, 0)
        group["params"] = params
    optimizer.state[master]["step"] = step


def to_float32(states: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return both moments of a master tensor by PyTorch's names, float32 copies in host memory."""
    if not states:
        return {}
    return {
        name: _product(states[state], states.get(codebook), states.get(scales))
        for name, (state, codebook, scales) in _MOMENTS.items()
    }


def from_float32(moments: Mapping[str, Tensor], states: Mapping[str, Any]) -> None:
    """Set the states of a master tensor to `moments`, or the nearest that 8 bits can be.

    Those of `to_float32` are set exactly: the products are the same again, if not every scale.
    """
    for name, (state, codebook, scales) in _MOMENTS.items():
        target, moment = states[state], moments[name]
        if target.dtype == torch.float32:  # bitsandbytes leaves small tensors as they are
            target.copy_(moment)
            continue
        for start in range(0, len(moment), _CHUNK):
            part = moment[start : start + _CHUNK].to(target.device)
            blocks = torch.nn.functional.pad(part, (0, -len(part) % _BLOCK)).view(-1, _BLOCK)
            codes, block_scales = _quantize(blocks, states[codebook])
            target[start : start + _CHUNK] = codes.view(-1)[: len(part)]
            first = start // _BLOCK
            states[scales][first : first + len(block_scales)] = block_scales


def _product(codes: Tensor, codebook: Tensor | None, scales: Tensor | None) -> Tensor:
    """Return a state in float32, [elements], in host memory; codes without a codebook are it already."""
    if codebook is None or scales is None:
        return codes.detach().to("cpu", copy=True)
    product = torch.empty(codes.shape, dtype=torch.float32)
    for start in range(0, len(codes), _CHUNK):
        part = codes[start : start + _CHUNK]
        first = start // _BLOCK
        of_elements = scales[first : first + _CHUNK // _BLOCK].repeat_interleave(_BLOCK)[: len(part)]
        product[start : start + _CHUNK] = codebook[part.int()] * of_elements
    return product


def _quantize(blocks: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [blocks, 256], and scales [blocks], whose products are `blocks`, if such exist.

    The largest magnitude of a block was the first or the last entry of the codebook times the scale. A
    quotient may be another float32 number than the scale was, and its neighbours are tried.
    """
    high, low = blocks.amax(1), blocks.amin(1)
    scales = high / codebook[-1]
    if codebook[0] < 0:
        scales = torch.where(high > -low, scales, low / codebook[0])
    codes = _nearest(blocks, scales, codebook)
    first = scales.clone()
    for distance in _NEIGHBOURS:
        wrong = (_times(codes, scales, codebook) != blocks).any(1).nonzero().view(-1)
        if not len(wrong):
            break
        others = (first[wrong].view(torch.int32) + distance).view(torch.float32)
        found = _nearest(blocks[wrong], others, codebook)
        right = (_times(found, others, codebook) == blocks[wrong]).all(1)
        codes[wrong[right]], scales[wrong[right]] = found[right], others[right]
    return codes, scales


def _nearest(blocks: Tensor, scales: Tensor, codebook: Tensor) -> Tensor:
    """Return the number of the nearest entry of an ascending codebook for each element, uint8."""
    borders = (codebook[1:] + codebook[:-1]) / 2
    smallest = torch.finfo(torch.float32).tiny
    return torch.bucketize(blocks / scales.clamp(min=smallest)[:, None], borders).to(torch.uint8)


def _times(codes: Tensor, scales: Tensor, codebook: Tensor) -> Tensor:
    return codebook[codes.int()] * scales[:, None]
