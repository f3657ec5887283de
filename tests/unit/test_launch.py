"""`dpo-dist launch`: its own text of help."""

import re

import pytest
from accelerate.commands.launch import launch_command_parser

from dpo_dist.verbs import launch


def test_help_names_options_that_accelerate_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--help"]) == 0
    named = re.findall(r"(--\w+) [A-Z0]", capsys.readouterr().out)
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert "--num_processes" in named
    assert known >= set(named)
