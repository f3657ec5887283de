#!/usr/bin/env bash
# Tries the newest versions that pyproject.toml allows, in build/newest: runs the tests of all families of models and of the
# private parts of other packages, and prints a table of the versions and how they ended.
#
#   ./scripts/newest.sh                        # torch as constraints.txt pins it; TORCH=2.12.0: another one in its bounds
#   ./scripts/newest.sh transformers==5.24.0   # and a version above its bound, also of torch: may the bound be raised?
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pinned() { sed -n "s/^$1==//p" constraints.txt; }

"${PYTHON:-python3}" -m venv --clear build/newest
python=build/newest/bin/python
$python -m pip install --quiet --disable-pip-version-check "torch==${TORCH:-$(pinned torch)}" --editable . \
    bitsandbytes hypothesis pytest pytest-timeout
if (($#)); then $python -m pip install --quiet --disable-pip-version-check "$@"; fi

result=passed
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $python -m pytest tests/unit/model/test_architectures.py \
    tests/unit/model/test_library_internals.py tests/unit/distributed/test_deepspeed_internals.py || result=failed
echo "| package | pinned | tried | tests |"
echo "|---|---|---|---|"
for package in torch transformers peft accelerate deepspeed datasets hydra-core wandb; do
    tried="$($python -c "import importlib.metadata as m; print(m.version('$package').partition('+')[0])")"
    echo "| $package | $(pinned $package) | $tried | $result |"
done
[[ $result == passed ]]
