"""A checkpoint as a model or adapter folder, so that it responds as any other model does."""

from dataclasses import replace
from pathlib import Path

from dpo_dist.comparison.startup import KEY, Compared, Kind
from dpo_dist.config.foreign_code import read_config
from dpo_dist.config.load import from_yaml
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.digests import content_digest
from dpo_dist.distributed.checkpoint_export import export_checkpoint
from dpo_dist.distributed.checkpoint_manifest import MANIFEST
from dpo_dist.errors import ConfigError
from dpo_dist.generation.stages import Stages


def whole_model(model: Compared, folder: Path, stages: Stages) -> str:
    """Return the folder or hub name of a model; of a checkpoint, a folder with its weights. Collective.

    Args:
        model: of the comparison.
        folder: of the folders written from checkpoints; one that exists is used again.
        stages: the processes.

    Raises:
        ConfigError: the checkpoint's run has no configuration, or its base model does not exist.
        CheckpointError: the checkpoint is damaged.
    """
    if model.kind is not Kind.checkpoint:
        return model.location
    checkpoint = Path(model.location).resolve()
    digest = content_digest([checkpoint / MANIFEST])[:16]
    written = folder / f"{checkpoint.parents[1].name}-{checkpoint.name}-{digest}"

    if not stages.world.on_main(written.is_dir):
        stages.screen.say(f"{model.name}: writing the weights of {model.path} as a model folder")
        stages.world.on_main(
            lambda: export_checkpoint(checkpoint, written, _config_of_run(checkpoint)),
            stages.screen.heartbeat(f"writing {written}"),
        )
    return str(written)


def _config_of_run(checkpoint: Path) -> RunConfig:
    """Return the configuration of a checkpoint's run, which cannot ask for code of the base model."""
    run = RunFolder(checkpoint.parents[1])
    try:
        found = from_yaml(read_config(run.config))
        return replace(found, model=replace(found.model, trust_remote_code=False))
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(
            "the run of this checkpoint has no configuration",
            where=KEY,
            got=f"{run.config}: {getattr(fault, 'strerror', None) or fault}",
            expected="a checkpoint in its run directory, beside config.yaml",
            remedy="name a checkpoint in the directory of its run",
        ) from None
