"""Every key of a run: type, default, bounds, meaning. The only place where a key is declared.

The keys of `run`, `model.adapter`, `data`, `optim`, `samples`, `tracking`, `evaluation`, `compare`, `doctor`,
`pairs`, `export` are in `*_schema`, those of `loss` in `loss_kinds`, rules between keys in `rules`. A key
declared `free` does not define the run's result (hardware, placement, how often something is written): it is
not part of the digest that names the run directory.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from dpo_dist.config.adapter_schema import AdapterConfig
from dpo_dist.config.compare_schema import CompareConfig
from dpo_dist.config.console_schema import ConsoleConfig
from dpo_dist.config.data_schema import DataConfig
from dpo_dist.config.doctor_schema import DoctorConfig
from dpo_dist.config.evaluation_schema import EvaluationConfig
from dpo_dist.config.export_schema import ExportConfig
from dpo_dist.config.fields import EVERY_VERB, VERBS_WITH_DATA, key, section
from dpo_dist.config.folder_schema import FolderConfig
from dpo_dist.config.loss_kinds import LossConfig
from dpo_dist.config.optim_schema import OptimConfig
from dpo_dist.config.pairs_schema import PairsConfig
from dpo_dist.config.samples_schema import SamplesConfig
from dpo_dist.config.tracking_schema import TrackingConfig

Dtype = StrEnum("Dtype", ["bf16", "fp16", "fp32"])
AttentionBackend = StrEnum("AttentionBackend", ["auto", "flash_attention_2", "varlen", "sdpa"])
Quantization = StrEnum("Quantization", ["int8", "nf4"])
ReferenceMode = StrEnum("ReferenceMode", ["auto", "cached", "live", "adapter", "none"])
Numerics = StrEnum("Numerics", ["strict", "tolerant"])
Offload = StrEnum("Offload", ["none", "cpu", "nvme"])
ParallelismKind = StrEnum("ParallelismKind", ["zero3", "zero2", "ddp"])
ZERO_STAGES = {ParallelismKind.zero3: 3, ParallelismKind.zero2: 2, ParallelismKind.ddp: 1}
Direction = StrEnum("Direction", ["highest", "lowest"])

NO_MODEL = "-"
"""The value of `model.path` for a verb that can work without a model, if none is given."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str = key(MISSING, "Folder or hub name of the model to train.", filled=True)
    revision: str | None = key(None, "Branch, tag or commit of a hub model.")
    dtype: Dtype = key(
        Dtype.bf16, "`bf16`, `fp16` for GPUs without bf16 (both with float32 master weights), or `fp32`."
    )
    attention: AttentionBackend = key(
        AttentionBackend.auto,
        "Attention kernel; `auto`: the fastest.",
        free=True,
        verbs="train precompute evaluate compare",
    )
    gradient_checkpointing: bool | int | str = key(  # bool: accepted here, refused with a remedy by the rules
        "none",
        "Layers that compute their activations again in backward: `none`, `full`, or n: every n-th.",
        free=True,
        verbs="train",
        accepts="none, full, or a whole number, >= 2",
    )
    activation_offload: bool = key(
        False,
        "Inputs of checkpointed layers wait for backward in host memory (CUDA).",
        free=True,
        verbs="train",
    )
    mlp_tile_tokens: int | None = key(
        None,
        "Tokens of a tile of an MLP; its wide activations exist for one tile at a time. null: no tiles.",
        at_least=1,
        free=True,
        verbs="train precompute evaluate",
    )
    compile: bool = key(
        False, "torch.compile in decoder layers.", free=True, verbs="train precompute evaluate"
    )
    liger: bool = key(
        False,
        "Liger's kernels in decoder layers (CUDA, the `liger` extra).",
        free=True,
        verbs="train precompute evaluate",
    )
    adapter: Any = key(
        None,
        "Train an adapter in place of all weights: `{r: 64, alpha: 128}`.",
        of=AdapterConfig,
        verbs=VERBS_WITH_DATA,  # compare and pairs with quantized weights too
    )
    quantization: Quantization | None = key(
        None,
        "Weights of the adapter's base in 8 or 4 bits (bitsandbytes, the `quantization` extra).",
        verbs="train precompute evaluate compare pairs",
    )
    trust_remote_code: bool = key(False, "Run Python code from the model's repository.")


