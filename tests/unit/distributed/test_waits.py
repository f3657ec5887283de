"""Waits for other ranks: their end, and the thread that gives one up."""

import threading
from typing import Any

import pytest
import torch

from dpo_dist.distributed.activity import Activity, Peer
from dpo_dist.distributed.monitor import Waits
from dpo_dist.distributed.world import World


class Group:
    """A process group with a barrier that lasts until `arrive`."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.arrived: torch.futures.Future[None] = torch.futures.Future()

    def barrier(self, options: Any) -> "Group":
        self.timeout = options.timeout
        return self

    def get_future(self) -> "torch.futures.Future[None]":
        self.entered.set()
        return self.arrived

    def wait(self) -> None:
        self.arrived.wait()


def then(group: Group, act: Any) -> threading.Thread:
    thread = threading.Thread(target=lambda: group.entered.wait(60) and act())
    thread.start()
    return thread


def test_a_wait_lasts_until_all_are_here_whatever_the_timeout_of_the_group() -> None:
    group, waits = Group(), Waits()
    waits.give_up()  # nobody waits
    arriving = then(group, lambda: group.arrived.set_result(None))
    waits.wait(group)
    arriving.join()
    assert group.timeout.days > 300


def test_a_connection_that_is_cut_is_raised() -> None:
    group = Group()
    cutting = then(group, lambda: group.arrived.set_exception(RuntimeError("closed by peer")))
    with pytest.raises(RuntimeError, match="closed by peer"):
        Waits().wait(group)
    cutting.join()


def test_a_wait_for_a_silent_rank_is_given_up() -> None:
    group, waits = Group(), Waits()
    giving_up = then(group, waits.give_up)
    with pytest.raises(RuntimeError, match="timed out"):
        waits.wait(group)
    giving_up.join()


def test_a_patient_wait_is_named_by_its_call_and_answers_signals() -> None:
    """A rank in it is named as waiting, and ends at no signal that its handler has answered."""
    group, activity = Group(), Activity()
    world = World(None, 0, 2, torch.device("cpu"), (Peer.here(0), Peer.here(1)), group, activity=activity)

    def sample() -> None:
        activity.sample()
        group.arrived.set_result(None)

    sampling = then(group, sample)
    world.barrier()
    sampling.join()
    assert activity.last.call == "barrier"
    assert not activity.last.is_blocked
