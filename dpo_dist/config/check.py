"""What must hold between the values of a run: every cross-field rule, in one place (law L5)."""

from dpo_dist.config.check_adapter import check_adapter
from dpo_dist.config.check_data import check_data
from dpo_dist.config.check_loss import check_loss
from dpo_dist.config.check_placement import check_placement
from dpo_dist.config.check_store import check_store
from dpo_dist.config.loss_kinds import LossConfig
from dpo_dist.config.ranges import check_range
from dpo_dist.config.schema import (
    AttentionBackend,
    DataConfig,
    Dtype,
    FolderConfig,
    ModelConfig,
    Offload,
    OptimConfig,
    ParallelismConfig,
    ParallelismKind,
    ReferenceConfig,
    ReferenceMode,
    RunConfig,
    TrainerConfig,
)
from dpo_dist.errors import ConfigError


def check(config: RunConfig) -> None:
    """Accept `config` or say what does not fit together.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_paths_named(config)
    _check_folder(config.run)
    _check_model(config.model)
    check_data(config.data)
    check_loss(config.loss)
    _check_reference(config.reference, config.loss)
    check_store(config.reference)
    _check_optim(config.optim)
    _check_trainer(config.trainer, config.data)
    _check_parallelism(config.parallelism)
    check_adapter(config.model, config.reference, config.parallelism)
    check_placement(config)
    _check_deterministic(config)


def _check_paths_named(config: RunConfig) -> None:
    """An empty path would be the folder that the command is started in."""
    sources = {
        f"{key}[{index}].path": source.path
        for key, entries in (("data.train", config.data.train), ("data.eval", config.data.eval))
        for index, source in enumerate(entries)
    }
    named = {
        "model.path": config.model.path,
        "run.dir": config.run.dir,
        "run.root": config.run.root,
        "data.cache": config.data.cache,
        "reference.path": config.reference.path,
        "reference.store": config.reference.store,
        "reference.nvme_path": config.reference.nvme_path,
        **sources,
    }
    for key, path in named.items():
        if path is not None and not path.strip():
            raise ConfigError(f"{key} is empty", where=key, got=repr(path), remedy="write the path")


def _check_folder(run: FolderConfig) -> None:
    if not run.name or "/" in run.name:
        raise ConfigError(
            "run.name is the name of one folder",
            where="run.name",
            got=repr(run.name),
            expected="a name without /",
            remedy="set run.root to choose where the folder goes",
        )


def _check_model(model: ModelConfig) -> None:
    sixteen_bits = (AttentionBackend.flash_attention_2, AttentionBackend.varlen)
    if model.dtype is Dtype.fp32 and model.attention in sixteen_bits:
        raise ConfigError(
            f"{model.attention} computes in 16 bits only",
            where="model.attention, model.dtype",
            got=f"{model.attention}, {model.dtype}",
            remedy="set model.attention=sdpa or model.dtype=bf16",
        )
    if model.compile and model.liger:
        raise ConfigError(
            "torch.compile and Liger's kernels fuse the same operations",
            where="model.compile, model.liger",
            got="true, true",
            expected="one of them",
            remedy="set model.liger=false or model.compile=false",
        )
    _check_checkpointing(model.gradient_checkpointing)


def _check_checkpointing(value: bool | int | str) -> None:
    usable = value in ("none", "full") if isinstance(value, bool | str) else value >= 2
    if not usable:
        meant = "none" if value in (False, 0) else "full"
        raise ConfigError(
            "model.gradient_checkpointing is not a choice of layers",
            where="model.gradient_checkpointing",
            got=str(value).lower(),
            expected="none, full, or n of 2 or more: every n-th layer",
            remedy=f"set model.gradient_checkpointing={meant}",
        )


def _check_reference(reference: ReferenceConfig, loss: LossConfig) -> None:
    check_range("reference.micro_batch_tokens", reference.micro_batch_tokens, at_least=1)
    check_range("reference.rows_per_shard", reference.rows_per_shard, at_least=1)
    check_range("reference.audit_pairs", reference.audit_pairs, at_least=0)
    kinds = loss.kinds
    needed = loss.needs_reference
    if needed and reference.mode is ReferenceMode.none:
        raise ConfigError(
            "this loss needs a reference model",
            where="reference.mode",
            got=f"none with {', '.join(kinds)}",
            expected="auto, cached or live, or adapter with model.adapter",
            remedy="choose reference=auto, or set loss.reference_free=true to take its log-probs as 0",
        )
    if not needed and reference.mode is not ReferenceMode.none:
        raise ConfigError(
            "this loss does not use a reference model",
            where="reference.mode",
            got=f"{reference.mode} with {', '.join(kinds)}, reference_free={loss.reference_free}".lower(),
            expected="auto or none",
            remedy="choose reference=none, or remove reference.mode: auto follows the loss",
        )
    if not needed:
        _check_no_reference_options(reference)
    if reference.micro_batch_tokens is not None and reference.mode is not ReferenceMode.cached:
        raise ConfigError(
            "only a pass that fills the store has micro-batches of its own",
            where="reference.micro_batch_tokens, reference.mode",
            got=f"{reference.micro_batch_tokens}, {reference.mode}",
            expected="reference.mode=cached",
            remedy="leave reference.micro_batch_tokens out; trainer.micro_batch_tokens is used",
        )
    if reference.revision is not None and reference.path is None:
        raise ConfigError(
            "reference.revision has no effect without reference.path",
            where="reference.revision, reference.path",
            got=f"{reference.revision}, null",
            remedy="set reference.path too, or model.revision for both",
        )


def _check_no_reference_options(reference: ReferenceConfig) -> None:
    for option in ("path", "revision", "offload"):
        value = getattr(reference, option)
        if value != getattr(ReferenceConfig, option):
            raise ConfigError(
                f"reference.{option} has no effect without a reference",
                where=f"reference.{option}, reference.mode",
                got=f"{value}, none",
                remedy=f"leave reference.{option} out",
            )


def _check_optim(optim: OptimConfig) -> None:
    check_range("optim.lr", optim.lr, above=0)
    check_range("optim.warmup_ratio", optim.warmup_ratio, at_least=0, at_most=1)
    check_range("optim.weight_decay", optim.weight_decay, at_least=0)
    check_range("optim.eps", optim.eps, above=0)
    check_range("optim.max_grad_norm", optim.max_grad_norm, above=0)
    if len(optim.betas) != 2:
        raise ConfigError(
            "AdamW has two betas",
            where="optim.betas",
            got=str(optim.betas),
            expected="[0.9, 0.999]",
            remedy="write 'optim.betas=[0.9,0.999]'",
        )
    for index, beta in enumerate(optim.betas):
        check_range(f"optim.betas[{index}]", beta, at_least=0, below=1)


def _check_trainer(trainer: TrainerConfig, data: DataConfig) -> None:
    for name in ("global_batch_pairs", "micro_batch_tokens", "max_steps", "stop_after_steps"):
        check_range(f"trainer.{name}", getattr(trainer, name), at_least=1)
    for name in ("eval_every", "save_every", "keep_last", "log_every", "seed"):
        check_range(f"trainer.{name}", getattr(trainer, name), at_least=0)
    for name in ("epochs", "max_seconds"):
        check_range(f"trainer.{name}", getattr(trainer, name), above=0)
    for name, value, off in (
        ("eval_every", trainer.eval_every, "0"),
        ("eval_at_start", trainer.eval_at_start, "false"),
    ):
        if value and not data.eval:
            raise ConfigError(
                "there is nothing to evaluate on",
                where=f"trainer.{name}, data.eval",
                got=f"{value}, an empty list".lower(),
                remedy=f"set data.eval=[held_out.jsonl] or trainer.{name}={off}",
            )


def _check_deterministic(config: RunConfig) -> None:
    if config.trainer.deterministic and config.model.liger:
        raise ConfigError(
            "Liger's kernels do not promise the same bits again",
            where="trainer.deterministic, model.liger",
            got="true, true",
            expected="one of them",
            remedy="set model.liger=false or trainer.deterministic=false",
        )


def _check_parallelism(parallelism: ParallelismConfig) -> None:
    check_range("parallelism.timeout_seconds", parallelism.timeout_seconds, at_least=1)
    sharded = {
        "offload_parameters": (ParallelismKind.zero3,),
        "offload_optimizer": (ParallelismKind.zero3, ParallelismKind.zero2),
    }
    for option, kinds in sharded.items():
        if getattr(parallelism, option) is not Offload.none and parallelism.kind not in kinds:
            raise ConfigError(
                f"{parallelism.kind} cannot do parallelism.{option}",
                where=f"parallelism.{option}, parallelism.kind",
                got=f"{getattr(parallelism, option)}, {parallelism.kind}",
                expected=f"parallelism.kind one of {', '.join(kinds)}",
                remedy=f"set parallelism.kind={kinds[0]} or parallelism.{option}=none",
            )
