"""An error is the same on every rank, and says what to do."""

import ast
import errno
import pickle
from pathlib import Path

import pytest

import dpo_dist
from dpo_dist.foundation.errors import (
    Arguments,
    ConfigError,
    DpoDistError,
    disk_error,
    raise_all,
)


def test_a_pickled_error_keeps_every_part() -> None:
    for kind in DpoDistError.__subclasses__():
        error = kind("what", where="where", got="got", expected="expected", remedy="r")
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.as_dict(), copy.exit_code) == (kind, error.as_dict(), error.exit_code)


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/run/x"), "/run/x"),
        (FileExistsError(errno.EEXIST, "File exists", "/run/x"), "/run/x"),  # a file or a dead link there
        (OSError(errno.ENOSPC, "No space left on device"), "run.dir, data.cache or reference.store"),
        (PermissionError(errno.EPERM, "Operation not permitted"), None),  # of a socket or a signal
        (RuntimeError("Could not determine home directory."), "a path on the command line or in a YAML file"),
        (ValueError("no path"), None),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (RuntimeError("gloo/device.cc:186] rv != -1. Too many open files"), "ulimit -n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),  # of what this does not know
    ],
)
def test_only_a_full_disk_or_a_named_path_is_a_users_error(error: Exception, where: str | None) -> None:
    found = disk_error(error)
    assert (found.where if found is not None else None) == where


def test_every_error_says_what_to_do() -> None:
    """Each place that makes an error of the user gives it a remedy."""
    kinds = {kind.__name__ for kind in DpoDistError.__subclasses__()}
    without = [
        (module.name, node.lineno)
        for module in Path(dpo_dist.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in kinds
        and not {None, "remedy"} & {keyword.arg for keyword in node.keywords}
    ]
    assert without == []


def test_several_mistakes_say_what_is_expected_once() -> None:
    remedies = ("set it to a number", "did you mean loss=ipo?", "remove it")
    mistakes = [ConfigError("no", where=remedy, expected="a number", remedy=remedy) for remedy in remedies]
    with pytest.raises(ConfigError) as raised:
        raise_all(mistakes)
    lines = [line.strip() for line in raised.value.remedy.splitlines()]
    assert ["expected" in line for line in lines] == [False, True, True]


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("--outptu page.html", "did you mean --output?"),
        ("--outptu=page.html", "did you mean --output?"),
        ("--nonsense", "--help explains the arguments"),
    ],
)
def test_an_unknown_option_of_a_tool_names_the_one_that_was_meant(typed: str, remedy: str) -> None:
    parser = Arguments(prog="tool")
    parser.add_argument("--output")
    with pytest.raises(ConfigError, match="unrecognized arguments: --") as caught:
        parser.parse_args(typed.split())
    assert caught.value.remedy == remedy
