"""Precisions in which this CPU trains."""

import pytest
import torch

from dpo_dist.config.schema import Dtype

NEEDS_FP16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this CPU does not compute in fp16"
)
DTYPES = [pytest.param(dtype, marks=NEEDS_FP16 if dtype is Dtype.fp16 else ()) for dtype in Dtype]
