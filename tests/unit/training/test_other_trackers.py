"""Trackers beside W&B have every row once over all starts, and never stop, block or slow a run."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from dpo_dist.config.metrics import METRICS
from dpo_dist.config.schema import TrackerName
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.training.reporting.metrics_log import MetricsRow
from dpo_dist.training.reporting.trackers import Trackers, open_trackers, plain_name
from tests.unit.training.test_trackers import ROWS, config_of, stored, tracked

pytestmark = pytest.mark.slow

SECRET = "hf_" + "0123456789abcdef" * 2
Values = dict[str, list[tuple[int, float]]]
Reader = Callable[[Path], Values]


@pytest.fixture(autouse=True)
def accelerate_state() -> Iterator[None]:
    PartialState(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def opened(folder: Path, name: str, known: int = 0, say: Callable[[str], None] = pytest.fail) -> Trackers:
    """The trackers of a start that has so many rows of earlier starts."""
    config = config_of(to=[TrackerName(name)])
    return open_trackers(
        tracked(folder, config, {"HF_TOKEN": SECRET}), stored(folder, ROWS[:known]), Console(LineScreen(say))
    )


def values_of(rows: list[MetricsRow]) -> Values:
    """What a tracker shows of rows."""
    values: Values = {}
    for row in rows:
        for key, value in row.items():
            if key != "step":
                values.setdefault(plain_name(key), []).append((int(row["step"]), value))
    return values


class Fake(GeneralTracker):
    """A tracker by accelerate's interface, which fails or hangs where a test says so."""

    name, requires_logging_directory, main_process_only = "swanlab", False, False
    id = "theirs"
    fails: Callable[[str, int], None]  # called with the method's name and the number of its call
    calls: list[str]
    first: str
    options: dict[str, Any]
    rows: list[tuple[int, Mapping[str, float]]]
    settings: list[Mapping[str, Any]]

    def __init__(self, first: str, **options: Any) -> None:
        Fake.first, Fake.options = first, options

    @property
    def tracker(self) -> "Fake":
        return self

    def _called(self, method: str) -> None:
        Fake.calls.append(method)
        Fake.fails(method, Fake.calls.count(method))

    def start(self) -> None:
        self._called("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        Fake.settings.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._called("log")
        assert step is not None
        Fake.rows.append((step, values))

    def finish(self) -> None:
        self._called("finish")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "swanlab", Fake)
    Fake.fails, Fake.calls, Fake.rows, Fake.settings = lambda method, count: None, [], [], []
    return Fake


