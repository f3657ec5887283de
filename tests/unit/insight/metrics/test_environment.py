"""environment.json: versions, commit and the command line, without secrets."""

import sys
from pathlib import Path

import pytest

import dpo_dist
from dpo_dist.insight.metrics.log import describe_environment

VERB = str(Path(dpo_dist.__file__).parent / "train.py")


def test_the_command_of_a_verb_is_that_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [VERB, "loss.beta=0.2", "data.train=[a b.jsonl]"])
    assert (
        describe_environment(1)["command"]
        == "python -m dpo_dist.train loss.beta=0.2 'data.train=[a b.jsonl]'"
    )
    on_four = "accelerate launch --num_processes 4 -m dpo_dist.train loss.beta=0.2"
    assert str(describe_environment(4)["command"]).startswith(on_four)


def test_the_command_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh12345")
    monkeypatch.setattr(sys, "argv", [VERB, "run.name=abcdefgh12345"])
    assert describe_environment(1)["command"] == "python -m dpo_dist.train run.name=***"


def test_another_program_has_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/notebook", "--token=x"])
    assert describe_environment(1)["command"] is None


def test_commit_and_changed_files_are_those_of_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    outside = describe_environment(1)
    assert (outside["git_commit"], outside["git_changed_files"]) == (None, None)
    assert {"torch", "transformers"} <= outside["packages"].keys()


def test_the_command_has_no_secret_that_a_shell_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "ab'cd efgh")
    monkeypatch.setattr(sys, "argv", [VERB, "tracking.project=ab'cd efgh"])
    command = str(describe_environment(1)["command"])
    assert "efgh" not in command
    assert "***" in command
