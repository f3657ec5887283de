"""One command line for all benchmarks: each is listed, explained, and takes the shared options."""

import importlib
import sys
from argparse import ArgumentParser

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
    with pytest.raises(SystemExit, match=r"^0$"):
        parsed(name, module.__doc__, benchmark, ["--help"])
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out


def test_a_given_option_counts_beside_smoke() -> None:
    def add_entries(parser: ArgumentParser) -> None:
        parser.add_argument("--entries", type=int, nargs="+", default=[1000])

    smoke = {"rounds": 1, "entries": [2], "model": "tiny"}
    shared = {"rounds": 3, "model": "40m"}
    benchmark = Benchmark(lambda _options: {}, shared=shared, own=add_entries, smoke=smoke)
    plain = parsed("store", "", benchmark, ["--rounds", "5"])
    given = parsed("store", "", benchmark, ["--smoke", "--entries", "3", "4"])
    assert (plain.rounds, plain.entries, plain.model) == (5, [1000], "40m")
    assert (given.rounds, given.entries, given.model) == (1, [3, 4], "tiny")


def test_unknown_names_and_options_that_do_not_fit_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "vs_tlr"])
    assert main() == 2
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in NAMES)
    module = importlib.import_module("benchmarks.vs_trl")
    with pytest.raises(SystemExit, match=r"^2$"):
        parsed("vs_trl", "", module.BENCHMARK, ["--pairs", "10", "--batch-pairs", "4"])
    assert "multiple" in capsys.readouterr().err
