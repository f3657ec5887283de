"""The launcher's options, addresses and exit codes."""

import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.distributed import DistNetworkError

from dpo_dist.distributed.processes import launcher
from dpo_dist.foundation.errors import DpoDistError


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """The launcher, without handlers of signals in this process."""
    monkeypatch.setattr(launcher, "stop_signals", tuple)
    return launcher.launch


@pytest.mark.parametrize(
    ("options", "error", "got", "code"),
    [
        ("--config_file nowhere.yaml -m dpo_dist.train", None, "nowhere.yaml", 2),
        ("--cpu --multi_gpu -m dpo_dist.train", None, "--cpu", 2),
        ("--num_procs 2 -m dpo_dist.train", None, "--num_procs", 2),
        ("-m dpo_dist.train", DistNetworkError("port 29500 is not reached"), "29500 is", 69),
    ],
)
def test_options_and_addresses_that_cannot_be_used_are_one_block(
    options: str,
    error: Exception | None,
    got: str,
    code: int,
    launch: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if error is not None:
        monkeypatch.setattr(launcher, "launch_command", Mock(side_effect=error))
    with pytest.raises(DpoDistError) as refused:
        launch(options.split())
    assert refused.value.exit_code == code
    assert got in refused.value.got


@pytest.mark.parametrize(
    ("typed", "got"),
    [
        ("--nproc_per_node 2 train", "unrecognized arguments: --nproc_per_node"),
        ("model.path=m", "model.path=m"),
        ("mine.yaml loss.beta=1", "mine.yaml"),
        ("", "required: training_script"),
        ("xyzzy", "xyzzy"),
    ],
)
def test_a_mistyped_launch_is_refused(
    typed: str,
    got: str,
    launch: Callable[[list[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("loss: ipo\n")  # no program, although it is a file
    with pytest.raises(DpoDistError) as refused:
        launch(typed.split())
    assert got in refused.value.got
    assert "dpo-dist launch --help" in refused.value.remedy


@pytest.mark.parametrize("program", ["train", "-m dpo_dist train"])
def test_a_verb_is_started_by_its_name(
    program: str, launch: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Mock()
    monkeypatch.setattr(launcher, "launch_command", started)
    launch([*program.split(), "+experiment=demo", "--check"])
    settings = started.call_args.args[0]
    assert (settings.module, settings.training_script) == (True, "dpo_dist")
    assert settings.training_script_args == ["train", "+experiment=demo", "--check"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_as_many_processes_start_as_are_asked_for_without_a_gpu(
    launch: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    program = ["--no_python", "bash", "-c", 'test "$WORLD_SIZE" = 2']
    assert launch(["--num_processes", "2", *program]) == 0


def test_a_quiet_launcher_has_the_exit_code_of_the_run(launch: Callable[[list[str]], int]) -> None:
    """Accelerate's own ends with 1, without the code."""
    assert launch(["--quiet", "--cpu", "--num_processes", "1", "--no_python", "bash", "-c", "exit 3"]) == 3
