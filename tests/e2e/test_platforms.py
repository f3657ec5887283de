"""Files for places where the suite starts no run: the program accepts their arguments, pip their packages."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from torch.distributed.run import get_args_parser

from dpo_dist.config.load import load_run_config
from tests.support.launch import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
CHANGED = "loss.beta=0.2"


def text_of(name: str) -> str:
    text = (ROOT / "launch" / name).read_text()
    assert len(text.splitlines()) < 30
    return text


def calls_of(tmp_path: Path, *command: str, **variables: str) -> list[list[str]]:
    """Run a command with stand-ins for programs; return their command lines in order."""
    said = tmp_path / "said"
    for name in ("torchrun", "hf"):
        note = (
            f"import json, sys; print(json.dumps([{name!r}, *sys.argv[1:]]), file=open({str(said)!r}, 'a'))"
        )
        (tmp_path / name).write_text(f"#!{sys.executable}\n{note}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    subprocess.run(command, env=os.environ | path | variables, check=True, cwd=tmp_path)
    return [json.loads(line) for line in said.read_text().splitlines()]


def root_of_run(call: list[str]) -> str:
    """The folder of all that the run writes, by a command line of torchrun."""
    parsed = get_args_parser().parse_args(call[1:])
    assert (call[0], parsed.module, parsed.training_script) == ("torchrun", True, "dpo_dist.train")
    config = load_run_config(parsed.training_script_args, verb="train")
    for place in (config.run.dir, config.data.cache, config.reference.store):
        assert str(place).startswith(f"{config.run.root}/")
    assert config.run.resume == "auto"
    return config.run.root


def test_skypilot_resumes_from_the_bucket(tmp_path: Path) -> None:
    task = yaml.safe_load(text_of("skypilot.yaml"))
    (tmp_path / "dpo-dist" / "bin").mkdir(parents=True)
    (tmp_path / "dpo-dist" / "bin" / "activate").touch()
    variables = {"OVERRIDES": f"{task['envs']['OVERRIDES']} {CHANGED}", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    (call,) = calls_of(tmp_path, "bash", "-ec", task["run"], **variables)
    assert CHANGED in call
    assert root_of_run(call) in task["file_mounts"]


def test_trainer_resumes_from_the_claim() -> None:
    spec = yaml.safe_load(text_of("trainjob.yaml"))["spec"]
    (job,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    claims = [volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert mounts[root_of_run(spec["trainer"]["command"] + spec["trainer"]["args"])] in claims


def test_a_job_of_hugging_face_fetches_its_run_and_keeps_it(tmp_path: Path) -> None:
    block = re.search(r"^# /// script\n(.*?)^# ///$", text_of("hf_job.py"), re.DOTALL | re.MULTILINE)
    assert block
    needed = tomllib.loads(re.sub("^# ?", "", block[1], flags=re.MULTILINE))
    pins = set(needed["dependencies"]) - {"dpo-dist"}
    assert pins <= set((ROOT / "constraints.txt").read_text().splitlines())
    assert f"/dpo_dist-{VERSION}-py3" in needed["tool"]["uv"]["sources"]["dpo-dist"]["path"]
    script, bucket = str(ROOT / "launch" / "hf_job.py"), "hf://buckets/me/runs"
    fetch, call, keep = calls_of(tmp_path, sys.executable, script, bucket, "+experiment=qwen7b", CHANGED)
    assert CHANGED in call
    assert (fetch[-2:], keep[-2:]) == ([bucket, root_of_run(call)], [root_of_run(call), bucket])


def test_pip_accepts_the_steps_of_the_dockerfile(tmp_path: Path) -> None:
    """As they are, beside the copied files, without an index: what they ask for is pinned and installed."""
    text = (ROOT / "Dockerfile").read_text()
    steps = text.replace("\\\n", " ").splitlines()
    for source in (word for step in steps if step.startswith("COPY ") for word in step.split()[1:-1]):
        assert f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines()
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, tmp_path / source)
    with_pip = [step.removeprefix("RUN ") for step in steps if "pip install" in step]
    arguments = dict(re.findall(r'^ARG (\w+)="?([^"\n]*)', text, re.MULTILINE))
    arguments |= {"EXTRAS": "quantization judge", "PATH": f"{sys.exec_prefix}/bin:{os.environ['PATH']}"}
    dry = {"PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    command = ["sh", "-ec", "\n".join(with_pip)]
    said = subprocess.check_output(command, cwd=tmp_path, env=os.environ | arguments | dry, text=True)
    assert re.findall("Would install (.*)", said) == [f"dpo-dist-{VERSION}"]
