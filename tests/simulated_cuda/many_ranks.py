"""One process is rank 0 of any number: the calls and the memory of a step, on torch's fake process group.

`python -m tests.simulated_cuda.many_ranks MODEL OUT` in a process with the simulated device writes those of
every kind of parallelism and size of `WORLDS` as JSON. The calls communicate nothing, so losses mean nothing.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_dist.config.optim_schema import OptimConfig
from dpo_dist.config.schema import Dtype, ModelConfig, ParallelismConfig, ParallelismKind
from dpo_dist.distributed.deepspeed_config import policy_config
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.joined import start_world, stop_world
from dpo_dist.model.load import load_packed
from tests.support.packing import pack_unkeyed, random_pairs

WORLDS = [*product(ParallelismKind, (8, 1024))]
_PAIRS = [(30, 20, 25), (3, 4, 1)]


@dataclass(frozen=True)
class Step:
    """What rank 0 does in a step.

    Attributes:
        matrices: number of elements of each weight that decays.
        vectors: the same of the others.
        started: bytes of the device after the start.
        before_update: bytes after the backward of the third step, with gradients and the states of Adam.
        stepped: bytes after it.
        calls: collective calls of the third step in their order, with the bytes of the whole tensors.
    """

    matrices: list[int]
    vectors: list[int]
    started: int
    before_update: int
    stepped: int
    calls: list[tuple[str, int]]


class _Calls(TorchDispatchMode):
    """Notes collective calls, in the backward, too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            sides = [[leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args]
            self.found.append((function._schema.name.removeprefix("c10d::").strip("_"), max(map(sum, sides))))
        return function(*args, **(kwargs or {}))


@contextmanager
def _rank_0_of(ranks: int) -> Iterator[None]:
    """Be rank 0; groups of any backend are fake."""
    place = {"RANK": 0, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
    variables = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
    new_group: Callable[..., Any] = dist.new_group

    def fake_group(*args: Any, **options: Any) -> Any:
        return new_group(*args, **{**options, "backend": "fake"})

    with mock.patch.dict(os.environ, variables), mock.patch.object(dist, "new_group", fake_group):
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        yield


def step(model: Path, kind: ParallelismKind, ranks: int, dtype: Dtype = Dtype.bf16) -> Step:
    """Return what rank 0 of `ranks` does in a step of the project's own engine."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    with _rank_0_of(ranks):
        parallelism, optim = ParallelismConfig(kind=kind), OptimConfig()
        world = start_world(policy_config(parallelism, optim, dtype), parallelism.timeout_seconds)
        loaded = load_packed(model, ModelConfig(dtype=dtype), 256, world.device)
        policy = PolicyEngine(loaded, optim, world)
        policy.train()
        shapes = [getattr(weight, "ds_shape", weight.shape) for weight in loaded.parameters()]
        lengths = [[shape.numel() for shape in shapes if (len(shape) > 1) is many] for many in (True, False)]
        batch = pack_unkeyed(random_pairs(_PAIRS)).to(world.device)
        used = [torch.cuda.memory_allocated()]
        for _ in range(3):  # in the second, DeepSpeed's ranks compare the order in which they gather
            with _Calls() as calls:
                policy.backward(policy.token_logps(batch).sum(), is_last=True)
                used[1:] = [torch.cuda.memory_allocated()]
                policy.step(1e-6)
        used.append(torch.cuda.memory_allocated())
        policy.free()
        stop_world()
    return Step(*lengths, *(count - before for count in used), calls.found)


def main() -> None:
    model, out = map(Path, sys.argv[1:])
    gc.freeze()  # DeepSpeed collects garbage each time it says how much memory there is
    steps = {f"{kind.value} {ranks}": asdict(step(model, kind, ranks)) for kind, ranks in WORLDS}
    out.write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
