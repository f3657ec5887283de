"""Read and write a run's state, and check whether a configuration continues the run. Imports no torch.

A run's identity has the digests of its configuration and inputs. Every checkpoint has it, and so does
`run_state.json`, which also has the number of steps done. A run may only be continued unchanged, longer, or
by AdamW in bf16 in place of float32, and back.
`expected_start` decides whether a start is new, resumes or has nothing to do: for `training.run.find_start`,
which opens the checkpoint, and for a dry run.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from dpo_dist.config.identity import RunIdentity
from dpo_dist.config.keys import to_unset
from dpo_dist.config.load import changed_keys
from dpo_dist.config.run_folder import STATE, RunFolder, checkpoint_folders
from dpo_dist.config.schema import Resume, RunConfig
from dpo_dist.foundation.errors import CheckpointError, RunOutcome, dead_link, first_line
from dpo_dist.foundation.fields import as_written
from dpo_dist.foundation.files import MEMO_FOLDER, write_json
from dpo_dist.foundation.text import first_few
from dpo_dist.model.files.manifest import MODEL_MANIFEST, added_files, find_damage

Identity = dict[str, str | None]
_DIGESTS = {
    "description": "tokenizer, chat template, config.json, generation_config.json, processor or adapter that "
    "the policy starts from",
    "model": "model that the policy starts from",
    "data": "training data",
    "eval_data": "evaluation data",
    "reference": "reference model",
    "teacher": "teacher",
}


@dataclass(frozen=True)
class RunState:
    """Content of `run_state.json`.

    Attributes:
        step: steps done; with the outcomes `started` and `diverged`, steps of the last checkpoint.
        summary: content of summary.json of a finished run, else None.
        stopped_by: reasons of a stop, such as a signal, a limit or the tracker's stop button.
    """

    outcome: RunOutcome
    step: Annotated[int, Field(ge=0)]
    identity: Identity
    summary: dict[str, Any] | None = None
    stopped_by: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done and the model was written."""
        return self.outcome in (RunOutcome.exported, RunOutcome.completed)


def read_state(folder: RunFolder) -> RunState | None:
    """Return the state of the run in `folder`; None if it has no state file."""
    try:
        return TypeAdapter(RunState).validate_json(folder.state.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the state of this run cannot be read",
            where=str(folder.state),
            got=first_line(error),
            remedy="restore the file, or delete it to resume from the last checkpoint",
        ) from error


def write_state(folder: RunFolder, state: RunState) -> None:
    """Write the state file, all of it or nothing."""
    write_json(folder.state, asdict(state))


def check_identity(recorded: Mapping[str, Any], identity: Identity, where: Path) -> None:
    """Check that the data and models in `identity`, which may be some of them, are those of `recorded`."""
    for name, title in _DIGESTS.items():
        if name in identity and recorded.get(name) != identity[name]:
            raise CheckpointError(
                f"the {title} of this run has changed since the run was saved",
                where=str(where),
                got=f"digest {identity[name]}",
                expected=f"digest {recorded.get(name)}",
                remedy="restore the former files (for data, also the tokenizer and data.cache), "
                "or start a new run with another run.dir",
            )


def has_other_length(recorded: Mapping[str, Any], identity: RunIdentity) -> bool:
    """Return whether the recorded run has another length, and can be resumed at this one.

    `recorded`: state of a checkpoint, or the identity in the state file.
    """
    is_same = recorded.get("resume_digest") == identity.resume_digest
    return is_same and recorded["length"] != identity.length


def check_configuration(recorded: Mapping[str, Any], identity: RunIdentity, folder: RunFolder) -> None:
    """Check that a run directory belongs to this run, perhaps at another length or by the other AdamW."""
    is_same = recorded.get("run_digest") == identity.digest
    if not is_same and recorded.get("resume_digest") != identity.resume_digest:
        differing = changed_keys(folder.config, identity)
        function = identity.config.loss.function
        source = "" if function is None else f", which depends on the source of {function}"
        raise CheckpointError(
            "the run directory belongs to another configuration",
            where=str(folder.config if differing else folder),
            got=", ".join(f"{key}={as_written(new)}" for key, (_, new) in differing.items())
            or f"digest {identity.digest}{source}",
            expected=", ".join(f"{key}={as_written(old)}" for key, (old, _) in differing.items())
            or f"digest {recorded.get('run_digest')}",
            remedy=to_unset("run.dir")
            + ", so that each configuration has its own folder, or set another run.dir",
        )


