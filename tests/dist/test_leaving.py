"""After a failure all processes end, and exactly one prints the error."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dpo_dist.distributed import processes
from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.process import EXIT_CODES, StopRequest, exit_codes
from tests.support.ranks import Outcome, start_ranks

libc = ctypes.CDLL(None)


def block_in_c(seconds: int, grace_seconds: float = 1.0) -> None:
    """Block outside of the interpreter, like a collective call of NCCL: no Python signal handler runs."""
    processes.GRACE_SECONDS = grace_seconds
    libc.sleep(seconds)


def refuse() -> None:
    raise DataError("the data are refused", remedy="correct them")


def terminated_after(seconds: float) -> None:
    """Ask this process to end, as the launcher does when another one has left."""
    # To the main thread: sent to the process, it may reach another one, and the main thread sleeps on.
    threading.Timer(seconds, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM)).start()


def outcomes_of(scenario: Any, folder: Path, size: int = 2) -> list[Outcome]:
    return start_ranks(scenario, size, folder / "ranks").finish()


def printing(outcomes: Sequence[Outcome]) -> list[int]:
    """The ranks that print an error."""
    return [rank for rank, outcome in enumerate(outcomes) if outcome.reporting_rank == rank]


def blocked_while_one_dies(late: int, world: World, folder: Path) -> None:
    os.environ[EXIT_CODES] = str(folder.parent / "codes")
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    block_in_c(1000, grace_seconds=3.0 if world.rank == late else 1.0)


@pytest.mark.parametrize("late", [0, 2])
def test_blocked_ranks_name_the_dead_one_and_end(late: int, tmp_path: Path) -> None:
    first, _, other = outcomes_of(partial(blocked_while_one_dies, late), tmp_path, size=3)
    assert first.exit_code == other.exit_code == 69, first.log + other.log
    assert (first.log + other.log).count("process lost: rank 1 of 3 died") == 1
    assert exit_codes(tmp_path / "codes") == []


def die(*_arguments: Any, **_options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in(call: str, rank: int) -> None:
    """Let rank 0, which has the store of the rendezvous, die in a call of `start_world`."""
    if rank == 0:
        setattr(dist, call, die)


@pytest.mark.parametrize("call", ["new_group", "all_gather_object"])
def test_a_rank_that_dies_while_all_join_is_one_block_of_each_other(call: str, tmp_path: Path) -> None:
    """The launcher ends the others, of which each may have printed it before."""
    ranks = start_ranks(refused_at_once, 3, tmp_path / "ranks", enter=partial(dies_in, call))
    _, *others = ranks.finish(60)
    for outcome in others:
        assert outcome.error == "PeerLostError", outcome.log
        assert "one of the 3 processes of the run ended before all had joined" in outcome.message


def refused_at_once(_world: World, _folder: Path) -> None:
    refuse()


def one_fails(error: Exception, world: World, _folder: Path) -> None:
    if world.rank == 1:
        processes.FAREWELL_SECONDS = 1.0
        raise error
    world.barrier()


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (DataError("the data are refused"), "DataError"),
        (KeyError("a bug"), "KeyError"),
        (OSError(28, "No space left on device"), "ConfigError"),
    ],
    ids=["a user's error", "a bug", "a full disk"],
)
def test_an_error_of_one_rank_is_printed_by_that_rank(error: Exception, name: str, tmp_path: Path) -> None:
    waiting, failing = outcomes_of(partial(one_fails, error), tmp_path)
    assert failing.error == name
    if name != "KeyError":  # which keeps its traceback
        assert printing([waiting, failing]) == [1]
    assert (waiting.error, waiting.reporting_rank) == ("PeerLostError", processes.NOBODY), waiting.log
    assert "process of the run failed" in waiting.message


def out_of_memory_while_blocked(world: World, _folder: Path) -> None:
    if world.rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    block_in_c(1000)


def test_out_of_memory_on_one_rank_is_one_block_and_ends_all(tmp_path: Path) -> None:
    blocked, failing = outcomes_of(out_of_memory_while_blocked, tmp_path)
    assert (failing.error, failing.reporting_rank) == ("DeviceMemoryError", 1)
    assert "Tried to allocate 20.00 MiB" in failing.message
    assert "trainer.micro_batch_tokens" in failing.message
    assert blocked.exit_code == 2, blocked.log
    assert "process lost" not in blocked.log


def refused_at_different_times(late: int, world: World, _folder: Path) -> None:
    """Each rank finds the same fault by itself."""
    if world.rank == late:
        time.sleep(2)
    refuse()


@pytest.mark.parametrize("late", [0, 1])
def test_the_same_error_of_all_ranks_is_printed_once(late: int, tmp_path: Path) -> None:
    outcomes = outcomes_of(partial(refused_at_different_times, late), tmp_path)
    assert [outcome.error for outcome in outcomes] == ["DataError"] * 2
    assert len(printing(outcomes)) == 1


def terminated_before_it_refuses(world: World, _folder: Path) -> None:
    if world.rank == 1:
        terminated_after(1)
        time.sleep(1000)
    refuse()


def terminated_while_it_waits(world: World, _folder: Path) -> None:
    if world.rank == 1:
        terminated_after(1)
        world.barrier()
    refuse()


@pytest.mark.parametrize("scenario", [terminated_before_it_refuses, terminated_while_it_waits])
def test_a_configuration_error_is_not_a_lost_process(scenario: Any, tmp_path: Path) -> None:
    """The launcher ends the others as soon as the first has left; they add nothing to what it said."""
    refusing, ended = outcomes_of(scenario, tmp_path)
    assert printing([refusing, ended]) == [0]
    assert (ended.error, ended.reporting_rank) == ("PeerLostError", processes.NOBODY), (
        ended.exit_code,
        ended.log,
    )


def signalled_while_rank_0_works(world: World, _folder: Path) -> None:
    """As while rank 0 encodes; the process group must not be used any more."""
    processes.FAREWELL_SECONDS = 1.0
    with StopRequest().listening():
        if world.rank == 1:
            terminated_after(1)
        world.on_main(lambda: time.sleep(1000))


def test_a_signal_to_a_rank_that_waits_for_work_ends_all(tmp_path: Path) -> None:
    working, signalled = outcomes_of(signalled_while_rank_0_works, tmp_path)
    assert (signalled.error, signalled.reporting_rank) == ("StoppedError", 1), signalled.log
    assert working.exit_code == 75, working.log


def interrupted(world: World, _folder: Path) -> None:
    """As by Ctrl-C to a verb that saves nothing: no other rank is to blame, so none is waited for."""
    processes.FAREWELL_SECONDS = 1.0
    processes.PATIENCE_SECONDS = 1000.0
    raise KeyboardInterrupt


def test_an_interrupt_of_all_ranks_ends_them_at_once(tmp_path: Path) -> None:
    assert [outcome.error for outcome in outcomes_of(interrupted, tmp_path)] == ["KeyboardInterrupt"] * 2


def terminated_while_blocked(world: World, _folder: Path) -> None:
    """As `evaluate`, which saves nothing."""
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    # The other threads take the signal, so that nothing wakes this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    block_in_c(100, grace_seconds=1000.0)


def test_sigterm_ends_blocked_ranks_that_have_nothing_to_save(tmp_path: Path) -> None:
    first, second = outcomes_of(terminated_while_blocked, tmp_path)
    assert first.exit_code == second.exit_code == 143, first.log + second.log
    assert (first.log + second.log).count("ended by SIGTERM") == 1
