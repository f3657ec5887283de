"""A trained model on one process in place of an engine."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.objective.token_logps import Statistic


class OneProcess:
    def __init__(self, model: torch.nn.Module):
        self.model = model

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def token_logps(self, batch: PackedBatch, statistics: Sequence[Statistic] = ()) -> Tensor:
        logps: Tensor = self.model(batch, statistics=statistics)
        return logps

    @torch.no_grad()
    def base_token_logps(self, batch: PackedBatch) -> Tensor:
        return self.token_logps(batch)

    def backward(self, loss: Any, is_last: bool) -> None:
        loss.backward()

    def step(self, rate: float) -> Tensor:
        return torch.zeros(())
