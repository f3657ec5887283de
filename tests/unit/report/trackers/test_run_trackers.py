"""Trackers run in threads of their own; TensorBoard gets every row once over all starts."""

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState
from accelerate.state import AcceleratorState

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ModelConfig, OtherTracker, RunConfig, TrackingConfig, WandbMode
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.insight.metrics.names import (
    Histogram,
    last_and_best,
    order_of,
    order_of_sent,
    wandb_names,
)
from dpo_dist.insight.metrics.trackers import InBackground, Trackers, open_trackers
from dpo_dist.model import optional_packages


class Stuck:
    """A tracker whose calls return when `network` is up."""

    def __init__(self, network: threading.Event):
        self.network = network
        self.sent: list[float] = []
        self.outcome = ""

    def log(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        assert self.network.wait(60)
        self.sent.append(row["step"])

    def alert(self, title: str, text: str) -> None:
        raise ConnectionError("no server")

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        self.outcome = outcome


def test_rows_wait_for_a_dead_network_and_the_caller_does_not() -> None:
    stuck = Stuck(threading.Event())
    tracker = InBackground("a name", lambda say: stuck, print)
    for step in range(1000):
        tracker.log({"step": step})
    assert stuck.sent == []
    stuck.network.set()
    tracker.finish("completed", {}, seconds=60)
    assert (stuck.sent, stuck.outcome) == (list(range(1000)), "completed")


def test_a_call_that_never_returns_is_ended() -> None:
    network, said = threading.Event(), []

    def start(say: Callable[[str], None]) -> Stuck:
        network.wait(60)
        say("said too late")
        raise ConnectionError("ended")

    tracker = InBackground("a name", start, said.append, "; advice", abandon=network.set)
    tracker.log({"step": 1})
    tracker.finish("completed", {}, seconds=0.1)
    assert said == ["warning: a name has not finished after 0 s and is ended; advice"]


def test_a_tracker_that_fails_is_one_warning() -> None:
    said: list[str] = []
    stuck = Stuck(threading.Event())
    stuck.network.set()
    tracker = InBackground("a name", lambda say: stuck, said.append)
    tracker.alert("an alarm", "")
    tracker.log({"step": 1})
    tracker.finish("completed", {}, seconds=60)
    assert said == ["warning: a name tracking stops, training continues: ConnectionError: no server"]
    assert (stuck.sent, stuck.outcome) == ([], "")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_error_closes_the_trackers_with_their_rows(error: type[BaseException]) -> None:
    stuck = Stuck(threading.Event())
    trackers = Trackers((InBackground("a name", lambda say: stuck, print, first_wait=10),))
    trackers.log({"step": 1})
    stuck.network.set()
    with pytest.raises(error), trackers.ended_by_errors():
        raise error
    assert (stuck.sent, stuck.outcome) == ([1], "failed")


def test_a_histogram_counts_finite_values() -> None:
    histogram = Histogram.of(np.array([0.0, 1.0, 1.0, np.nan, np.inf], dtype=np.float32))
    assert histogram is not None
    assert (histogram.counts.sum(), histogram.edges[0], histogram.edges[-1]) == (3, 0.0, 1.0)
    assert Histogram.of(np.array([np.nan], dtype=np.float32)) is None


def test_an_evaluation_comes_after_the_row_of_its_step() -> None:
    rows: list[dict[str, float]] = [
        {"step": 1, "eval_loss": 0.7},
        {"step": 2, "loss": 0.6},
        {"step": 2, "eval_loss": 0.6},
        {"step": 3, "loss": 0.6},
    ]
    orders = [order_of(row) for row in rows]
    assert orders == sorted(orders)
    assert [order_of_sent(wandb_names(row)) for row in rows] == orders
    assert order_of_sent({}) < orders[0]


def test_the_evaluation_before_the_first_step_is_not_the_best() -> None:
    rows = [{"step": 0, "eval_loss": 0.5}, {"step": 4, "eval_loss": 0.7}, {"step": 8, "eval_loss": 0.8}]
    assert last_and_best(rows) == {"eval/loss": 0.8, "best/eval/loss": 0.7}


ROWS = [
    {"step": 1, "loss": 0.7, "rewards/margins/a (b)": 1.0},
    {"step": 2, "loss": 0.6},
    {"step": 2, "eval_loss": 0.6},
    {"step": 3, "loss": 0.5},
    {"step": 4, "loss": 0.4},
]


@pytest.fixture
def accelerate_state() -> Iterator[None]:
    """The state of the processes, which a run has; the next test in this process starts without it."""
    PartialState(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate_state")
def test_tensorboard_has_every_value_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracking = TrackingConfig(wandb=WandbMode.off, also=[OtherTracker.tensorboard])
    config = RunConfig(model=ModelConfig(path="org/model"), tracking=tracking)
    for known, computed in ((0, ROWS[:4]), (1, ROWS[1:])):  # resumed from step 1
        options: dict[str, Any] = {"rows": ROWS[:known], "environment": {}, "say": pytest.fail}
        trackers = open_trackers(config, RunFolder(tmp_path), lambda: None, **options)
        for row in computed:
            trackers.log(row)
        trackers.finish("preempted", {})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in ROWS:
        for name, value in wandb_names(row).items():
            expected.setdefault(name, []).append((int(row["step"]), pytest.approx(value)))
    tags = events.Tags()["scalars"]
    assert {name: [(event.step, event.value) for event in events.Scalars(name)] for name in tags} == expected


@pytest.mark.parametrize("tracker", OtherTracker)
def test_a_missing_package_is_an_error_with_the_command(
    tracker: OtherTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optional_packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="is not installed") as caught:
        optional_packages.check_tracker(tracker)
    assert f"pip install 'dpo-dist[{tracker.value}]'" in str(caught.value)
