"""The largest memory of the output layer, on fake tensors of the device: no memory, no kernels, any shape."""

import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_dist.objective.token_logps import token_logps
from tests.simulated_cuda import runs


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


def test_the_peak_of_the_output_layer_is_as_documented() -> None:
    ended = runs.run_module(__name__, ["152064", "3584", "4096"])
    assert ended.code == 0, ended.output
    assert float(ended.output.split()[-1]) == pytest.approx(4.4e9, rel=0.02), "docs/scaling.md"


if __name__ == "__main__":
    print(peak_of_the_output_layer(*map(int, sys.argv[1:])))
