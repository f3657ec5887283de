"""Fake tensors of the device go through the packed model: no memory, no kernels, any shape."""

import functools
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_dist.config.schema import AttentionBackend, ModelConfig
from dpo_dist.model.load import load_packed
from dpo_dist.objective.token_logps import token_logps
from tests.simulated_cuda import runs
from tests.support.packing import pack_unkeyed, random_pairs
from tests.support.tiny_model import write_model

LENGTHS = {"as they are": {}, "int64": {"dtype": torch.int64}, "on the host": {"device": "cpu"}}
"""Changes of the cumulative lengths."""


def add_rules() -> None:
    """Trace down to the kernels of attention, and demand what they do: torch's rules check nothing."""
    from torch.nn.attention import varlen

    for operator in (varlen._varlen_attn, varlen._varlen_attn_backward):
        operator.register_fake(operator._init_fn)

    def demand(_mode: Any, kernel: Any, *given: Any, **_options: Any) -> Any:
        for argument, value in zip(kernel._schema.arguments, given, strict=False):
            if argument.name.startswith("cum_seq") and (value.dtype, value.is_cuda) != (torch.int32, True):
                raise RuntimeError(f"{argument.name} is {value.dtype} on {value.device.type}")
        return NotImplemented  # torch's rule follows

    aten, rules = torch.ops.aten, fake_impls.op_implementations_dict
    rules[aten._flash_attention_forward.default] = rules[aten._flash_attention_backward.default] = demand
    rules[aten._pin_memory.default] = lambda _mode, _operator, tensor, *_: torch.empty_like(tensor)


def end_of_trace(folder: str, change: dict[str, Any]) -> str:
    """Trace forward and backward with changed cumulative lengths."""
    from torch.nn.attention import varlen

    cuda, attend = torch.device("cuda"), varlen.varlen_attn

    @functools.wraps(attend)
    def changed(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Any:
        return attend(query, key, value, *(n.to(**change) for n in others[:2]), *others[2:], **options)

    model = load_packed(Path(folder), ModelConfig(attention=AttentionBackend.varlen), 256, cuda).train()
    batch = pack_unkeyed(random_pairs([(30, 20, 25), (3, 4, 1)])).to(cuda)
    varlen.varlen_attn = changed if change else attend
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            logps = model(batch)
            logps.sum().backward()
    except RuntimeError as error:
        return str(error)
    finally:
        varlen.varlen_attn = attend
    return f"{type(logps).__name__} on {logps.device.type}"


class Peak(TorchDispatchMode):
    """The most bytes of the storages that operators return, as long as they live; without those given."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]:
            if storage._cdata not in self._alive:
                self._add(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self._add, storage._cdata, -storage.nbytes())
        return made

    def _add(self, storage: int, count: int) -> None:
        (self._alive.add if count > 0 else self._alive.discard)(storage)
        self.now += count
        self.peak = max(self.peak, self.now)


def peak_of_the_output_layer(vocabulary: int, width: int, targets: int) -> int:
    with FakeTensorMode(), torch.device("cuda"):
        hidden, weight = (torch.empty(n, width, dtype=torch.bfloat16) for n in (targets, vocabulary))
        with Peak(hidden, weight) as memory:
            ids = torch.zeros(targets, dtype=torch.int64)
            token_logps(hidden.requires_grad_(), weight.requires_grad_(), None, ids).sum().backward()
    return memory.peak


def test_lengths_have_the_type_and_device_of_kernels_and_the_peak_is_as_documented(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    ended = runs.run_module(__name__, [f"{tmp_path}/model", f"{tmp_path}/found.json"])
    assert ended.code == 0, ended.output
    ends, peak = json.loads((tmp_path / "found.json").read_text())
    assert ends == {
        "as they are": "FakeTensor on cuda",
        "int64": "cum_seq_q is torch.int64 on cuda",
        "on the host": "cum_seq_q is torch.int32 on cpu",
    }
    assert peak == pytest.approx(4.4e9, rel=0.02), "docs/scaling.md"


if __name__ == "__main__":
    add_rules()
    ends = {name: end_of_trace(sys.argv[1], change) for name, change in LENGTHS.items()}
    Path(sys.argv[2]).write_text(json.dumps([ends, peak_of_the_output_layer(152_064, 3_584, 4_096)]))
