"""The run folder: whose it is, who may write to it, what there is to go on from, and what a run leaves."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from dpo_dist.atomic import staged_folder, write_text
from dpo_dist.config.load import run_digest, to_yaml
from dpo_dist.config.schema import Resume, RunConfig
from dpo_dist.distributed.checkpoint import Checkpoint, latest_checkpoint
from dpo_dist.distributed.runtime import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.errors import CheckpointError
from dpo_dist.report.environment import describe_environment
from dpo_dist.report.page import METRICS_FOLDER

CHECKPOINTS = "checkpoints"
MODEL = "model"


@contextlib.contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """Keep a second start of the same run out of its folder; a dead process holds nothing. Collective.

    Raises:
        CheckpointError: another process is training there.
    """
    files = []

    def lock() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
        files.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                "another process is training in this run folder",
                where=str(run_dir),
                remedy="wait for it, or set another run.dir",
            ) from None

    world.on_main(lock)
    try:
        yield
    finally:
        for file in files:
            file.close()


def find_checkpoint(config: RunConfig, run_dir: Path, world: World) -> Checkpoint | None:
    """The checkpoint to go on from, as `run.resume` wants it; None to start afresh. Collective.

    Raises:
        CheckpointError: `run.resume` cannot be kept, the folder belongs to another configuration, or none of
            its checkpoints is whole.
    """
    root = run_dir / CHECKPOINTS
    if config.run.resume is Resume.never:
        world.on_main(partial(_refuse_used_folder, run_dir))
        return None
    checkpoint = latest_checkpoint(root, world)
    if checkpoint is None and config.run.resume is Resume.must:
        raise CheckpointError(
            "there is no checkpoint to resume from",
            where=str(root),
            remedy="set run.resume=auto to start afresh",
        )
    if checkpoint is not None and checkpoint.state["run_digest"] != run_digest(config):
        raise CheckpointError(
            "the run folder belongs to another configuration",
            where=str(run_dir),
            got=f"digest {run_digest(config)}",
            expected=f"digest {checkpoint.state['run_digest']}, see its config.yaml",
            remedy="leave run.dir out, so that every configuration has its own, or name another one",
        )
    return checkpoint


def refuse_other_inputs(checkpoint: Checkpoint, identity: Mapping[str, str | None]) -> None:
    """Do not go on with other data or another reference than the run began with.

    Raises:
        CheckpointError: files that the configuration names have changed since.
    """
    for name, digest in identity.items():
        if checkpoint.state[name] != digest:
            raise CheckpointError(
                f"the {name} of this run changed since its checkpoint was written",
                where=str(checkpoint.folder),
                got=str(digest),
                expected=str(checkpoint.state[name]),
                remedy="put the former files back, or start afresh with another run.dir",
            )


def _refuse_used_folder(run_dir: Path) -> None:
    used = [name for name in (CHECKPOINTS, METRICS_FOLDER, MODEL) if (run_dir / name).exists()]
    if used:
        raise CheckpointError(
            "the run folder is in use and run.resume=never",
            where=str(run_dir),
            got=", ".join(used),
            remedy="set run.resume=auto to go on, or another run.dir",
        )


def is_complete(checkpoint: Checkpoint, run_dir: Path) -> bool:
    """Whether the run has done its last step and left its model."""
    return bool(checkpoint.state["step"] == checkpoint.state["steps"]) and (run_dir / MODEL).is_dir()


def describe_run(config: RunConfig, run_dir: Path, world: World) -> dict[str, Any]:
    """Write config.yaml and environment.json; returns what stands in the latter. Collective."""

    def write() -> dict[str, Any]:
        write_text(run_dir / "config.yaml", to_yaml(config))
        environment = describe_environment(world.size)
        write_text(run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")
        return environment

    return world.on_main(write)


def export_model(
    policy: PolicyEngine, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World
) -> None:
    """Write the result as a folder that transformers loads; collective.

    Raises:
        CheckpointError: it cannot be written.
    """
    weights = policy.whole_weights()

    def write() -> None:
        try:
            with staged_folder(folder) as temporary:
                policy.causal_lm.save_pretrained(temporary, state_dict=weights, max_shard_size="5GB")
                tokenizer.save_pretrained(temporary)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "the trained model cannot be written",
                where=str(folder),
                got=str(error),
                remedy="make room; the last checkpoint is whole, the same command writes the model from it",
            ) from error

    world.on_main(write)


def reset_peak_memory(world: World) -> None:
    """Begin `peak_memory_bytes` anew, where the system lets it; not collective."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux only
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(world: World) -> int:
    """Of the largest rank: GPU memory where there is one, else the resident set; collective."""
    if world.device.type == "cuda":
        mine = torch.cuda.max_memory_allocated()
    else:
        import resource  # noqa: PLC0415  (POSIX only)

        mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(world.gather(mine))
