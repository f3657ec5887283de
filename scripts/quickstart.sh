#!/usr/bin/env bash
# Installs into .venv, makes a small model and preference pairs, warms the model up, trains it by DPO with
# ZeRO-3 on all GPUs, or without a GPU in two CPU processes, and prints answers before and after. Writes only
# to .venv and output. PYTHON selects the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    launch=(accelerate launch)
else
    # More threads would be slower, because the model is small.
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    launch=(accelerate launch --config_file launch/accelerate/cpu_2.yaml)
fi

echo "== 1/4 model and pairs"
python -m examples.demo.make output/demo
echo "== 2/4 supervised warm-up"
"${launch[@]}" -m dpo_dist.train +experiment=demo_warmup run.dir=output/demo-warmup
echo "== 3/4 DPO"
"${launch[@]}" -m dpo_dist.train +experiment=demo run.dir=output/demo-dpo \
    'data.eval=[output/demo/pairs_eval.jsonl]' trainer.eval_every=20 sampling.prompts=8
echo "== 4/4 answers before and after"
python -m examples.demo.report --before output/demo-warmup/model --after output/demo-dpo/model \
    --pairs output/demo/pairs_eval.jsonl --run output/demo-dpo
echo
# The shell that started this has no dpo-dist: only this script's PATH has .venv.
printf 'talk to it: %q chat %q\n' "$PWD/.venv/bin/dpo-dist" "$PWD/output/demo-dpo"