@dataclass(frozen=True)
class ReferenceConfig:
    """The source of the reference model's log-probs."""

    mode: ReferenceMode = key(
        ReferenceMode.auto,
        "`cached` (stored), `live` (computed beside the policy), `adapter` (the policy with its adapter "
        "off), `none`; `auto`: `none`, `adapter` or `cached`, by loss and model.",
    )
    path: str | None = key(
        None,
        "Folder or hub name of the reference model; null: `model.path`.",
        filled=True,
        verbs="train precompute evaluate doctor",
    )
    revision: str | None = key(
        None, "Branch, tag or commit of `reference.path`.", verbs="train precompute evaluate doctor"
    )
    quantization: Quantization | None = key(
        None,
        "Weights in 8 or 4 bits (bitsandbytes), whole on every device; null: as stored.",
        verbs="train precompute evaluate doctor",
    )
    offload: Offload = key(
        Offload.none, "Memory of its weights: `none` (the device), `cpu` or `nvme`.", free=True
    )
    numerics: Numerics = key(
        Numerics.strict, "`tolerant` reuses log-probs of other kernels or versions and measures their drift."
    )
    nvme_path: str | None = key(None, "Folder on a local disk for `offload=nvme`.", free=True, filled=True)
    store: str = key(
        "${run.root}/reference",
        "Folder of stored log-probs, shared by runs.",
        free=True,
        filled=True,
        verbs=VERBS_WITH_DATA,
    )
    micro_batch_tokens: int | None = key(
        None,
        "Tokens of a micro-batch while the store is filled; null: 4 times `trainer.micro_batch_tokens`.",
        at_least=1,
        free=True,
    )
    rows_per_shard: int = key(4096, "Entries of one file of the store.", at_least=1, free=True)
    audit_pairs: int = key(
        16, "Pairs whose reference log-probs are computed again as a check.", at_least=0, free=True
    )


@dataclass(frozen=True)
class ParallelismConfig:
    """Distribution of weights, gradients and optimizer states over processes."""

    kind: ParallelismKind = key(
        ParallelismKind.zero3,
        "ZeRO stage 3 or 2, or `ddp`: weights whole on every process, ZeRO stage 1.",
        verbs="train precompute evaluate compare pairs",
    )
    offload_parameters: Offload = key(Offload.none, "Memory of the policy's weights: `none` or `cpu`.")
    offload_optimizer: Offload = key(
        Offload.none, "Memory of optimizer states: `none` or `cpu`.", verbs="train"
    )
    sequence_parallel: int = key(
        1,
        "Processes that share the tokens of each micro-batch, for long sequences (DeepSpeed Ulysses).",
        at_least=1,
        added=True,
    )
    timeout_seconds: int = key(
        600,
        "Most seconds to wait for another process.",
        at_least=1,
        at_most=10**7,
        verbs="train precompute evaluate compare pairs",
    )


