#!/usr/bin/env bash
# Runs the tests, with arguments for pytest: ./scripts/test.sh tests/unit -k losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup_env.sh dev
unset OMP_NUM_THREADS
export TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest "$@"
