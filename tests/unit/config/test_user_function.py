"""A user's own loss is found as source, and its text is part of the run's digest."""

import os
from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import LOSS_FUNCTION
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.user_code import find_function, user_function

RUN = ["model.path=m", "data.train=[a.jsonl]", "loss=custom"]
SOURCE = "def mine(policy, reference, config):\n    return config.beta * 1\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    find_function.cache_clear()
    return tmp_path


def found() -> tuple[str, float]:
    """The digest of a run with the loss of `own_text`, and the value of that loss."""
    config = load_run_config([*RUN, "loss.function=own_text:mine", "loss.beta=3", "run.dir=here"])
    return config.identity.digest, user_function(config.loss.function, LOSS_FUNCTION)(None, None, config.loss)


def test_the_digest_and_what_is_executed_follow_the_text_of_the_module(folder: Path) -> None:
    file = folder / "own_text.py"
    file.write_text(SOURCE)
    first = found()
    assert found() == first
    assert first[1] == 3
    times = file.stat()
    file.write_text(SOURCE.replace("1", "2"))
    # As large and as old as before: neither decides.
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    digest, value = found()
    assert digest != first[0]
    assert value == 6
    file.write_text(SOURCE)
    assert found() == first


def test_a_module_in_a_package_imports_its_neighbours(folder: Path) -> None:
    package = folder / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "numbers.py").write_text("TWO = 2\n")
    (package / "losses.py").write_text("from .numbers import TWO\n\n\ndef mine(*_):\n    return TWO\n")
    assert user_function("own_package.losses:mine", LOSS_FUNCTION)() == 2


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        (SOURCE, None, "is not found"),
        (SOURCE, "own_fault", "is not found"),
        (SOURCE, "nowhere_at_all:mine", "is not found"),
        (SOURCE, "math:exp", "is not found"),
        (SOURCE, "own_fault:other", "cannot be imported"),
        ("mine = 3\n", "own_fault:mine", "no function"),
        ("import sys\n\nsys.exit()\n", "own_fault:mine", "SystemExit"),
    ],
)
def test_a_function_that_cannot_be_used_is_named(
    folder: Path, source: str, name: str | None, said: str
) -> None:
    (folder / "own_fault.py").write_text(source)
    with pytest.raises(ConfigError, match=said) as caught:
        user_function(name, LOSS_FUNCTION)
    assert caught.value.where == "loss.function"
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("written", "remedy"),
    [
        ("own_place.py:mine", "set loss.function=own_place:mine"),
        ("./own_place.py:mine", "set loss.function=own_place:mine"),
        ("own_place.mine", "set loss.function=own_place:mine"),
        ("src/own_place.py:mine", "set loss.function=src.own_place:mine"),
        ("nowhere/own_place.py:mine", "write the module with dots and without .py"),
        ("own_place", "write the module with dots and without .py"),
    ],
)
def test_a_path_in_place_of_a_module_is_translated_if_it_is_there(
    folder: Path, written: str, remedy: str
) -> None:
    (folder / "src").mkdir()
    for place in (folder, folder / "src"):
        (place / "own_place.py").write_text(SOURCE)
    with pytest.raises(ConfigError, match="is not found") as caught:
        user_function(written, LOSS_FUNCTION)
    assert caught.value.remedy.startswith(remedy)
    if remedy.startswith("set "):
        assert callable(user_function(remedy.partition("=")[2], LOSS_FUNCTION))
