"""The verb `doctor`, as far as it comes before the data."""

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.doctor import main
from dpo_dist.errors import ConfigError, DpoDistError, ExitCode


def test_a_mistyped_rule_is_found_before_the_data_are_read() -> None:
    keys = ["model.path=m", "data.train=[absent.jsonl]", "doctor.thresholds={duplicate: 0.1}"]
    with pytest.raises(ConfigError, match="no such rule"):
        main(load_run_config(keys))


def test_other_processes_of_a_launcher_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run_config(["model.path=m", "data.train=[absent.jsonl]"])
    monkeypatch.setenv("RANK", "1")
    assert main(config) == ExitCode.completed
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DpoDistError, match="absent"):
        main(config)