def describe_changes(state: Mapping[str, Any], config: RunConfig, steps: int, batch: int) -> list[str]:
    """Return lines to print about a run that continues to more `steps`, or by the other AdamW.

    `batch`: the pairs of a step.
    """
    trainer = config.trainer
    changes = []
    optimizer = state.get("optimizer", config.optim.kind)
    if optimizer != config.optim.kind:
        changes.append(f"optim.kind={config.optim.kind} continues from the states of {optimizer}")
    former = int(state.get("steps", steps))
    if steps < former:
        raise CheckpointError(
            "a run can only be continued to the same length or a greater one",
            where="trainer.epochs" if trainer.max_steps is None else "trainer.max_steps",
            got=f"{steps:,} steps",
            expected=f"at least {former:,} steps",
            remedy="set at least the former length, or another run.dir",
        )
    if steps == former:
        return changes
    skipped = int(state["step"]) * batch - int(state["pairs_seen"])
    partial = f"; the next {skipped} pairs of the order are not trained" if skipped else ""
    rate = "the learning rate follows the schedule of the new length"
    changes.append(f"training longer: {steps:,} steps in place of {former:,}; {rate}{partial}")
    return changes


def model_damage(identity: RunIdentity, folder: RunFolder) -> list[str]:
    """Return what is missing of the model of a run, or is not as it was written; [] if nothing is.

    Raises CheckpointError for added files: what is written again would lose them.
    """
    if not any(folder.model.glob("*.safetensors")):
        return ["it has no weights"]
    if not (folder.model / MODEL_MANIFEST).is_file():
        return [f"{MODEL_MANIFEST} is missing"]
    added = added_files(folder.model)
    if added and not folder.model.is_symlink():  # what a link names stays
        raise CheckpointError(
            "the model of this run has files that were added",
            where=str(folder.model),
            got=first_few(added, "other file"),
            expected=f"the files of its {MODEL_MANIFEST}, pages, pictures and generation_config.json",
            remedy="move them elsewhere, and run the same command again",
        )
    return find_damage(folder.model, Path(identity.config.reference.store) / MEMO_FOLDER)


def find_finished(identity: RunIdentity, folder: RunFolder) -> RunState | None:
    """Return the state of a run that is complete at this length and has its model, undamaged; else None.

    Raises an error if the directory belongs to another run.
    """
    state = read_state(folder)
    if state is None or not state.is_finished or has_other_length(state.identity, identity):
        return None
    if not any(folder.model.glob("*.safetensors")):
        return None
    check_configuration(state.identity, identity, folder)  # first: the next reads the whole model once
    return None if model_damage(identity, folder) else state


def expected_start(identity: RunIdentity, resume: Resume, folder: RunFolder) -> RunState | Path | None:
    """Return the state of a run that is complete, or the newest checkpoint, unopened; None for a new run.

    Raises an error for a start that is refused.
    """
    if resume is not Resume.never:
        finished = find_finished(identity, folder)
        if finished:
            return finished
        checkpoints = checkpoint_folders(folder.checkpoints)
        if checkpoints:
            return checkpoints[0]
    _check_fresh_start(identity, resume, folder)
    return None


def check_newest_checkpoint(identity: RunIdentity, folder: RunFolder) -> None:
    """Check that the newest checkpoint, if it can be read, belongs to this run."""
    newest = checkpoint_folders(folder.checkpoints)[:1]
    if not newest:
        return
    try:
        state = json.loads((newest[0] / STATE).read_bytes())
    except (OSError, ValueError):
        return
    if "run_digest" in state:
        check_configuration(state, identity, folder)


def _check_fresh_start(identity: RunIdentity, resume: Resume, folder: RunFolder) -> None:
    """Raise an error if a start at step 0 needs a checkpoint, or would replace results."""
    state = read_state(folder)
    has_model = folder.model.is_dir()
    damage: list[str] = []
    remedy: str
    dead = dead_link(folder.checkpoints)
    results = [path.name for path in (folder.checkpoints, folder.metrics, folder.model) if path.exists()]
    if resume is Resume.never:
        if not results:
            return
        fault = f"the run directory has results of a run ({', '.join(results)}), and run.resume=never"
        remedy = "set run.resume=auto to resume, or another run.dir"
    elif has_model or (state is not None and (state.is_finished or state.step)):
        fault = "the run directory has a model or a run that has started, and its checkpoints are missing"
        damage = model_damage(identity, folder) if has_model else []
        remedy = (
            "restore the checkpoints, or mount their disk, and set the former length; to train from the "
            f"beginning, delete {folder.state.name} and {folder.model.name}/, or set another run.dir"
        )
    elif dead:
        fault = f"the checkpoints of this run directory are {dead}"
        remedy = "mount the disk or create the folder; to train from the beginning, delete the link"
    elif resume is Resume.must:
        fault = "there is no checkpoint to resume from"
        remedy = "set run.resume=auto to start a new run"
    else:
        return
    got = f"{folder.model}: {first_few(damage, 'other file')}" if damage else ""
    raise CheckpointError(fault, where=str(folder.path), got=got, remedy=remedy)
