"""`dpo-dist selftest` on the simulated device: its runs, and runs that are only answers."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation import streams
from dpo_dist.foundation.errors import (
    CheckpointError,
    DivergedError,
    DpoDistError,
    Lack,
    PeerLostError,
)
from tests.simulated_cuda import runs
from tests.support.launch import Finished
from tests.support.warm_benchmarks import run_fork

Answer = Callable[[dict[str, str], dict[str, str]], tuple[int, str]]
"""From the keys of a training run, and its environment, to its exit code and screen."""
_GIVEN = {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "RANK": "1", "WORLD_SIZE": "2", "PET_NNODES": "2"}


class _Process(contextlib.AbstractContextManager["_Process"]):
    """A process of `subprocess.Popen` that has ended with what `work` returns."""

    def __init__(self, work: Callable[[], tuple[int, str]]):
        self._work, self.returncode = work, 0

    def communicate(self, timeout: float) -> tuple[str, None]:
        assert timeout < 1000
        self.returncode, screen = self._work()
        return screen, None

    def __exit__(self, *_: object) -> None: ...


def _replace_python(work: Callable[[list[str], dict[str, str]], tuple[int, str]]) -> None:
    """From now on command lines of Python do `work`."""
    popen = subprocess.Popen

    def opened(command: Any, **options: Any) -> Any:
        if command[0] != sys.executable:
            return popen(command, **options)
        return _Process(partial(work, command, options["env"]))

    mock.patch.object(subprocess, "Popen", opened).start()


def _measure_no_products() -> None:
    mock.patch(
        "dpo_dist.model.flops.matmul_peak", side_effect=lambda device, _: 1e12 * (device.index + 1)
    ).start()


def _in_forks() -> None:
    _measure_no_products()
    os.environ.update(_GIVEN | {"CUDA_VISIBLE_DEVICES": "0"})

    def forked(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        with mock.patch.object(streams, "_reserved", None):  # a process of its own has standard output
            ended = run_fork(command, environment)
        return ended.returncode, ended.stdout

    _replace_python(forked)


def _answering(answer: Answer, devices: int, given: dict[str, str]) -> None:
    os.environ.update(given | {"SIMULATED_CUDA_DEVICES": str(devices)})
    _measure_no_products()

    def answered(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        keys = dict(word.split("=", 1) for word in command if "=" in word)
        return answer(keys, environment)

    _replace_python(answered)


def _train(keys: dict[str, str], steps: list[int], **changed: Any) -> tuple[int, str]:
    """Write rows of these steps, as a training run; `changed` replaces values of the last."""
    rows = [{"step": step, "loss": 0.7 / step, "grad_norm": 1.0} for step in steps]
    rows[-1] |= changed
    log = RunFolder(Path(keys["run.dir"].strip('"'))).rows
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return (75 if "trainer.stop_after_steps" in keys else 0), ""


def _selftest(folder: Path, prepare: Callable[[], None] | None = None) -> tuple[Finished, dict[str, Any]]:
    out = folder / "selftest.json"
    ended = runs.run_module("dpo_dist.tools.selftest", [f"--output={out}"], prepare=prepare)
    content = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert list(folder.iterdir()) == [out]
    assert "Traceback" not in ended.output
    assert content["verdict"] in ended.output
    return ended, {check["name"]: check for check in content["checks"]} | {"content": content}


def test_a_sound_device_passes_every_check(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s, [a] {folder}="$HOME"'
    folder.mkdir()
    ended, checks = _selftest(folder, prepare=_in_forks)
    assert ended.code == 0, ended.output
    assert checks["attention chosen by auto"]["seen"] == "varlen", ended.output
    passed = ("attention by varlen", "steps of bf16", "steps of zero2")
    assert [checks[name]["outcome"] for name in passed] == ["passed"] * 3
    assert checks["steps of zero3"]["outcome"] == "measured"  # with itself it is not compared
    assert "not installed" in checks["steps of fused layers: liger"]["seen"]
    assert "needs Triton" in checks["steps of fused layers: compile"]["seen"]
    assert 0 <= checks["steps of bf16"]["values"]["difference"] < 0.05
    assert checks["GPU 0"]["values"]["capability"] == 9.0
    assert checks["versions"]["values"]["NCCL"] == "2.29.7"
    assert {"date", "host", "seconds"} <= checks["content"].keys()
    assert "on this GPU; sharding over several was not tried" in ended.output
    assert "running: steps of ddp" in ended.output


def _refused(error: DpoDistError) -> tuple[int, str]:
    """End as a run that prints errors for programs."""
    line = json.dumps({"kind": "error", "time": "2026-01-01T00:00:00", **error.as_dict()})
    return error.exit_code, f"not installed, No space left on device\n{line}\nbye\n"


def _with_faults(keys: dict[str, str], environment: dict[str, str]) -> tuple[int, str]:
    assert not environment.keys() & {"RANK", "WORLD_SIZE", "PET_NNODES"}
    assert int(keys["parallelism.timeout_seconds"]) <= 120
    visible, all_steps = environment["CUDA_VISIBLE_DEVICES"], [1, 2, 3, 4]
    is_half = visible == "4,5"
    if is_half or "trainer.stop_after_steps" in keys:  # it begins again
        return _train(keys, all_steps if is_half else [1, 2])
    if keys["model.fused"] == "liger":
        raise subprocess.TimeoutExpired("python", 900)
    if keys["model.fused"] == "compile":
        return _train(keys, all_steps, loss=0.176)
    match keys.get("parallelism"):
        case "zero2":
            return (-11, "") if keys["model.dtype"] == "bf16" else _train(keys, all_steps)
        case "ddp":
            return _train(keys, [1, 3, 4])
    if "parallelism.experts" in keys:
        assert keys["parallelism.experts"] == "4"
        return _train(keys, all_steps)
    if "model.gradient_checkpointing" in keys:
        return _train(keys, all_steps, grad_norm=None)
    if "trainer.micro_batch_tokens" in keys:
        return 139, f"{_refused(PeerLostError('another one'))[1]}rank 1 was ended by SIGSEGV\nthe end\n"
    return _train(keys, all_steps) if visible == "4" else _refused(DivergedError("loss or gradient"))


def _with_faults_on_four_gpus() -> None:
    _answering(_with_faults, 4, _GIVEN)
    mock.patch("dpo_dist.model.attention.kernels.check_kernel", side_effect=RuntimeError("a bug")).start()


def test_faults_are_failed_checks_that_say_what_they_are(tmp_path: Path) -> None:
    ended, checks = _selftest(tmp_path, prepare=_with_faults_on_four_gpus)
    assert ended.code == 1, ended.output
    wanted = {
        "steps of zero3": ("failed", "exit code 3: diverged: loss or gradient"),
        "steps of zero2": ("measured", "the others are compared with it"),
        "steps of ddp": ("failed", "steps [1, 3, 4]"),
        "steps of gradient checkpointing": ("failed", "steps [1, 2, 3], not [1, 2, 3, 4]"),
        "steps of small micro-batches": ("failed", "exit code 139: rank 1 was ended by SIGSEGV"),
        "steps of bf16": ("failed", "exit code -11: ended by SIGSEGV"),
        "steps of fused layers: compile": ("failed", "of zero2, where 0.001 is allowed"),
        "steps of a copy of the weights on each half": ("failed", "diverged: loss or gradient"),
        "steps of one GPU": ("passed", "within 0.0e+00 of zero2"),
        "steps of a mixture by zero3": ("failed", "diverged: loss or gradient"),
        "steps of a mixture whose GPUs share experts": ("measured", "the others are compared with it"),
        "steps of a run resumed on half of the GPUs": ("failed", "steps [1, 2, 3, 4], not [3, 4]"),
        "GPU 3": ("measured", "4 TFLOP/s in bf16 matrix products"),
        "attention by varlen": ("failed", "RuntimeError: a bug"),
        "steps of fused layers: liger": ("failed", "it did not end in 900 s"),
    }
    for name, (outcome, seen) in wanted.items():
        assert checks[name]["outcome"] == outcome, (name, checks[name])
        assert seen in checks[name]["seen"], (name, checks[name])


def _until_signal(keys: dict[str, str], _environment: dict[str, str]) -> tuple[int, str]:
    if "parallelism" not in keys:
        return _train(keys, [1, 2, 3, 4])
    pid = os.posix_spawn("/bin/sleep", ["sleep", "100"], {})
    sys.stderr.write(f"child {pid}\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)
    raise AssertionError


def test_a_signal_ends_processes_and_keeps_what_was_measured(tmp_path: Path) -> None:
    ended, checks = _selftest(tmp_path, prepare=partial(_answering, _until_signal, 0, {}))
    assert ended.code == 128 + signal.SIGTERM, ended.output
    assert ended.output.endswith("ended by SIGTERM\n")
    assert checks["steps of zero3"]["outcome"] == "measured"
    pid = int(ended.output.partition("child ")[2].split()[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def _without_checkpoint(keys: dict[str, str], _environment: dict[str, str]) -> tuple[int, str]:
    if "trainer.stop_after_steps" in keys:
        return _refused(CheckpointError("it cannot be written", lacks=Lack.room))  # of a run of a few KB
    return _train(keys, [1, 2, 3, 4])


def test_the_resumed_run_needs_the_interrupted_one_and_sharding_a_gpu(tmp_path: Path) -> None:
    (two := tmp_path / "two").mkdir()
    (none := tmp_path / "none").mkdir()
    ended, checks = _selftest(two, prepare=partial(_answering, _without_checkpoint, 2, {}))
    assert ended.code == 1, ended.output
    resumed = checks["steps of a run resumed on half of the GPUs"]
    assert resumed["seen"] == "exit code 2: checkpoint error: it cannot be written"
    assert "1 of" in ended.output
    ended, checks = _selftest(none, prepare=partial(_answering, _without_checkpoint, 0, {}))
    assert ended.code == 0, ended.output
    assert "one CPU process; without a GPU no GPU kernel and no sharding was tried" in ended.output


def _with_wrong_kernel(of_heads: int, longer_than: int) -> None:
    """Outputs of heads of these dimensions (0: all) are wrong where a segment has more tokens."""
    from torch.nn.attention import varlen

    right: Any = varlen.varlen_attn

    @functools.wraps(right)
    def wrong(query: Any, key: Any, value: Any, *lengths: Any, **options: Any) -> Any:
        is_wrong = query.shape[-1] in (of_heads or query.shape[-1],) and max(lengths[2:4]) > longer_than
        return right(query, key, value, *lengths, **options) * (1.2 if is_wrong else 1)

    mock.patch.object(varlen, "varlen_attn", wrong).start()
    _answering(_without_checkpoint, 1, {})


@pytest.mark.parametrize("fault", [(128, 0), (256, 0), (0, 200)])
def test_a_kernel_that_is_wrong_for_some_heads_or_long_segments_is_a_failed_check(
    fault: tuple[int, int], tmp_path: Path
) -> None:
    ended, checks = _selftest(tmp_path, prepare=partial(_with_wrong_kernel, *fault))
    assert ended.code == 1, ended.output
    assert "its output differs from plain PyTorch's" in checks["attention by varlen"]["seen"]


def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "selftest.json"):
        ended = runs.run_module("dpo_dist.tools.selftest", [f"--output={output}"])
        assert ended.code == 2
        assert "configuration error: argument --output" in ended.output
