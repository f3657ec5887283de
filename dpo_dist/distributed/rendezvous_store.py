"""Connection to the key-value store of the rendezvous that never blocks for long."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

STORE_SECONDS = 10

T = TypeVar("T")


class RendezvousStore:
    """The store of rank 0, or of its launcher; thread-safe.

    The client of the store has no timeout for a host that hangs, and a network may return: a question that
    hangs is given up, and others are not asked until it ends.

    Args:
        size: number of ranks; a single rank has no store.
    """

    def __init__(self, size: int):
        self.address = os.environ.get("MASTER_ADDR", "")
        self._store = _connect() if size > 1 else None
        self._hanging: threading.Thread | None = None
        self._silent_since: float | None = None

    @property
    def silent_seconds(self) -> float:
        """Return the seconds since the store stopped to answer; 0 if it answers."""
        return 0.0 if self._silent_since is None else time.monotonic() - self._silent_since

    def ask(self, question: Callable[[Store], T], seconds: float | None = None) -> T | None:
        """Return the answer of the store; None if it does not answer within `seconds` (`STORE_SECONDS`)."""
        store, answers = self._store, list[T]()
        if store is None or (self._hanging is not None and self._hanging.is_alive()):
            return None

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question(store))

        asked = time.monotonic()
        asking = threading.Thread(target=ask, name="rendezvous", daemon=True)
        asking.start()
        asking.join(STORE_SECONDS if seconds is None else seconds)
        self._hanging = asking if asking.is_alive() else None
        if answers:
            self._silent_since = None
            return answers[0]
        self._silent_since = self._silent_since or asked
        return None


def _connect() -> Store | None:
    """Return a connection to the store; None if the store is gone."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with contextlib.suppress(RuntimeError):
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=STORE_SECONDS),
        )
        return PrefixStore(f"dpo_dist/{attempt}", store)
    return None
