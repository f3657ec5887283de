"""Measurements of speed and memory: `python -m benchmarks NAME --help`; results in docs/scaling.md."""
