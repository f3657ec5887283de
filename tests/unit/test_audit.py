"""The audit of packages ends with an error for what it finds, never for a network that is not there."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "audit.sh"
UNKNOWN = "wandb  Dependency not found on PyPI and could not be audited: wandb (0.31.0)"
FOUND = "Found 1 known vulnerability in 1 package"


@pytest.mark.parametrize(
    ("said", "ended", "code", "shown"),
    [
        ("No known vulnerabilities found", 0, 0, "No known"),
        (FOUND, 1, 1, FOUND),
        (UNKNOWN.replace("wandb", "torch"), 0, 0, "audit skipped"),
        ("", 124, 0, "audit skipped"),
        ("error: no such option: --requirement", 2, 2, "no such option"),
    ],
)
def test_what_pip_audit_says_decides_the_exit_code(
    said: str, ended: int, code: int, shown: str, tmp_path: Path
) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "scripts/audit_exceptions.txt").write_text("# none\nGHSA-1 not used here\n")
    programs = {
        "scripts/setup_env.sh": "exit 0",
        ".venv/bin/python": f"echo \"$*\" > arguments; cat <<'END'\n{said}\nEND\nexit {ended}",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [tmp_path / "scripts/audit.sh"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done
    assert shown in done.stdout + done.stderr
    assert "--ignore-vuln GHSA-1" in (tmp_path / "arguments").read_text()