def test_a_resumed_run_goes_on_in_the_run_of_the_tracker(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    options = []
    for known, computed in ((0, ROWS[:4]), (2, ROWS[2:])):  # the second start computes two rows again
        trackers = opened(tmp_path, "swanlab", known)
        options.append(fake.options)
        for row in computed:
            trackers.log(row)
        trackers.finish("preempted", {})
    named = {"name": f"{tmp_path.name} sigmoid beta=0.1 lr=1e-06"}
    assert options == [named, named | {"resume": "allow", "id": "theirs"}]
    assert fake.first == "dpo_dist"
    assert [step for step, _ in fake.rows] == [int(row["step"]) for row in ROWS]
    assert fake.rows[1][1] == {"train/loss": 0.65, "train/rewards/margins.a _b_": 0.2}
    assert fake.calls == ["start", *["log"] * 4, "finish", "start", "log", "finish"]
    assert len(fake.settings) == 2
    for settings in fake.settings:
        assert (settings["loss.beta"], settings["model.path"]) == (0.1, "org/model")
        assert settings["environment.HF_TOKEN"] == "***"


def test_a_tracker_added_later_gets_the_rows_of_earlier_starts(fake: type[Fake], tmp_path: Path) -> None:
    trackers = opened(tmp_path, "swanlab", 3)
    trackers.log(ROWS[3])
    trackers.finish("completed", {})
    assert [step for step, _ in fake.rows] == [1, 2, 2, 3]


def fail_in(
    method: str, counts: set[int], error: type[BaseException] = OSError
) -> Callable[[str, int], None]:
    def fails(called: str, count: int) -> None:
        if called == method and count in counts:
            raise error(f"no network in {method}")

    return fails


@pytest.mark.parametrize(
    ("fails", "sent", "lines"),
    [
        (
            fail_in("start", {1}),
            0,
            ["cannot start, training continues without it: OSError", "5 of the 5 rows"],
        ),
        (fail_in("start", {1}, SystemExit), 0, ["cannot start", "5 of the 5 rows"]),
        (fail_in("log", {2, 3}), 5, ["fails, training continues, its rows wait: OSError: no network in log"]),
        (
            fail_in("log", {*range(3, 99)}),
            2,
            ["fails", "3 of the 5 rows of this start were not sent to swanlab"],
        ),
        (fail_in("finish", {1}), 5, ["has not closed its run: OSError: no network in finish"]),
    ],
)
def test_a_tracker_that_fails_is_said_with_what_is_lost(
    fails: Callable[[str, int], None], sent: int, lines: list[str], fake: type[Fake], tmp_path: Path
) -> None:
    said: list[str] = []
    fake.fails = fails
    trackers = opened(tmp_path, "swanlab", say=said.append)
    for row in ROWS:
        trackers.log(row)
    trackers.finish("completed", {})
    assert [step for step, _ in fake.rows] == [int(row["step"]) for row in ROWS[:sent]]
    assert len(said) == len(lines)
    assert [line for line, text in zip(said, lines, strict=True) if text not in line] == []


@pytest.mark.parametrize(("method", "lost"), [("start", 2), ("log", 2), ("finish", 0)])
def test_a_tracker_that_hangs_delays_the_end_by_a_timeout_only(
    method: str, lost: int, fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_dist.training.reporting.trackers._OPEN_SECONDS", 0.2)
    said, network = list[str](), threading.Event()
    fake.fails = lambda called, count: None if called != method else (network.wait(600), None)[1]
    started = time.monotonic()
    trackers = opened(tmp_path, "swanlab", say=said.append)
    trackers.log(ROWS[0])
    trackers.log(ROWS[1])
    trackers.finish("completed", {}, seconds=0.3)
    assert time.monotonic() - started < 300
    network.set()
    assert "swanlab has not finished in time and is stopped" in said[0]
    assert [f"{lost} of the 2 rows" in line for line in said[1:]] == [True] * bool(lost)


def test_names_are_files_beside_each_other() -> None:
    names = [
        "tokens/chosen",
        *METRICS,
        "rewards/margins/a/b",
        "eval_loss/a",
        "rewards/margins_by_length/1-63",
        "eval_loss",
    ]
    plain = [plain_name(name) for name in names]
    assert plain[-4:] == [
        "train/rewards/margins.a/b",
        "eval/loss.a",
        "train/rewards/margins_by_length/1-63",
        "eval/loss",
    ]
    above = {name[:place] for name in plain for place in range(len(name)) if name[place] == "/"}
    assert above & {*plain} == set()


def tensorboard_values(folder: Path) -> Values:
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in tags}


def mlflow_values(folder: Path) -> Values:
    import mlflow

    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'dpo_dist'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["loss.beta"] == "0.1"
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: [(each.step, each.value) for each in history] for name, history in histories.items()}


def trackio_values(folder: Path) -> Values:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("dpo_dist")
    assert SQLiteStorage.get_run_config("dpo_dist", run)["loss.beta"] == 0.1
    values: Values = {}
    for point in SQLiteStorage.get_logs("dpo_dist", run):
        for name in point.keys() - {"step", "timestamp"}:
            values.setdefault(name, []).append((point["step"], float(point[name])))
    return values


def swanlab_values(folder: Path) -> Values:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    values: Values = {}
    for file in sorted(folder.glob("swanlog/run-*/*.swanlab"), key=lambda path: path.stat().st_mtime):
        reader = DataStoreReader()
        reader.open(file)
        for line in reader:
            if (record := Record.FromString(line)).HasField("scalar"):
                scalar = record.scalar
                values.setdefault(scalar.key, []).append((scalar.step, scalar.value.number))
    return values


READERS = {
    "tensorboard": tensorboard_values,
    "mlflow": mlflow_values,
    "trackio": trackio_values,
    "swanlab": swanlab_values,
}


@pytest.mark.parametrize("name", READERS)
def test_the_reader_of_a_tracker_has_every_value_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", f"{tmp_path}/trackio")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    pytest.importorskip(name)  # trackio reads its variable now
    for known, computed in ((0, ROWS[:4]), (1, ROWS[1:])):  # resumed from step 1
        trackers = opened(tmp_path, name, known)
        for row in computed:
            trackers.log(row)
        trackers.finish("preempted", {})
    expected = values_of(ROWS)
    assert READERS[name](tmp_path) == {
        key: [(step, pytest.approx(value, nan_ok=True)) for step, value in values]
        for key, values in expected.items()
    }
