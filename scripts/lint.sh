#!/usr/bin/env bash
# Checks format, lint rules, types, spelling, and links of the pages, without changing a file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup_env.sh dev
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/codespell
.venv/bin/mkdocs build --strict
