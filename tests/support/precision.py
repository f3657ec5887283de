"""Precisions in which this CPU trains."""

import pytest
import torch

from dpo_dist.config.schema import Dtype

HAS_FP16 = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
NEEDS_FP16 = pytest.mark.skipif(not HAS_FP16, reason="this CPU does not compute in fp16")
DTYPES = [pytest.param(dtype, marks=NEEDS_FP16 if dtype is Dtype.fp16 else ()) for dtype in Dtype]