@dataclass(frozen=True)
class TrainerConfig:
    """The training loop. Gradient accumulation is derived, never configured."""

    global_batch_pairs: int = key(64, "Pairs of an optimizer step, over all processes.", at_least=1)
    micro_batch_tokens: int = key(
        8192,
        "Most tokens of a micro-batch; gradient accumulation follows from it.",
        at_least=1,
        free=True,
        verbs="train precompute evaluate",
    )
    epochs: float = key(1.0, "Passes over the training data.", above=0)
    max_steps: int | None = key(None, "Length of the run in steps; null: by `epochs`.", at_least=1)
    eval_every: int = key(
        0, "Steps between evaluations; 0: at the end only.", at_least=0, free=True, verbs="train"
    )
    eval_at_start: bool | None = key(
        None,
        "Evaluate before the first step; null: where there are evaluation data, and without a forward of the "
        "policy where it starts as the reference.",
        free=True,
        verbs="train",
    )
    save_every: int = key(
        100, "Steps between checkpoints; 0: at the end only.", at_least=0, free=True, verbs="train"
    )
    keep_last: int = key(
        2,
        "Checkpoints to keep; 0: one while the run trains, none once it is complete.",
        at_least=0,
        free=True,
        verbs="train",
    )
    keep_best: str | None = key(
        None,
        "Evaluation metric, such as `eval_rewards/accuracies`: a checkpoint is also saved at each new best "
        "value, and the best are kept beside `keep_last`; null: none.",
        filled=True,
        free=True,
        verbs="train",
    )
    keep_best_count: int = key(1, "Best checkpoints to keep.", at_least=1, free=True, verbs="train")
    keep_best_direction: Direction | None = key(
        None, "Values of `keep_best` that are the best; null: as known of it.", free=True, verbs="train"
    )
    save_behind: bool = key(
        True,
        "Copy a checkpoint to host memory, if it has room, and write it while training continues.",
        free=True,
        verbs="train",
    )
    check_disk_room: bool = key(
        True,
        "Before the first step, look for room for checkpoints and model on the file system of `run.dir`.",
        free=True,
        verbs="train",
    )
    log_every: int = key(
        1,
        "Steps per metrics row, which is a mean over their pairs; 0: one row at the end.",
        at_least=0,
        free=True,
        verbs="train",
    )
    seed: int = key(
        0, "Seed of data order and of an adapter's start.", at_least=0, verbs="train precompute evaluate"
    )
    deterministic: bool = key(
        False,
        "Deterministic kernels only, and an error where there is none; slower on GPUs.",
        free=True,
        verbs="train precompute evaluate",
    )
    max_bad_steps: int = key(
        3,
        "Steps in a row that are skipped if loss or gradient is not finite; one more ends the run, code 3.",
        at_least=0,
        added=True,
        verbs="train",
    )
    ema_decay: float | None = key(
        None,
        "Share that the moving average of the trained weights keeps of itself in a step; `export` writes "
        "it from a checkpoint with `export.weights=ema`; null: none.",
        above=0,
        below=1,
        added=True,
        verbs="train",
    )
    stop_after_steps: int | None = key(
        None,
        "Steps of this start after which the run saves and exits with code 75.",
        at_least=1,
        free=True,
        verbs="train",
    )
    max_seconds: float | None = key(
        None, "Seconds after which the run saves and exits with code 75.", above=0, free=True, verbs="train"
    )


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved and frozen."""

    run: FolderConfig = section(FolderConfig, free=True, verbs=EVERY_VERB)
    model: ModelConfig = section(ModelConfig, verbs=EVERY_VERB)
    data: DataConfig = section(DataConfig, verbs="train precompute evaluate doctor")
    loss: LossConfig = section(LossConfig, verbs="train evaluate")
    reference: ReferenceConfig = section(ReferenceConfig, verbs="train precompute evaluate")
    optim: OptimConfig = section(OptimConfig, verbs="train")
    trainer: TrainerConfig = section(TrainerConfig, verbs="train precompute")
    samples: SamplesConfig = section(SamplesConfig, free=True, verbs="train")
    parallelism: ParallelismConfig = section(ParallelismConfig, free=True, verbs="train precompute evaluate")
    tracking: TrackingConfig = section(TrackingConfig, free=True, verbs="train")
    evaluation: EvaluationConfig = section(EvaluationConfig, free=True, verbs="evaluate")
    compare: CompareConfig = section(CompareConfig, free=True, verbs="compare")
    console: ConsoleConfig = section(ConsoleConfig, free=True, verbs=EVERY_VERB)
    doctor: DoctorConfig = section(DoctorConfig, free=True, verbs="doctor")
    pairs: PairsConfig = section(PairsConfig, free=True, verbs="pairs")
    export: ExportConfig = section(ExportConfig, free=True, verbs="export")
