"""`dpo-dist launch`: its own text of help, and a start from nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from dpo_dist.verbs import launch


def test_help_names_options_that_accelerate_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--help"]) == 0
    named = re.findall(r"(--\w+) [A-Z0]", capsys.readouterr().out)
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert "--num_processes" in named
    assert known >= set(named)


@pytest.mark.slow
def test_the_command_starts_a_script_and_ends_as_it_does(tmp_path: Path) -> None:
    """Other tests fork the launcher: this one would miss an import that only they have."""
    (script := tmp_path / "script.py").write_text("import sys\nsys.exit(int(sys.argv[1]))")
    command = [sys.executable, "-m", "dpo_dist", "launch", "--num_processes", "1", str(script), "7"]
    assert subprocess.run(command, cwd=tmp_path, check=False, timeout=300).returncode == 7
