#!/usr/bin/env bash
# Runs the tests, with arguments for pytest: ./scripts/test.sh tests/unit -k losses
# Runs three processes of one thread per two cores, because many tests wait, and at most 8. For a debugger, -n 0 runs
# all tests in this process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup_env.sh dev
workers=$(($(nproc) * 3 / 2)) # before the next line, which makes nproc print 1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE # else each process of a test would compile all modules again
# Tests of files wait for the disk for half of their time. Where the memory is too small for theirs, as in Docker by
# default, they are on the disk.
memory=$(df --output=avail /dev/shm 2>/dev/null | tail -n 1) || memory=0
if ((memory > 8000000)); then export PYTEST_DEBUG_TEMPROOT=/dev/shm; fi
exec .venv/bin/python -m pytest --numprocesses $((workers > 8 ? 8 : workers)) --dist worksteal "$@"
