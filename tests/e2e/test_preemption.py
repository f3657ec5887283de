"""A run that is asked to stop, by any signal at any rank, saves, ends with 75 and resumes exactly."""

import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import Overrides, small_run
from tests.support.launch import history, run_state, signal_run, summary, train

STEPS = ["trainer.epochs=16", "optim.lr=1e-3", "trainer.save_every=4"]


@pytest.fixture(scope="module")
def uninterrupted(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train([*small_run(assets, folder), *STEPS], processes=2)
    return history(folder / "run")


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        pytest.param(signal.SIGTERM, [1], id="SIGTERM to rank 1"),
        pytest.param(signal.SIGUSR1, [0, 1], id="SIGUSR1 to all"),
        pytest.param(signal.SIGTERM, [], id="SIGTERM to the launcher"),
        pytest.param(signal.SIGKILL, [], id="SIGKILL to the launcher"),
    ],
)
def test_a_signal_saves_and_the_same_command_resumes_exactly(
    number: signal.Signals,
    ranks: list[int],
    overrides: Overrides,
    tmp_path: Path,
    uninterrupted: list[dict[str, float]],
) -> None:
    run, command = tmp_path / "run", overrides(*STEPS)
    saved = (run / "checkpoints" / "step-000004").is_dir
    stopped = signal_run(command, number, ranks, saved, codes=tmp_path / "codes")
    assert "process lost" not in stopped.output
    assert (tmp_path / "codes").read_text().split() == ["75", "75"], stopped.output
    state = run_state(run)
    assert state["outcome"] == "preempted"
    assert summary(run)["exit"] == "preempted"
    assert 0 < state["step"] < uninterrupted[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{state['step']:06d}"
    assert f"stopping after step {state['step']}, with a checkpoint" in (run / "logs/rank-0.log").read_text()
    train(command, processes=2)
    assert history(run) == uninterrupted
