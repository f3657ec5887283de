"""Encode chunks of records on several processes, in their order."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from dpo_dist.foundation.errors import PeerLostError
from dpo_dist.foundation.process import usable_cores

_Given = TypeVar("_Given")
_Result = TypeVar("_Result")

CHUNK_RECORDS = 64
# One process reads and writes for all others: it is too slow for more of them than this.
_MAX_PROCESSES = 16
# Fewer chunks than these are encoded by one process before other processes have started.
_MIN_CHUNKS = 2048 // CHUNK_RECORDS
_CHUNKS_AHEAD = 2


def processes_for(chunks: int) -> int:
    """Return how many processes to start for at least this many chunks; one if there are few.

    Only rank 0 encodes: the others wait.
    """
    return 1 if chunks < _MIN_CHUNKS else min(usable_cores(), _MAX_PROCESSES)


def in_chunks(records: Iterable[_Given], chunk_records: int = CHUNK_RECORDS) -> Iterator[list[_Given]]:
    """Yield the records in lists of so many; the last one may be shorter."""
    records = iter(records)
    return iter(lambda: [*itertools.islice(records, chunk_records)], [])


def in_order(chunks: Iterable[_Given], work: Callable[[_Given], _Result]) -> Generator[_Result, None, None]:
    """Yield the result of `work` for each chunk of records, in order, computed by several processes.

    `work` can be pickled. Closing the generator ends the processes. Few chunks per process are in memory.
    """
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, _MIN_CHUNKS))
    processes = processes_for(len(first))
    every = itertools.chain(first, chunks)
    if processes == 1:
        yield from map(work, every)
        return
    ahead: deque[Future[_Result]] = deque()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_process, (work,))
    try:
        for chunk in every:
            ahead.append(pool.submit(_work, chunk))
            if len(ahead) == _CHUNKS_AHEAD * processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise PeerLostError(
            "a process that encodes data has died",
            where="data.train, data.eval",
            got=str(error).splitlines()[0],
            remedy="if memory ran out, write 'taskset -c 0' before the command: one process encodes; else "
            "see logs/rank-N.log",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_works: list[Callable[[Any], Any]] = []
"""The work of a spawned process: one function, or none in the main process."""


def _start_process(work: Callable[[Any], Any]) -> None:
    """Prepare a spawned process: ignore interrupts, end when the parent dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process
    _works.append(work)


def _work(chunk: Any) -> Any:
    return _works[0](chunk)
