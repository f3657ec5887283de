"""`dpo-dist selftest` on the simulated device, with all checks but the speeds."""

import json
from pathlib import Path

from tests.simulated_cuda import runs
from tests.simulated_cuda.test_gpu_tests import fork_python


def test_a_sound_device_passes_every_check(tmp_path: Path) -> None:
    out = tmp_path / "selftest.json"
    ended = runs.run_module("dpo_dist.selftest", ["--quick", f"--output={out}"], prepare=fork_python)
    assert ended.code == 0, ended.output
    checks = {check["name"]: check["outcome"] for check in json.loads(out.read_text())["checks"]}
    assert checks["attention by varlen, chosen by auto"] == "passed", ended.output
    assert checks["steps of bf16"] == checks["losses"] == "passed"
    assert "verdict: every way of training that was tried gives the same steps" in ended.output
