"""Options of a benchmark."""

from argparse import ArgumentParser

from benchmarks.__main__ import parsed
from benchmarks.options import Benchmark


def add_entries(parser: ArgumentParser) -> None:
    parser.add_argument("--entries", type=int, nargs="+", default=[1000])


def test_a_given_option_counts_beside_smoke() -> None:
    smoke = {"rounds": 1, "entries": [2], "model": "tiny"}
    shared = {"rounds": 3, "model": "40m"}
    benchmark = Benchmark(lambda _options: {}, shared=shared, own=add_entries, smoke=smoke)
    plain = parsed("store", "", benchmark, ["--rounds", "5"])
    given = parsed("store", "", benchmark, ["--smoke", "--entries", "3", "4"])
    assert (plain.rounds, plain.entries, plain.model) == (5, [1000], "40m")
    assert (given.rounds, given.entries, given.model) == (1, [3, 4], "tiny")
