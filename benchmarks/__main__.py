"""Run one benchmark: `python -m benchmarks NAME [options]`. The last line it prints is JSON."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from benchmarks.options import SHARED, Benchmark

NAMES = {
    "vs_trl": "speed and memory beside TRL on the same pairs",
    "trl_guest": "a script of TRL by our import, beside TRL and our own run",
    "images": "CPU seconds beside TRL on pairs with images",
    "prefixes": "tokens and CPU seconds with the prefix tree and without it",
    "memory": "memory of each reference mode",
    "mfu": "share of the device's peak that training uses",
    "encode": "records encoded per second, by number of processes",
    "store": "the reference store with many entries",
    "starts": "what a start costs, by the number of records",
    "over_nodes": "bytes and seconds of ways to train over nodes, with a slow link",
}


def main() -> int:
    names = "\n".join(f"  {name:<12}{meaning}" for name, meaning in NAMES.items())
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"usage: python -m benchmarks NAME [options]; NAME --help lists the options\n\n{names}")
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    name = sys.argv[1]
    module = importlib.import_module(f"benchmarks.{name}")
    benchmark: Benchmark = module.BENCHMARK
    options = parse_options(name, module.__doc__ or "", benchmark, sys.argv[2:])
    figures = benchmark.run(options)
    line = json.dumps(figures)
    print(line)
    if options.out:
        options.out.write_text(line + "\n")
    return 0 if figures.get("trainers_agree", True) else 1


def parse_options(
    name: str, description: str, benchmark: Benchmark, arguments: list[str]
) -> argparse.Namespace:
    """Return the command line's options of a benchmark; --smoke changes defaults."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, default in benchmark.shared.items():
        parser.add_argument(f"--{option.replace('_', '-')}", default=default, **SHARED[option])
    benchmark.own(parser)
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    parser.add_argument("--out", type=Path, help="file for the figures, which are also printed")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny run that only shows whether everything works"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        parser.set_defaults(**benchmark.smoke)
        options = parser.parse_args(arguments)
    if fault := benchmark.fault(options):
        parser.error(fault)
    return options


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
