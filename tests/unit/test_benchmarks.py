"""One command line for all benchmarks: each is listed, explained, and takes the shared options."""

import importlib
import sys

import pytest

from benchmarks.__main__ import NAMES, main, parse_options
from benchmarks.options import SHARED, Benchmark


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_has_help_and_valid_defaults(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    benchmark: Benchmark = module.BENCHMARK
    options = vars(parse_options(name, module.__doc__, benchmark, []))
    assert benchmark.shared.keys() <= SHARED.keys() & options.keys()
    smoke = vars(parse_options(name, module.__doc__, benchmark, ["--smoke"]))
    assert smoke.keys() == options.keys(), "--smoke sets options that do not exist"
    with pytest.raises(SystemExit, match=r"^0$"):
        parse_options(name, module.__doc__, benchmark, ["--help"])
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out


def test_an_unknown_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "vs_tlr"])
    assert main() == 2
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in NAMES)
