#!/usr/bin/env bash
# Checks format, lint rules, types, spelling, and the links of the pages; of the code it changes nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup_env.sh dev
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/codespell
.venv/bin/mkdocs build --strict --quiet
