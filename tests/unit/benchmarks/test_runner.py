"""One command line for all benchmarks: each is listed, explained, and takes the shared options."""

import importlib
import sys

import pytest

from benchmarks.__main__ import NAMES, main, parsed
from benchmarks.options import SHARED, Benchmark


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_has_help_and_valid_defaults(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    benchmark: Benchmark = module.BENCHMARK
    options = vars(parsed(name, module.__doc__, benchmark, []))
    assert benchmark.shared.keys() <= SHARED.keys() & options.keys()
    smoke = vars(parsed(name, module.__doc__, benchmark, ["--smoke"]))
    assert smoke.keys() == options.keys(), "--smoke sets options that do not exist"
    assert {key: smoke[key] for key in benchmark.smoke} == benchmark.smoke
    with pytest.raises(SystemExit, match=r"^0$"):
        parsed(name, module.__doc__, benchmark, ["--help"])
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out


def test_without_a_known_name_the_benchmarks_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "vs_tlr"])
    assert main() == 2
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in NAMES)


def test_options_that_do_not_fit_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module("benchmarks.vs_trl")
    with pytest.raises(SystemExit, match=r"^2$"):
        parsed("vs_trl", "", module.BENCHMARK, ["--pairs", "10", "--batch-pairs", "4"])
    assert "multiple" in capsys.readouterr().err
