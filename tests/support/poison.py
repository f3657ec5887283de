"""A pickle that runs code when it is read, and the trace that this leaves."""

import pickle
from pathlib import Path


class Poison:
    """Creates the file `trace` when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def pickled(trace: Path) -> bytes:
    """The bytes of a pickle that creates `trace`."""
    return pickle.dumps(Poison(trace))
