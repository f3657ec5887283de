"""A user's own loss is found as source, and its text is part of the run's digest."""

import os
from pathlib import Path

import pytest

from dpo_dist.config.identity import run_digest
from dpo_dist.config.load import load_run_config
from dpo_dist.config.user_code import find_function, user_function
from dpo_dist.foundation.errors import ConfigError

RUN = ["model.path=m", "data.train=[a.jsonl]", "loss=custom"]
SOURCE = "def mine(policy, reference, config):\n    return config.beta * 1\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    find_function.cache_clear()
    return tmp_path


def digest_of(name: str) -> str:
    return run_digest(load_run_config([*RUN, f"loss.function={name}", "run.dir=here"]))


def test_the_digest_follows_the_text_of_the_module(folder: Path) -> None:
    file = folder / "own_digest.py"
    file.write_text(SOURCE)
    first = digest_of("own_digest:mine")
    assert digest_of("own_digest:mine") == first
    times = file.stat()
    file.write_text(SOURCE.replace("1", "2"))
    # As large and as old as before: neither decides.
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest_of("own_digest:mine") != first
    file.write_text(SOURCE)
    assert digest_of("own_digest:mine") == first


def test_what_is_executed_is_the_text_of_the_digest(folder: Path) -> None:
    file = folder / "own_text.py"
    for number in "12":
        file.write_text(SOURCE.replace("1", number))
        config = load_run_config([*RUN, "loss.function=own_text:mine", "loss.beta=3"])
        assert user_function(config.loss.function)(None, None, config.loss) == 3 * int(number)


def test_a_module_in_a_package_imports_its_neighbours(folder: Path) -> None:
    package = folder / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "numbers.py").write_text("TWO = 2\n")
    (package / "losses.py").write_text("from .numbers import TWO\n\n\ndef mine(*_):\n    return TWO\n")
    assert user_function("own_package.losses:mine")() == 2


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        (SOURCE, None, "needs a function"),
        (SOURCE, "own_fault", "not the name of a function"),
        (SOURCE, "nowhere_at_all:mine", "is not found"),
        (SOURCE, "math:exp", "is not found"),
        (SOURCE, "own_fault:other", "cannot be imported"),
        ("mine = 3\n", "own_fault:mine", "no function"),
        ("import sys\n\nsys.exit()\n", "own_fault:mine", "SystemExit"),
        ("def mine(\n", "own_fault:mine", "cannot be imported"),
    ],
)
def test_a_function_that_cannot_be_used_is_named(
    folder: Path, source: str, name: str | None, said: str
) -> None:
    (folder / "own_fault.py").write_text(source)
    with pytest.raises(ConfigError, match=said) as caught:
        user_function(name)
    assert caught.value.where == "loss.function"
    assert caught.value.remedy
