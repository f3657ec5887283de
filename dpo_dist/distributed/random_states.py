"""States of the random number generators of one rank, in a file from which no code can be run."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_dist.errors import CheckpointError, first_line
from dpo_dist.small_files import read_small


def random_states(device: torch.device) -> str:
    """Return the states of this rank as JSON."""
    numpy_name, numpy_key, *numpy_rest = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": [numpy_name, np.asarray(numpy_key).tolist(), *numpy_rest],
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if device.type == "cuda" else None,
    }
    return json.dumps(states)


def load_random_states(folder: Path, rank: int, saved_ranks: int, device: torch.device) -> None:
    """Restore the states of this rank.

    A rank that did not exist when they were saved gets a state of its own, which depends on the saved ones.

    Args:
        folder: the checkpoint.
        rank: of this process.
        saved_ranks: number of ranks that saved their states.
        device: of this process.

    Raises:
        CheckpointError: the file cannot be read.
    """
    file = folder / random_states_name(rank % saved_ranks)
    try:
        states = json.loads(read_small(file))
        if rank >= saved_ranks:
            _seed(f"{rank} {states['torch']}")
            return
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(_checked(states["numpy"]))
        torch.set_rng_state(_tensor(states["torch"]))
        if device.type == "cuda" and states["cuda"] is not None:  # None: saved without a GPU
            torch.cuda.set_rng_state(_tensor(states["cuda"]))
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            "the random states of the checkpoint cannot be read",
            where=str(file),
            got=first_line(error),
            remedy="restore the file, or resume from another checkpoint",
        ) from error


def _checked(state: Sequence[Any]) -> tuple[Any, ...]:
    """Return a state of numpy, which itself would read beyond the end of the key."""
    _, key, position, *_ = state
    if not 0 <= position <= len(key):
        raise ValueError("the position is outside of the key")
    return tuple(state)


def _seed(text: str) -> None:
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _hex(state: torch.Tensor) -> str:
    return bytes(state.numpy()).hex()


def _tensor(state: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)


def random_states_name(rank: int) -> str:
    """Return the name of a rank's file in a checkpoint."""
    return f"random_states_{rank}.json"
