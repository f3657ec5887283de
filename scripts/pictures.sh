#!/usr/bin/env bash
# Take the pictures of docs/images from the pages of a run: ./scripts/pictures.sh RUN_DIR (needs Chromium).
set -euo pipefail
run=$(realpath "$1")
cd "$(dirname "$0")/../docs/images"
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome)
shoot() { "$browser" --headless --no-sandbox --disable-gpu --hide-scrollbars --screenshot="$2" --window-size="$3" "file://$1"; }
shoot "$run/report.html" report.png 1000,720
cp "$run/dpo_metrics/training_curves.png" curves.png
if [ -e "$run/doctor/doctor.html" ]; then shoot "$run/doctor/doctor.html" doctor.png 1000,720; fi
