#!/usr/bin/env bash
# Looks for known vulnerabilities of the packages in constraints.txt; changes nothing. Needs pip-audit and a network.
# Exit code: 1 if there are any, or pip-audit fails; 0 if there are none, or it cannot look (a line says so).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! timeout 240 ./scripts/setup_env.sh audit >/dev/null 2>&1; then
    echo "audit skipped: pip-audit cannot be installed" >&2
    exit 0
fi
ignored=()
while read -r finding _reason; do
    if [[ -n "$finding" && "$finding" != "#"* ]]; then ignored+=(--ignore-vuln "$finding"); fi
done <scripts/audit_exceptions.txt

status=0
output="$(timeout 120 .venv/bin/python -m pip_audit --requirement constraints.txt --no-deps --disable-pip \
    --progress-spinner off ${ignored[@]+"${ignored[@]}"} 2>&1)" || status=$?
# Without its database pip-audit fails, or calls the packages unknown. What it has found counts in any case.
if grep -qE '^Found [0-9]+ known vulnerabilit' <<<"$output"; then
    echo "$output"
    exit 1
fi
if [[ "$status" == 124 ]] || grep -qE '^torch .*could not be audited|ConnectionError|ServiceError|Max retries' <<<"$output"; then
    echo "audit skipped: the database of vulnerabilities cannot be reached" >&2
    exit 0
fi
echo "$output"
exit "$status"
