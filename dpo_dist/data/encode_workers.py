"""Encode records on several processes, with the same result and order as on one.

Tokenizer and chat template take nearly all the time of preparing data. The tokenizer's own threads work
within one call only and the template runs on one core, so chunks of records are distributed to processes.
These are spawned, as forking a process with threads of torch and gloo is unsafe, and start fast:
encode_chunk.py and its imports do not import torch.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from dpo_dist.config.data_schema import DataConfig
from dpo_dist.data.encode_chunk import EncodedChunk, encode_chunk
from dpo_dist.data.prompt_split import ALL_RECORDS, Part
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.errors import PeerLostError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Records: TypeAlias = Sequence[PreferenceRecord | BadRecord]
Result = TypeVar("Result")

CHUNK_RECORDS = 64
# One process reads and writes for all others; it limits the speed of more processes than this.
_MAX_PROCESSES = 16
# Fewer are encoded before other processes have started.
_MIN_CHUNKS = 2048 // CHUNK_RECORDS
_CHUNKS_AHEAD = 2


def encode_in_order(
    chunks: Iterable[Records],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    part: Part = ALL_RECORDS,
) -> Generator[EncodedChunk, None, None]:
    """Encode chunks of records on `data.processes` processes; the result does not depend on their number.

    Closing the generator ends the processes.

    Args:
        chunks: of about `CHUNK_RECORDS` records each; a few per process are in memory at a time.
        config: configuration of the data.
        tokenizer: of the policy.
        part: the records to encode.

    Raises:
        DataError: see `encode_chunk`; for the first such record.
        PeerLostError: one of the processes has died.
    """
    yield from in_order(
        chunks, partial(encode_chunk, config=config, tokenizer=tokenizer, part=part), config.processes
    )


def in_order(
    chunks: Iterable[Records], work: Callable[[Records], Result], processes: int | None
) -> Generator[Result, None, None]:
    """Yield the result of `work` for each chunk, in order, computed on several processes.

    Closing the generator ends the processes.

    Args:
        chunks: of about `CHUNK_RECORDS` records each; a few per process are in memory at a time.
        work: can be pickled, as can its results.
        processes: null: one per core, if there are enough chunks.

    Raises:
        PeerLostError: one of the processes has died. An error of `work` is raised as it is.
    """
    first: list[Records] = []
    chunks = iter(chunks)
    if processes is None:
        first = list(itertools.islice(chunks, _MIN_CHUNKS))
        processes = 1 if len(first) < _MIN_CHUNKS else min(_usable_cores(), _MAX_PROCESSES)
    every = itertools.chain(first, chunks)
    if processes > 1:
        yield from _on_processes(every, work, processes)
    for records in every:
        yield work(records)


def _on_processes(
    chunks: Iterable[Records], work: Callable[[Records], Result], processes: int
) -> Iterator[Result]:
    ahead: deque[Future[Result]] = deque()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_process, (work,))
    try:
        for records in chunks:
            ahead.append(pool.submit(_work, records))
            if len(ahead) == _CHUNKS_AHEAD * processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise PeerLostError(
            "a process that encodes data has died",
            where="data.processes",
            got=str(error).splitlines()[0],
            remedy="if memory ran out, lower data.processes (1: no other process); else see logs/rank-0.log",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_works: list[Callable[[Records], Any]] = []
"""The work of this process; set in a spawned process."""


def _start_process(work: Callable[[Records], Any]) -> None:
    """Initialise a spawned process: it ignores interrupts, and ends when its parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process
    _works.append(work)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(records: Records) -> Any:
    return _works[0](records)
