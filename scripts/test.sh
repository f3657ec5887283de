#!/usr/bin/env bash
# Runs the tests, with arguments for pytest: ./scripts/test.sh tests/unit -k losses
# One process of one thread for each core, at most 8; -n 0 runs them in this process, for a debugger.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup_env.sh dev
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal "$@"
