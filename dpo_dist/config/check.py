"""What must hold between the values of a run: every cross-field rule, in one place (law L5)."""

import math
from collections.abc import Iterable

from dpo_dist.config.check_placement import check_placement
from dpo_dist.config.ranges import check_range
from dpo_dist.config.schema import (
    REFERENCE_FREE_KINDS,
    AttentionBackend,
    DataConfig,
    Dtype,
    FolderConfig,
    LossConfig,
    LossKind,
    ModelConfig,
    Offload,
    OptimConfig,
    ParallelismConfig,
    ParallelismKind,
    ReferenceConfig,
    ReferenceMode,
    RunConfig,
    SourceConfig,
    TrainerConfig,
)
from dpo_dist.errors import ConfigError

_KINDS_USING = {
    "label_smoothing": frozenset({LossKind.sigmoid, LossKind.robust}),
    "length_average": frozenset({LossKind.ipo}),
    "simpo_gamma": frozenset({LossKind.simpo}),
    "reference_free": frozenset(LossKind) - REFERENCE_FREE_KINDS,
}


def check(config: RunConfig) -> None:
    """Accept `config` or say what does not fit together.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_folder(config.run)
    _check_model(config.model)
    _check_data(config.data)
    _check_loss(config.loss)
    _check_reference(config.reference, config.loss)
    _check_optim(config.optim)
    _check_trainer(config.trainer, config.data)
    _check_parallelism(config.parallelism)
    check_placement(config)


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
        meant = "full" if value in (True, 1) else "none"
        raise ConfigError(
            "model.gradient_checkpointing is not a choice of layers",
            where="model.gradient_checkpointing",
            got=str(value).lower(),
            expected="none, full, or n of 2 or more: every n-th layer",
            remedy=f"set model.gradient_checkpointing={meant}",
        )


def _check_data(data: DataConfig) -> None:
    if not data.train:
        raise ConfigError(
            "there is nothing to train on",
            where="data.train",
            got="an empty list",
            expected="at least one source",
            remedy="set data.train=[pairs.jsonl], or choose a preset with data=...",
        )
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        for index, source in enumerate(sources):
            _check_source(f"{key}[{index}]", source)
            if key == "data.eval" and source.weight != SourceConfig.weight:
                raise ConfigError(
                    "a weight has no effect on data that is evaluated: every pair counts once",
                    where=f"{key}[{index}].weight",
                    got=f"{source.weight:g}",
                    remedy="leave it out, or set limit",
                )
    check_range("data.max_length", data.max_length, at_least=2)
    check_range("data.max_prompt_length", data.max_prompt_length, at_least=1)
    check_range("data.processes", data.processes, at_least=1)
    check_range("data.max_bad_share", data.max_bad_share, at_least=0, at_most=1)
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_length:
        raise ConfigError(
            "the longest prompt leaves no room for a response",
            where="data.max_prompt_length, data.max_length",
            got=f"{data.max_prompt_length}, {data.max_length}",
            expected="max_prompt_length < max_length",
            remedy="raise data.max_length or lower data.max_prompt_length",
        )


def _check_source(where: str, source: SourceConfig) -> None:
    check_range(f"{where}.weight", source.weight, above=0)
    check_range(f"{where}.limit", source.limit, at_least=1)


def _check_loss(loss: LossConfig) -> None:
    kinds = _kinds(loss)
    _check_terms(loss)
    _check_used(loss, kinds)
    check_range("loss.beta", loss.beta, above=0)
    check_range("loss.simpo_gamma", loss.simpo_gamma, at_least=0)
    limit = 0.5 if LossKind.robust in kinds else 1.0
    check_range("loss.label_smoothing", loss.label_smoothing, at_least=0, below=limit)


def _check_terms(loss: LossConfig) -> None:
    if not loss.terms:
        return
    kinds = _kinds(loss)
    for index, term in enumerate(loss.terms):
        if term.weight == 0 or not math.isfinite(term.weight):
            raise ConfigError(
                "a term without a usable weight",
                where=f"loss.terms[{index}].weight",
                got=str(term.weight),
                expected="a finite number other than 0",
                remedy="leave the term out or give it a weight",
            )
        if term.kind in kinds[:index]:
            raise ConfigError(
                "a kind of loss appears twice",
                where=f"loss.terms[{index}].kind",
                got=term.kind,
                remedy="make it one term with the sum of the weights",
            )
    if loss.kind is not LossConfig.kind and loss.kind not in kinds:
        raise ConfigError(
            "loss.terms is the whole loss, so loss.kind has no effect",
            where="loss.kind, loss.terms",
            got=f"{loss.kind}, {_listed(kinds)}",
            remedy=f"add {{kind: {loss.kind}}} to loss.terms or leave loss.kind out",
        )


def _check_used(loss: LossConfig, kinds: tuple[LossKind, ...]) -> None:
    for option, users in _KINDS_USING.items():
        value = getattr(loss, option)
        if value != getattr(LossConfig, option) and users.isdisjoint(kinds):
            raise ConfigError(
                f"loss.{option} has no effect with this loss",
                where=f"loss.{option}",
                got=f"{value} with {_listed(kinds)}",
                expected=f"a loss that uses it: {_listed(sorted(users))}",
                remedy=f"leave loss.{option} out or choose another loss.kind",
            )


def _check_reference(reference: ReferenceConfig, loss: LossConfig) -> None:
    check_range("reference.micro_batch_tokens", reference.micro_batch_tokens, at_least=1)
    check_range("reference.rows_per_shard", reference.rows_per_shard, at_least=1)
    check_range("reference.audit_pairs", reference.audit_pairs, at_least=0)
    kinds = _kinds(loss)
    needed = not loss.reference_free and not REFERENCE_FREE_KINDS.issuperset(kinds)
    if needed and reference.mode is ReferenceMode.none:
        raise ConfigError(
            "this loss needs a reference model",
            where="reference.mode",
            got=f"none with {_listed(kinds)}",
            expected="cached or live",
            remedy="choose reference=cached, or set loss.reference_free=true to take its log-probs as 0",
        )
    if not needed and reference.mode is not ReferenceMode.none:
        raise ConfigError(
            "the reference would be computed for nothing",
            where="reference.mode",
            got=f"{reference.mode} with {_listed(kinds)}, reference_free={loss.reference_free}".lower(),
            expected="none",
            remedy="choose reference=none",
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
            "AdamW has two betas", where="optim.betas", got=str(optim.betas), expected="[0.9, 0.999]"
        )
    for index, beta in enumerate(optim.betas):
        check_range(f"optim.betas[{index}]", beta, at_least=0, below=1)


def _check_trainer(trainer: TrainerConfig, data: DataConfig) -> None:
    for name in ("global_batch_pairs", "micro_batch_tokens", "max_steps", "keep_last", "stop_after_steps"):
        check_range(f"trainer.{name}", getattr(trainer, name), at_least=1)
    for name in ("eval_every", "save_every", "log_every", "seed"):
        check_range(f"trainer.{name}", getattr(trainer, name), at_least=0)
    for name in ("epochs", "max_seconds"):
        check_range(f"trainer.{name}", getattr(trainer, name), above=0)
    if trainer.eval_every and not data.eval:
        raise ConfigError(
            "there is nothing to evaluate on",
            where="trainer.eval_every, data.eval",
            got=f"{trainer.eval_every}, an empty list",
            remedy="set data.eval=[held_out.jsonl] or trainer.eval_every=0",
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
                expected=f"parallelism.kind one of {_listed(kinds)}",
                remedy=f"set parallelism.kind={kinds[0]} or parallelism.{option}=none",
            )


def _kinds(loss: LossConfig) -> tuple[LossKind, ...]:
    return tuple(term.kind for term in loss.terms) or (loss.kind,)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
