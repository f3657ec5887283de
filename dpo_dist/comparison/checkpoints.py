"""A checkpoint as a model or adapter folder, so that it responds as any other model does."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dpo_dist.atomic import staged_folder
from dpo_dist.comparison.startup import KEY, Compared, Kind
from dpo_dist.config.load import from_yaml
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import AttentionBackend, RunConfig
from dpo_dist.data.tokenization.chat_template import with_chosen_template
from dpo_dist.digests import content_digest
from dpo_dist.distributed.checkpoint import open_checkpoint
from dpo_dist.distributed.checkpoint_manifest import MANIFEST
from dpo_dist.distributed.checkpoint_weights import read_weights
from dpo_dist.errors import ConfigError
from dpo_dist.generation.stages import Stages
from dpo_dist.model.adapters import add_adapter
from dpo_dist.model.folder import model_folder
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.load import TORCH_DTYPES, load_config, load_tokenizer


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
        open_checkpoint(checkpoint, stages.world)
        stages.world.on_main(
            lambda: _write(checkpoint, written, _config_of_run(checkpoint)),
            stages.screen.heartbeat(f"writing {written}"),
        )
    return str(written)


def _config_of_run(checkpoint: Path) -> RunConfig:
    """Return the configuration of a checkpoint's run, which cannot ask for code of the base model."""
    run = RunFolder(checkpoint.parents[1])
    try:
        found = from_yaml(run.config.read_text(encoding="utf-8"))
        return replace(found, model=replace(found.model, trust_remote_code=False))
    except OSError as fault:
        raise ConfigError(
            "the run of this checkpoint has no configuration",
            where=KEY,
            got=f"{run.config}: {fault.strerror or fault}",
            expected="a checkpoint in its run directory, beside config.yaml",
            remedy="name a checkpoint in the directory of its run",
        ) from None


def _write(checkpoint: Path, folder: Path, config: RunConfig) -> None:
    base = model_folder(config.model.path, config.model.revision)
    weights = read_weights(checkpoint)
    dtype = TORCH_DTYPES[config.model.dtype]
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            load_config(base, config.model), dtype=dtype, trust_remote_code=config.model.trust_remote_code
        )
        packed = PackedCausalLM(causal_lm, AttentionBackend.sdpa)
        if config.model.adapter is not None:
            add_adapter(packed, config.model, config.trainer.seed)
    tokenizer = load_tokenizer(base, config.model)
    if config.data.chat_template is not None:
        tokenizer = with_chosen_template(tokenizer, config.data.chat_template)
    cast = {name: weights.whole(name).to(dtype) for name in weights.shapes}
    with staged_folder(folder) as temporary:
        packed.causal_lm.save_pretrained(temporary, state_dict=cast, max_shard_size="5GB")
        tokenizer.save_pretrained(temporary)
