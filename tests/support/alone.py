"""A world of one process, for what needs no other rank."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor

from dpo_dist.distributed.processes.world import Peer, World

T = TypeVar("T")


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    size: int = 1
    is_main: bool = True
    replicas: int = 1
    replica: int = 0
    leads: bool = True
    host: str = "this host"
    peers: tuple[Peer, ...] = (Peer(0, "this host", 0, "this host"),)
    shards: None = None
    experts: None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def barrier(self) -> None: ...

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def sum_replicas(self, tensor: Tensor) -> Tensor:
        return tensor

    def agree(self, flag: bool) -> bool:
        return flag

    def gather(self, value: T) -> list[T]:
        return [value]

    def differences(self, facts: Mapping[str, str]) -> dict[str, str]:
        return {}

    def on_main(self, work: Callable[[], T]) -> T:
        return work()

    def together(self, work: Callable[[], T]) -> T:
        return work()


ALONE = cast(World, _Alone())
