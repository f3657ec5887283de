# /// script
# dependencies = ["dpo-dist", "torch==2.13.0", "accelerate==1.15.0", "deepspeed==0.19.8",
#     "transformers==5.23.0", "peft==0.21.2"]
# tool.uv.sources.dpo-dist.path = "/wheel/dpo_dist-0.1.0-py3-none-any.whl"
# [tool.hf-jobs]
# flavor = "a100x8"
# timeout = "1d"
# secrets = ["HF_TOKEN"]
# volumes = ["./dist:/wheel"]
# ///
"""Train on Hugging Face Jobs. Use a bucket folder for one run only; the same command continues the run.

python -m pip wheel --no-deps --wheel-dir dist . && hf buckets create dpo-runs --exist-ok
hf jobs uv run launch/hf_job.py hf://buckets/ME/dpo-runs/first +experiment=qwen7b loss.beta=0.2
"""

import contextlib
import subprocess
import sys

bucket, *words = sys.argv[1:]
sync = ["hf", "buckets", "sync", "--quiet"]  # a mounted bucket may refuse to change files in place
subprocess.run([*sync, bucket, "runs"], check=True)
run = subprocess.Popen(["torchrun", "--nproc_per_node=auto", "-m", "dpo_dist.train", "run.root=runs", *words])
while run.poll() is None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(timeout=600)
    kept = subprocess.run([*sync, "--delete", "runs", bucket], check=False)
sys.exit(run.returncode or kept.returncode)
