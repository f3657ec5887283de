"""Read the experts of one process from a folder's files, and leave there those of the others."""

from collections import defaultdict
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.experts import ExpertShare
from dpo_dist.model.files.folder import weight_files
from dpo_dist.model.files.stored import RowChoice
from dpo_dist.model.library_internals import join_tensors, place_in_model, transposed_by


class OwnExperts:
    """The experts of one process in the weight files of a folder.

    In files, each expert of a layer has tensors of its own, or the experts are the rows of a stacked tensor.

    Args:
        causal_lm: the model of the folder, on the meta device.
        open_file: opens a weight file as `safe_open` does.
        names: the stacked weights that are read.

    Attributes:
        shapes: of the weights with only these experts, by name.
        rows: which rows are read of a tensor of experts, by its name in the files; None if it is not read.
    """

    def __init__(
        self,
        causal_lm: Any,
        folder: Path,
        open_file: Callable[[Path], Any],
        names: Collection[str],
        share: ExpertShare,
    ) -> None:
        self.shapes = dict[str, torch.Size]()
        self.rows = dict[str, RowChoice]()
        self._causal_lm = causal_lm
        self._files = dict[str, Any]()  # of each tensor in the files
        for file in weight_files(folder):
            if file.suffix != ".json":
                opened = open_file(file)
                self._files |= dict.fromkeys(opened.keys(), opened)
        # The tensors of each weight and, by the patterns of their names, of each part that is joined to it.
        self._parts: dict[str, dict[str | None, list[str]]] = {name: defaultdict(list) for name in names}
        find_place = place_in_model(causal_lm)
        for tensor in sorted(self._files, key=_numbers):
            name, pattern = find_place(tensor)
            if name in self._parts:
                self._parts[name][pattern].append(tensor)
        for name, parts in self._parts.items():
            experts, *others = causal_lm.get_parameter(name).shape
            own = share.of(experts)
            self.shapes[name] = torch.Size((own.stop - own.start, *others))
            for pattern, tensors in parts.items():
                parts[pattern] = self._choose(name, tensors, experts, own)

    def _choose(self, name: str, tensors: list[str], experts: int, own: slice) -> list[str]:
        """Set which rows are read of the tensors of a weight, and return those that are read."""
        if len(tensors) == experts:
            self.rows |= dict.fromkeys(tensors)
            self.rows |= dict.fromkeys(tensors[own], ...)
            return tensors[own]
        shape = self._files[tensors[0]].get_slice(tensors[0]).get_shape()
        if len(tensors) == 1 and shape[0] == experts:
            self.rows[tensors[0]] = own
            return tensors
        raise ConfigError(
            "the experts of this model cannot be read apart from each other",
            where="parallelism.experts",
            got=f"{name} of {experts} experts, in {len(tensors)} tensors such as {tensors[0]} {shape}",
            expected="a tensor for each expert, or one with all experts as its rows",
            remedy="remove parallelism.experts",
        )

    def read(self, name: str) -> Tensor:
        """Return a weight with only the experts of this process."""
        tensors = {
            pattern: [partial(self._read, tensor) for tensor in tensors]
            for pattern, tensors in self._parts[name].items()
        }
        with transposed_by(self.shapes):
            return join_tensors(self._causal_lm, name, tensors)

    def _read(self, tensor: str) -> Tensor:
        rows: Tensor = self._files[tensor].get_slice(tensor)[self.rows[tensor]]
        return rows


def _numbers(tensor: str) -> list[int]:
    """Return the numbers in a name: experts follow each other by theirs."""
    return [int(part) for part in tensor.split(".") if part.isdecimal()]
