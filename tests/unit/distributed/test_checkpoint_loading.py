"""Ranks that share micro-batches continue with the same random numbers, whoever saved them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.distributed.checkpoint import (
    Checkpoint,
    load_checkpoint,
    random_states,
    random_states_name,
)
from dpo_dist.distributed.sequence_parallel import SequenceGroup
from dpo_dist.distributed.world import World

CPU = torch.device("cpu")


class Alone(World):
    """A rank that asks no other one."""

    def together(self, work: Any, while_waiting: Any = None) -> Any:
        return work()


@pytest.mark.parametrize("saved_ranks", [1, 2, 4])
def test_ranks_of_a_replica_draw_the_same_numbers(saved_ranks: int, tmp_path: Path) -> None:
    for rank in range(saved_ranks):
        torch.manual_seed(rank)
        (tmp_path / random_states_name(rank)).write_text(random_states(CPU))
    drawn = []
    for rank in range(4):
        group = SequenceGroup(rank % 2, 2, None)
        world = Alone(accelerator=None, rank=rank, size=4, device=CPU, peers=(), sequence=group)
        load_checkpoint(Checkpoint(tmp_path, {"world_size": saved_ranks}), [], world)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
