"""View of several arrays as one, without copying them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class ConcatenatedArray:
    """Read-only concatenation of arrays; `shifts` are added to the values of each when they are read.

    Indexed by a number, by a slice of step 1, or by int64 [n]. A slice within one array copies nothing if
    its shift is 0.
    """

    def __init__(self, parts: Sequence[Array], shifts: Sequence[Any] | None = None):
        self._parts = list(parts)
        self._shifts = list(shifts) if shifts is not None else [0] * len(self._parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1, "a slice of a concatenated array has step 1"
            part = self._part_of(start)
            if stop <= self._ends[part]:
                first = self._start(part)
                return self._shifted(part, slice(start - first, max(start, stop) - first))
            return self._gather(np.arange(start, stop))
        if np.ndim(index) == 0:
            position = int(index) + (len(self) if index < 0 else 0)
            part = self._part_of(position)
            return self._shifted(part, position - self._start(part))
        return self._gather(np.asarray(index))

    def _gather(self, indices: npt.NDArray[np.int64]) -> Array:
        indices = np.where(indices < 0, indices + len(self), indices)
        parts = np.searchsorted(self._ends, indices, side="right")
        first = self._parts[0]
        gathered = np.empty((len(indices), *first.shape[1:]), dtype=first.dtype)
        for part in np.unique(parts):
            here = parts == part
            gathered[here] = self._shifted(part, indices[here] - self._start(part))
        return gathered

    def _shifted(self, part: int, index: Any) -> Any:
        values, shift = self._parts[part][index], self._shifts[part]
        return values + shift if np.any(shift) else values

    def _part_of(self, position: int) -> int:
        return min(int(np.searchsorted(self._ends, position, side="right")), len(self._parts) - 1)

    def _start(self, part: int) -> int:
        return int(self._ends[part - 1]) if part else 0


Column = Array | ConcatenatedArray


def concatenate(parts: Sequence[Array], shifts: Sequence[Any] | None = None) -> Column:
    """Return a view of all `parts`; a single part is returned itself."""
    return parts[0] if len(parts) == 1 else ConcatenatedArray(parts, shifts)
