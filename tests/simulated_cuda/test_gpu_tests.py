"""The tests of GPUs pass on the simulated device, so that they are right when a GPU is there.

In one process of pytest, forked from the parent that has the device; the commands that the tests start are
forks of it, which have not used the device yet.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

from tests.simulated_cuda import runs
from tests.support.launch import ROOT
from tests.support.warm_benchmarks import run_fork

FIRST = ("reference_memory", "train")
"""They start processes, which cannot be forks once this process has used the device."""
NOT_HERE = {
    "compile": "the stream classes of a CUDA build are not Python's",
    "liger": "Triton's kernels",
    "flash": "the kernels of flash-attn",
    "delta_kernels": "the kernels of flash-linear-attention",
    "baselines": "speeds of a real GPU",
    "expandable": "segments of CUDA's allocator",
    "higher_in_bf16": "a CPU is not faster in bf16",
    "mistral": "llama and gemma2 have the check",
    "start[qwen2-": "as mistral",
    "start[gemma3_text": "as mistral",
    "zero2": "test_runs.py has it",
    "checkpointed": "test_runs.py has it",
    "offloaded": "test_runs.py has it",
}


def fork_python() -> None:
    """From now on a command line of Python is a fork of this process."""
    run = subprocess.run

    def forked(command: list[str], *more: Any, **options: Any) -> Any:
        return (run_fork if command[:2] == [sys.executable, "-m"] else run)(command, *more, **options)

    mock.patch.object(subprocess, "run", forked).start()


def test_the_tests_of_gpus_pass(tmp_path: Path) -> None:
    files = {file.stem: str(file) for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))}
    ordered = [files.pop(f"test_{name}_gpu") for name in FIRST] + [*files.values()]
    report = tmp_path / "report.xml"
    plugins = ["-p", "no:xdist", "-p", "no:cacheprovider"]
    chosen = ["-k", " and ".join(f"not {name}" for name in NOT_HERE)]
    files_of_its_own = [f"--basetemp={tmp_path}/tests", f"--junitxml={report}"]
    ended = runs.run_module("pytest", [*ordered, *plugins, *chosen, *files_of_its_own], prepare=fork_python)
    assert ended.code == 0, ended.output
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert not [case.get("name") for case in cases if case.find("skipped") is not None], ended.output
    modules = {str(case.get("classname")).rpartition(".")[2] for case in cases}
    assert modules == {Path(file).stem for file in ordered}
