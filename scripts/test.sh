#!/usr/bin/env bash
# Runs the tests, with arguments for pytest: ./scripts/test.sh tests/unit -k losses
# Three processes of one thread for each two cores, as many tests wait, at most 8; -n 0 runs them in this one, for a
# debugger.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup_env.sh dev
workers=$(($(nproc) * 3 / 2)) # before the next line, by which nproc would answer 1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE # each process of a test would compile all modules again
exec .venv/bin/python -m pytest --numprocesses $((workers > 8 ? 8 : workers)) --dist worksteal "$@"
