#!/usr/bin/env bash
# Takes the pictures of docs/images from a run's pages (needs Chromium): ./scripts/pictures.sh RUN_DIR [PAGE]
# PAGE is a runs.html, or the address that `dpo-dist pairs pairs.method=people` prints.
set -euo pipefail
run=$(realpath "$1")
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome)
shoot() { "$browser" --headless --no-sandbox --disable-gpu --hide-scrollbars --screenshot="$2" --window-size="$3" "$1"; }
page=${2:-}
if [[ $page == *.html ]]; then page=file://$(realpath "$page"); fi
cd "$(dirname "$0")/../docs/images"
shoot "file://$run/report.html" report.png 1000,720
cp "$run/dpo_metrics/training_curves.png" curves.png
for name in doctor comparison; do
    if [ -e "$run/$name/$name.html" ]; then shoot "file://$run/$name/$name.html" "$name.png" 1000,720; fi
done
case $page in
    file:*) shoot "$page" runs.png 1000,630 ;;
    http*) shoot "$page?annotator=Ada" people.png 1000,280 ;;
esac
