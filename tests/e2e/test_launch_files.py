"""Accelerate and SLURM read the launch files, and a user's arguments reach the program unchanged."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
OVERRIDES = ["+experiment=[qwen7b,smoke]", "data.train=[{path: my pairs.jsonl, limit: 4}]", "run.name=a$b"]
"""Arguments that a shell would split or expand."""
REQUEUES = '[[ $1 == requeue ]] && echo "$@" && kill -KILL $PPID; echo NodeAddr=10.0.0.4'
"""A scontrol that ends the script as SLURM does when it queues a job again."""


def test_the_doctor_gets_its_arguments_on_a_node_without_gpus(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf \'%s\\n\' "$OMP_NUM_THREADS" "$@"\n')
    python.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DPO_DIST_ENV": ""}
    script = SBATCH.with_name("doctor.sbatch")
    said = subprocess.check_output(["bash", script, *OVERRIDES], cwd=ROOT, env=variables, text=True)
    assert said.splitlines() == ["1", "-m", "dpo_dist", "doctor", *OVERRIDES]
    assert "--gres" not in script.read_text()


def test_headers_ask_for_whole_nodes_of_8_gpus() -> None:
    before_commands = SBATCH.read_text().partition("\nset -")[0]
    lines = [line for line in before_commands.splitlines() if line.startswith("#SBATCH --")]
    options = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines if "=" in line)
    assert options["gres"] == "gpu:8"
    assert "ntasks-per-node" not in options, "--nodes=1-4 would get one node"
    assert {"nodes", "cpus-per-task", "mem", "time"} <= options.keys()
    assert "%j" in options["output"], "two jobs must not write one file"
    assert "/" not in options["output"], "SLURM creates no folder for it"


def test_accelerate_reads_geometries() -> None:
    for file in (ROOT / "launch" / "accelerate").glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        geometry = load_config_from_file(str(file))
        assert (geometry.distributed_type, geometry.num_machines) == ("DEEPSPEED", 1), file
        assert geometry.num_processes == int(file.stem.rpartition("_")[2]), file
        assert content["deepspeed_config"] == {}, "DeepSpeed is configured by the program"
        assert "mixed_precision" not in content, "precision is model.dtype"


def launcher_command(
    tmp_path: Path,
    cwd: Path = ROOT,
    unset: str = "",
    programs: dict[str, str] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run the batch script with `srun` and `scontrol` that answer for node 1 of a job on 3 nodes of 4 GPUs.

    Standard output is the command of that node, a JSON list. `unset` is a variable that this cluster's SLURM
    does not set, `programs` are bodies of other stand-ins.
    """
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    stand_ins = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=1 exec "$@"',
        "scontrol": '[[ $2 == hostnames ]] && printf "n4\\nn5\\nn7\\n" || echo "  NodeAddr=10.0.0.4 Port=0"',
        "python": f"exec {shlex.quote(sys.executable)} -c '{show}' \"$@\"",
    }
    for name, body in (stand_ins | (programs or {})).items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "n[4-5,7]",
        "SLURM_NNODES": "3",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
        "DPO_DIST_ENV": "",
        "JOB_FILES": str(tmp_path),
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
    }
    job.pop(unset, None)
    return subprocess.run(
        ["bash", SBATCH, *OVERRIDES],
        env=job | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def parsed(answer: subprocess.CompletedProcess[str]) -> tuple[dict[str, object], list[str]]:
    """Return accelerate's settings for the command, and the program's arguments."""
    assert answer.returncode == 0, answer.stderr
    *module, verb = (found := json.loads(answer.stdout))[:3]
    assert (module, verb) == (["-m", "dpo_dist"], "launch")
    options = found[3:]
    validated, _, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    return vars(validated), validated.training_script_args


def test_each_node_launches_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings, arguments = parsed(launcher_command(tmp_path))
    assert (settings["num_machines"], settings["machine_rank"]) == (3, 1)
    assert settings["num_processes"] == 12
    assert settings["main_process_ip"] == "10.0.0.4"
    assert 1024 < int(str(settings["main_process_port"])) < 32768
    assert settings["use_deepspeed"]
    assert settings["deepspeed_multinode_launcher"] == "standard"
    assert settings["module"]
    assert settings["training_script"] == "dpo_dist"
    assert arguments == ["train", *OVERRIDES]


@pytest.mark.parametrize("unset", ["SLURM_GPUS_ON_NODE", "SLURM_CPUS_PER_TASK"])
def test_variables_choose_verb_and_processes(
    tmp_path: Path, unset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where SLURM counts no GPUs, or no CPUs."""
    monkeypatch.chdir(ROOT)
    activate = tmp_path / "activate"
    activate.write_text("export PATH=$PATH; : $UNSET_AS_IN_REAL_ONES; VERB_OF_ENV=1\n")
    chosen = {"VERB": "precompute", "PROCESSES_PER_NODE": "2", "DPO_DIST_ENV": str(activate)}
    settings, arguments = parsed(launcher_command(tmp_path, unset=unset, **chosen))
    assert arguments[0] == "precompute"
    assert settings["num_processes"] == 6


@pytest.mark.parametrize(
    ("faulty", "said"),
    [
        ({"cwd": Path("/")}, "submit from the root of the checkout"),
        ({"unset": "SLURM_GPUS_ON_NODE"}, "PROCESSES_PER_NODE=8"),
        ({"MAX_IDLE_STARTS": "0"}, "set a number of starts"),
        ({"DPO_DIST_ENV": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_fault_gets_a_remedy(tmp_path: Path, faulty: dict[str, Any], said: str) -> None:
    answer = launcher_command(tmp_path, **faulty)
    assert answer.returncode == (1 if said == "/nowhere" else 2)
    assert said in answer.stderr
    assert "unbound" not in answer.stderr


@pytest.mark.parametrize(
    ("reason", "is_queued_again"), [("TimeLimit", True), ("None", False)], ids=["time limit", "scancel"]
)
def test_only_a_time_limit_queues_a_job_again_that_slurm_ends(
    tmp_path: Path, reason: str, is_queued_again: bool
) -> None:
    """SLURM sends SIGTERM to the script and to the run, which still saves."""
    scontrol = (
        f'[[ "$1 $2" == "show job" ]] && echo "JobState=COMPLETING Reason={reason}" && exit\n{REQUEUES}'
    )
    srun = "kill -TERM $PPID; sleep 0.2; exit 75"
    ended = launcher_command(tmp_path, programs={"scontrol": scontrol, "srun": srun})
    assert ("requeue 123456" in ended.stdout) == ("is queued again" in ended.stdout) == is_queued_again


@pytest.mark.parametrize(
    ("of_nodes", "ended", "said"),
    [
        ("0 0 0", 0, ""),
        ("2 143 143", 2, ""),  # srun has ended the others
        ("75 3 69", 3, ""),
        ("69 137 69", None, "a process died"),
        ("- 69 137", None, "a process died"),  # a node that wrote nothing
        ("75 75 75", None, "the run was stopped and saved"),
    ],
)
def test_the_codes_of_all_nodes_decide(tmp_path: Path, of_nodes: str, ended: int | None, said: str) -> None:
    srun = f"""while [[ $1 == --* ]]; do shift; done
        codes=({of_nodes})
        for SLURM_NODEID in 2 0 1; do
            export SLURM_NODEID
            if [[ ${{codes[SLURM_NODEID]}} == - ]]; then continue; fi
            CODE=${{codes[SLURM_NODEID]}} "$@" || code=$?
        done
        exit ${{code:-0}}"""
    programs = {"srun": srun, "scontrol": REQUEUES, "python": "exit $CODE"}
    answer = launcher_command(tmp_path, programs=programs)
    assert answer.returncode == (-signal.SIGKILL if ended is None else ended), answer.stderr
    assert said in answer.stdout
    assert (ended is None) == (tmp_path / "dpo_dist-123456").exists()


def test_the_code_of_srun_counts_where_a_node_could_not_write_its_own(tmp_path: Path) -> None:
    """As on a full disk."""
    answer = launcher_command(tmp_path, programs={"srun": "exit 2"})
    assert answer.returncode == 2
    assert "queued again" not in answer.stdout


def test_a_run_is_queued_again_although_the_files_of_the_job_are_gone(tmp_path: Path) -> None:
    srun = 'rm -r "$JOB_FILES"/dpo_dist-*; exit 75'
    answer = launcher_command(tmp_path, programs={"srun": srun, "scontrol": REQUEUES})
    assert "the run was stopped and saved: job 123456 is queued again" in answer.stdout, answer.stderr
    assert "syntax error" not in answer.stderr


@pytest.mark.parametrize(
    ("shown", "is_of_array"),
    [("echo JobId=123456 ArrayTaskId=1", True), ("echo JobId=123456", False), ("exit 1", True)],
)
def test_a_job_submitted_within_an_array_is_none_of_it(
    tmp_path: Path, shown: str, is_of_array: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It inherits variables. If SLURM gives no answer they count: a run without its override is wrong."""
    monkeypatch.chdir(ROOT)
    scontrol = f"""case "$1 $2" in
        "show job") {shown} ;;
        *) echo NodeAddr=10.0.0.4 ;;
    esac"""
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "EACH": "loss.beta=0.1 loss.beta=0.7"}
    _, arguments = parsed(launcher_command(tmp_path, programs={"scontrol": scontrol}, **array))
    assert arguments == ["train", *OVERRIDES, *(["loss.beta=0.7"] if is_of_array else [])]
