"""Measurements of speed and memory: `python -m benchmarks NAME --help`; results in benchmarks/log.md."""
