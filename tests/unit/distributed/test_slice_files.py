"""Files of slices: cut and joined in any way, refused when incomplete, and never run."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dpo_dist.distributed import checkpoint
from dpo_dist.distributed.checkpoint import (
    Entries,
    SavedSlices,
    find_faults,
    write_file,
    write_manifest,
    write_slices,
)
from dpo_dist.distributed.slices import ModelSlices, Slice
from dpo_dist.foundation.errors import CheckpointError

WHOLE = {
    "embedding": torch.arange(35, dtype=torch.float32).view(7, 5),
    "norm": torch.arange(100, 103, dtype=torch.float32),
    "scalar": torch.tensor(7.0),
}


def cut(borders: dict[str, list[int]], rank: int) -> Iterator[Slice]:
    """The slices of one rank; `borders` has the first elements of ranks 1, 2, ... of each weight."""
    for name, weight in WHOLE.items():
        start, end = [0, *borders[name], weight.numel()][rank : rank + 2]
        if start < end:
            flat = weight.flatten()[start:end]
            yield Slice(name, tuple(weight.shape), start, {"weight": flat.clone(), "exp_avg": -flat})


def written(folder: Path, ranks: int, borders: dict[str, list[int]]) -> Path:
    entries: Entries = {}
    for rank in range(ranks):
        entries |= write_slices(ModelSlices("engine", list(cut(borders, rank)), 3), folder, rank)
    write_manifest(folder, entries)
    assert find_faults(folder, 0, 1) == []
    return folder


@pytest.mark.parametrize("file_bytes", [1, 100, 10_000])
def test_any_ranks_read_what_any_ranks_wrote(
    file_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", file_bytes)
    folder = written(tmp_path, 3, {"embedding": [1, 20], "norm": [3, 3], "scalar": [0, 0]})
    saved = SavedSlices.find(folder, "engine")
    assert saved.step == 3
    for name, weight in WHOLE.items():
        assert torch.equal(saved.whole(name), weight)
        assert torch.equal(saved.whole(name, "exp_avg"), -weight)
    others = {"embedding": [0, 2, 30], "norm": [1, 1, 2], "scalar": [1, 1, 1]}
    for rank in range(4):
        wanted = list(cut(others, rank))
        empty = [
            Slice(
                own.name,
                own.shape,
                own.start,
                {part: torch.zeros_like(own.parts[part]) for part in own.parts},
            )
            for own in wanted
        ]
        saved.load_into(empty)
        for own, read in zip(wanted, empty, strict=True):
            assert all(torch.equal(own.parts[part], read.parts[part]) for part in own.parts)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.touch, (self.victim,)  # type: ignore[return-value]


def test_a_pickled_file_is_refused_and_never_run(tmp_path: Path) -> None:
    folder = written(tmp_path, 1, {name: [] for name in WHOLE})
    content = pickle.dumps(Malicious(folder / "it ran"))
    file = Path("engine/rank-00000-00000.safetensors")
    write_manifest(folder, {str(file): write_file(folder / file, content)})
    with pytest.raises(CheckpointError, match="cannot be read"):
        SavedSlices.find(folder, "engine")
    assert not (folder / "it ran").exists()


def test_weights_of_another_model_are_one_error(tmp_path: Path) -> None:
    saved = SavedSlices.find(written(tmp_path, 1, {name: [] for name in WHOLE}), "engine")
    for name, shape in (("embedding", (5, 7)), ("other", (3,))):
        with pytest.raises(CheckpointError, match=f"{name} is missing or has another shape"):
            saved.load_into([Slice(name, shape, 0, {"weight": torch.zeros(3)})])
