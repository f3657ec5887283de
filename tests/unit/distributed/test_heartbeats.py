"""Words about ranks that are silent, slow, or at another place than the others."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from dpo_dist.distributed import failures, monitor
from dpo_dist.distributed.activity import Activity, Doing, Neighbours, Peer
from dpo_dist.distributed.failures import RendezvousStore
from dpo_dist.distributed.monitor import Heartbeats

WAITING = Doing("step 12", "training/step.py:88 (reduce_step)", "all_reduce", 400)
READING = Doing("step 12", "data/collate.py:33 (collate)", "", 398)
TIMEOUT = RuntimeError("Timed out waiting 600000ms for recv operation to complete\nmore")
CUT = RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:4321")

Ranks = Callable[..., Heartbeats]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Rank 0 of a run whose ranks have sent one heartbeat each.

    The store is within the process, and no question is given up on a machine with much to do.
    """
    store = dist.PrefixStore("run", dist.HashStore())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(failures, "_connect", lambda: store)
    monkeypatch.setattr(monitor, "ANSWER_SECONDS", 60)

    def make(*doings: Doing) -> Heartbeats:
        peers = [
            replace(Peer.here(0), rank=rank, host=f"host{rank}", pid=100 + rank)
            for rank in range(len(doings))
        ]
        made = []
        for rank, doing in enumerate(doings):
            activity = Activity()
            activity.last = doing
            asked = RendezvousStore(len(peers))
            made.append(Heartbeats(peers, Neighbours(peers, rank), asked, activity, 600))
            made[-1].beat()
        made[0].beat()
        return made[0]

    return make


def let_silent(watched: Heartbeats, rank: int, seconds: float = 600) -> None:
    beat = watched._last[rank]
    watched._last[rank] = replace(beat, arrived=beat.arrived - seconds)


def test_a_silent_rank_is_named_with_its_host_and_the_time(ranks: Ranks, tmp_path: Path) -> None:
    first = ranks(WAITING, READING, WAITING)
    assert first.silent() == []
    let_silent(first, 1)
    error = first.error_of(TIMEOUT, tmp_path / "logs" / "rank-0.stacks.txt")
    assert error is not None
    assert error.message == "rank 1 of 3 does not answer"
    assert error.where == (
        "rank 0: step 12, waiting in all_reduce, at training/step.py:88 (reduce_step), for 400 s"
    )
    assert "rank 1 (process 101 on host1): no heartbeat since" in error.got
    assert "before: step 12, at data/collate.py:33 (collate), for 398 s" in error.got
    assert "Timed out waiting 600000ms" in error.got
    assert "more" not in error.got
    assert f"{tmp_path}/logs/rank-N.stacks.txt" in error.remedy


def test_a_job_that_was_suspended_accuses_nobody(ranks: Ranks) -> None:
    """After SIGSTOP and SIGCONT to all, as by `scontrol suspend`, each rank waits for the next heartbeats."""
    first = ranks(WAITING, READING)
    first.beat_if_due()
    first._due -= 700
    let_silent(first, 1, 700)
    assert first.beat_if_due()
    assert first.silent() == []


def test_a_rank_that_computes_is_slow_and_not_silent(ranks: Ranks) -> None:
    first = ranks(WAITING, READING, WAITING)
    assert [peer.rank for peer in first.late(60)] == [1]
    assert first.late(500) == []
    error = first.error_of(TIMEOUT, None)
    assert error is not None
    assert error.message == "rank 1 of 3 keeps the others waiting"
    assert "stacks" not in error.remedy


def test_nobody_is_late_while_nobody_waits(ranks: Ranks) -> None:
    assert ranks(READING, READING).late(60) == []


def test_a_silent_rank_is_late_also_where_a_wait_is_not_seen(ranks: Ranks) -> None:
    """A wait for a GPU is no collective call of the host."""
    first = ranks(READING, READING)
    let_silent(first, 1, 70)
    assert [peer.rank for peer in first.late(60)] == [1]


def test_ranks_in_different_calls_are_listed_the_rarest_first(ranks: Ranks) -> None:
    skipped = Doing("step 12", "training/loop.py:9 (_save)", "barrier", 400)
    error = ranks(WAITING, skipped, WAITING).error_of(TIMEOUT, None)
    assert error is not None
    assert error.message == "a process of the run does not answer"
    assert error.got.startswith(
        "rank 1 (process 101 on host1): step 12, waiting in barrier, at training/loop.py:9"
    )


def test_a_cut_connection_is_a_silent_rank_or_a_bug(ranks: Ranks) -> None:
    first = ranks(WAITING, WAITING)
    assert first.error_of(CUT, None) is None
    let_silent(first, 1, 12)
    error = first.error_of(CUT, None)
    assert error is not None
    assert error.message == "rank 1 of 2 does not answer"
    assert first.error_of(RuntimeError("shapes differ"), None) is None
    assert first.error_of(ValueError("timed out"), None) is None


@pytest.mark.parametrize("size", [2, 40])
def test_the_end_of_a_process_on_another_host_is_no_bug_if_its_last_heartbeat_was_late(
    size: int, ranks: Ranks
) -> None:
    first = ranks(*[WAITING] * size)
    late = first.seconds
    let_silent(first, 1, first.patience(CUT) - late)
    error = first.error_of(CUT, None)
    assert error is not None
    assert error.message == f"rank 1 of {size} does not answer"
    assert first.patience(RuntimeError("shapes differ")) == 0


def test_a_store_that_hangs_is_the_host_that_does_not_answer(ranks: Ranks) -> None:
    """Nobody else is accused, as no heartbeat can be read."""
    first = ranks(WAITING, WAITING)
    let_silent(first, 1)
    first._store._store = None
    first.beat()
    first._store._silent_since = 1.0
    error = first.error_of(TIMEOUT, None)
    assert error is not None
    assert error.message == "the host 127.0.0.1, or the network to it, does not answer"
    assert first.silent() == []


def test_an_answer_ends_the_silence_of_the_store(ranks: Ranks) -> None:
    """A network that was away for some seconds is used again."""
    store, network = ranks(WAITING, WAITING)._store, threading.Event()
    assert store.ask(lambda _store: network.wait(60), 0.1) is None
    assert store.silent_seconds >= 0.1
    assert store.ask(lambda _store: 1) is None, "not asked while a question hangs"
    network.set()
    assert store._hanging is not None
    store._hanging.join()
    assert store.ask(lambda _store: 1) == 1
    assert store.silent_seconds == 0
