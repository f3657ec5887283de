"""8-bit optimizers number the weights of a process by 31 bits."""

import pytest
import torch

from dpo_dist.distributed.slices import is_eight_bit
from dpo_dist.distributed.zero import _check_lengths as check_lengths
from dpo_dist.foundation.errors import ConfigError

optim = pytest.importorskip("bitsandbytes.optim")


def test_tensors_that_the_kernels_cannot_number_are_refused() -> None:
    optimizer = optim.AdamW8bit([torch.nn.Parameter(torch.zeros(8))])
    too_long = torch.empty(2**31, device="meta")
    assert is_eight_bit(optimizer)
    check_lengths(optimizer, [torch.empty(2**31 - 1, device="meta")])
    check_lengths(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), [too_long])
    with pytest.raises(ConfigError, match="31 bits"):
        check_lengths(optimizer, [too_long])
