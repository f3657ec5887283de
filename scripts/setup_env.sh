#!/usr/bin/env bash
# Creates .venv and installs the packages that constraints.txt pins; with "dev", also those of the
# tests. Does nothing if all are installed. PYTHON selects the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-}"

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        if is_recent "$PYTHON"; then echo "$PYTHON"; return; fi
        echo "error: PYTHON=$PYTHON is not a Python of version 3.11 or newer" >&2
        return 1
    fi
    for candidate in python3 python3.11 python3.12 python3.13 python; do
        if is_recent "$candidate"; then echo "$candidate"; return; fi
    done
    echo "error: found no Python of version 3.11 or newer" >&2
    echo "  to do:    install one, or name one: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

if [[ -x .venv/bin/python ]] && .venv/bin/python scripts/check_installed.py ${extra:+"$extra"}; then
    exit 0
fi
if [[ ! -x .venv/bin/python ]] || ! is_recent .venv/bin/python; then
    python="$(find_python)"
    echo "making .venv with $("$python" --version)" >&2
    "$python" -m venv --clear .venv
fi
echo "installing the packages that constraints.txt pins; the first time takes some minutes" >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${extra:+[$extra]}"
