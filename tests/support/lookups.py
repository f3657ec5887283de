"""Count a model's forwards without a hook: hooks of others switch packing off in trainers of TRL."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


@contextmanager
def recorded_lookups(model: Any, counts: Callable[[], bool] = lambda: True) -> Iterator[list[torch.Size]]:
    """Record the shapes of token ids, [rows, tokens], that a model looks up in the block where they count."""
    lookup = torch.nn.functional.embedding
    shapes = list[torch.Size]()

    def recording(ids: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if weight is model.get_input_embeddings().weight and counts():
            shapes.append(ids.shape)
        return lookup(ids, weight, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", recording)
        yield shapes
