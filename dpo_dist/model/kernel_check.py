"""Compare a kernel with plain PyTorch on this device.

The check at start (exactness.py) compares log-probs only: it would not notice a wrong gradient.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpo_dist.batching.prefix_tree import Segment
from dpo_dist.foundation.errors import first_line

# Short and empty segments, rows that branch off in several places, and one longer than a kernel's block.
_SHARED_AND_OWN = (0, 8), (5, 7), (3, 2), (0, 2), (2, 4), (0, 602), (600, 1), (601, 0), (350, 9), (4, 3)
TRIAL = [Segment(row, *tokens) for row, tokens in enumerate(_SHARED_AND_OWN)]
TRIAL_TOKENS = sum(segment.own for segment in TRIAL)
# Allowed difference, as a share of the largest value. In bf16, gradients of keys and values differ by 0.013
# (SDPA, 32 heads of 128 in 8 groups); a wrong mask makes them differ by about 1.
_TOLERANCE = 0.05


def kernel_fault(
    plain: Callable[..., Tensor],
    kernel: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> str:
    """Return which output or gradient of `kernel` differs beyond rounding; empty if none.

    Both map the inputs, by their names, to an output; `plain` gets them in float32, rounded to `dtype` first.
    """
    rounded = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    results = []
    try:
        for function, precision in ((plain, torch.float32), (kernel, dtype)):
            leaves = {
                name: tensor.to(precision, copy=True).requires_grad_() for name, tensor in rounded.items()
            }
            with torch.enable_grad():
                output = function(**leaves)
            slopes = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(
                output.device, dtype
            )
            gradients = torch.autograd.grad(output, tuple(leaves.values()), slopes.to(output.dtype))
            results.append((output.detach(), *gradients))
    except torch.OutOfMemoryError:  # not the kernel's fault
        raise
    except Exception as error:  # a kernel can raise anything
        return first_line(error)
    names = ("output", *(f"gradient of the {name}" for name in inputs))
    for name, expected, got in zip(names, *results, strict=True):
        difference = float((got - expected).abs().max() / expected.abs().max())
        if not difference < _TOLERANCE:
            return f"its {name} differs from plain PyTorch's by {difference:.2g}"
    return ""
