"""Every key of a run: type, default, bounds, meaning. A key is declared once, and nowhere else.

Keys of `loss` are in `losses`, those of data in `data/config.py`, those of a tool in its `extension`, rules
between keys in `rules`. A key declared `free` does not define the run's result (hardware, placement, how
often something is written): it is not part of the digest that names the run directory.
"""

from copy import copy
from dataclasses import replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, TypeAdapter

from dpo_dist.config.extensions import extensions
from dpo_dist.config.identity import RunIdentity
from dpo_dist.config.losses import LossConfig
from dpo_dist.config.verbs import EVERY_VERB
from dpo_dist.data import DataConfig, ScoredDataConfig, Source
from dpo_dist.foundation.fields import (
    EVERY_READER,
    Names,
    NonEmpty,
    Place,
    key,
    key_facts,
    schema,
    schema_fields,
    section,
)

T = TypeVar("T")
Resume = StrEnum("Resume", ["auto", "never", "must"])


@schema
class FolderConfig:
    """The run directory, and whether to resume the run in it."""

    dir: NonEmpty | None = key(None)
    """Run directory; null: `<run.root>/<run.name>-<digest>`."""
    name: str = key("run", accepts="the name of one folder below run.root", pattern=r"^[^/]*[^/.][^/]*$")
    """Name of the run, for its directory and for reports."""
    root: NonEmpty = key("output")
    """Folder of run directories, encoded data and the reference store."""
    resume: Resume = key(Resume.auto, verbs="train")
    """`auto`: if there is a checkpoint; `must`: error without one; `never`: error with results."""
    after_checkpoint: NonEmpty | None = key(None, verbs="train", runs="this shell command is run")
    """Shell command that rank 0 runs behind the training after each checkpoint."""

    @property
    def path(self) -> Path:
        """The run directory: loading a configuration sets `dir`."""
        return Path(str(self.dir))


ConsoleStyle = StrEnum("ConsoleStyle", ["auto", "plain", "json"])


@schema
class ConsoleConfig:
    """Messages and progress on the screen."""

    style: ConsoleStyle = key(ConsoleStyle.auto)
    """`plain`: lines with date and time; `json`: an object a line, on standard output; `auto`: a live line on
    a terminal, else `plain`."""


TrackerName = StrEnum("TrackerName", "wandb tensorboard mlflow trackio swanlab")
DEFAULT_PROJECT = "dpo_dist"
"""Project of runs without `tracking.project`."""


@schema
class TrackingConfig:
    """Trackers, which get the metrics of the run."""

    to: list[TrackerName] = key([TrackerName.wandb])
    """Any of `wandb` (online with an API key, else offline), `tensorboard`, `mlflow`, `trackio`,
    `swanlab`."""
    project: str | None = key(None)
    """Project of the run; null: `dpo_dist`, for W&B WANDB_PROJECT. MLFLOW_EXPERIMENT_NAME wins over
    it."""


AdapterVariant = StrEnum("AdapterVariant", ["lora", "rslora", "dora"])


@schema
class AdapterConfig:
    """Low-rank matrices, trained in place of the model's own weights.

    After loading, a key is null only if `path` is set: it then has the value of the continued adapter.
    """

    r: int | None = key(None, null_means=16, ge=1)
    """Rank; null: 16."""
    alpha: float | None = key(None, null_means=32.0, gt=0)
    """Scale of the update: alpha / r, for `rslora` alpha / sqrt(r); null: 32."""
    target_modules: Literal["all-linear"] | Names | None = key(
        None, accepts="all-linear, a list in brackets: [q_proj,v_proj], or null", null_means="all-linear"
    )
    """`all-linear` (all but the output layer), or a list of names, also with `all-linear` in it; null:
    `all-linear`."""
    variant: AdapterVariant | None = key(None, null_means=AdapterVariant.lora)
    """`lora`, `rslora` (arXiv 2312.03732) or `dora` (arXiv 2402.09353); null: `lora`."""
    path: Place | None = key(None)
    """Folder or hub name of a LoRA adapter to continue, which sets the other keys; policy and reference start
    from it."""
    modules_to_save: list[NonEmpty] | None = key(None, null_means=[])
    """Modules trained in full, by the last parts of their names: `[embed_tokens,lm_head]`; tied ones
    together. Null: none."""

    def __post_init__(self) -> None:
        # The usual values are no defaults: with `path`, null is the value of the continued adapter.
        if self.path is not None:
            return
        for name, field in schema_fields(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, copy(key_facts(field).null_means))


TrainedImageParts = StrEnum("TrainedImageParts", ["none", "projector", "tower"])


@schema
class ImagesConfig:
    """Images in prompts: the model's tower encodes them, and its projector maps them to the text model."""

    train: TrainedImageParts = key(TrainedImageParts.none)
    """Parts trained beside the text model: `none`, `projector`, or `tower` (with the projector)."""
    max_pixels: int | None = key(None, ge=1)
    """Larger images are made smaller, to at most this; null: as the model's processor does."""


Dtype = StrEnum("Dtype", ["bf16", "fp16", "fp32"])
FusedLayers = StrEnum("FusedLayers", ["auto", "none", "liger", "compile"])
AttentionBackend = StrEnum(
    "AttentionBackend", ["auto", "flash_attention_2", "flash_attention_3", "varlen", "sdpa"]
)
FLASH_ATTN = {
    AttentionBackend.flash_attention_2: "flash-attn",
    AttentionBackend.flash_attention_3: "flash-attn-3",
}
"""The package of each FlashAttention kernel."""
Quantization = StrEnum("Quantization", ["int8", "nf4"])
ReferenceMode = StrEnum("ReferenceMode", ["auto", "cached", "live", "adapter", "none"])
TeacherMode = StrEnum("TeacherMode", ["cached", "live", "policy", "adapter"])
Offload = StrEnum("Offload", ["none", "cpu"])
ParallelismKind = StrEnum("ParallelismKind", ["zero3", "zero2", "ddp"])
ZERO_STAGES = {ParallelismKind.zero3: 3, ParallelismKind.zero2: 2, ParallelismKind.ddp: 1}
Direction = StrEnum("Direction", ["highest", "lowest"])

Every = Annotated[int, Field(ge=2)]
"""Every n-th of something."""
UNSET = "-"
"""The default of a key that must be set; a verb that can work without a model gets it as `model.path`. It is
a text, so that code that needs the path does not have to ask whether it is null."""


@schema
class ModelConfig:
    """The policy."""

    gives_scores: ClassVar[bool] = False
    """Whether the model is a reward model, which scores a text as a whole."""

    path: Place = key(UNSET)
    """Folder or hub name of the model to train."""
    revision: str | None = key(None)
    """Branch, tag or commit of a hub model."""
    dtype: Dtype = key(Dtype.bf16)
    """`bf16`, `fp16` for GPUs without bf16 (both with float32 master weights), or `fp32`."""
    attention: AttentionBackend = key(AttentionBackend.auto, free=True, verbs="train precompute evaluate")
    """Attention kernel; `auto`: the fastest."""
    gradient_checkpointing: Literal["none", "full"] | Every = key(
        "none", free=True, verbs="train", accepts="none, full, or a whole number, >= 2"
    )
    """Layers that recompute their activations in backward: `none`, `full` (all), or n (every n-th)."""
    activation_offload: bool = key(False, free=True, verbs="train")
    """Offload the inputs of checkpointed layers to CPU memory until backward (CUDA)."""
    tiled_mlp: bool = key(False, free=True, verbs="train")
    """Compute the MLPs of scored and checkpointed layers by tiles of 2,048 tokens, in less memory."""
    fused: FusedLayers = key(FusedLayers.auto, free=True, verbs="train precompute evaluate")
    """Fused layers: Liger's kernels (CUDA, the `liger` extra) or torch.compile; `auto`: Liger's or none."""
    adapter: AdapterConfig | None = key(None, verbs=EVERY_READER)
    """Train an adapter in place of all weights: `{r: 64, alpha: 128}`."""
    images: ImagesConfig | None = key(None, verbs=EVERY_READER)
    """Read the images of the data: `{train: none}`; null: only text is read."""
    quantization: Quantization | None = key(None, verbs="train precompute evaluate")
    """Load the adapter's base in 8 or 4 bits (bitsandbytes, the `quantization` extra)."""
    trust_remote_code: bool = key(False, runs="Python code of model folders is run")
    """Run Python code from the model's repository."""


class RewardModelConfig(ModelConfig):
    """The same keys for a reward model."""

    gives_scores = True


@schema
class ReferenceConfig:
    """The source of the reference model's log-probs."""

    mode: ReferenceMode = key(ReferenceMode.auto)
    """`cached` (stored), `live` (computed beside the policy), `adapter` (the policy without it), `none`;
    `auto`: by loss and model."""
    path: Place | None = key(None, verbs="train precompute evaluate")
    """Folder or hub name of the reference model; null: `model.path`."""
    system: NonEmpty | None = key(None, verbs=EVERY_READER)
    """System message that the reference reads in place of the record's; null: the record's."""
    quantization: Quantization | None = key(None, verbs="train precompute evaluate")
    """8 or 4 bits (bitsandbytes), whole on every device; null: as stored."""
    offload: Offload = key(Offload.none, free=True)
    """Where the reference's weights are kept: on the device (`none`) or `cpu`."""
    store: NonEmpty = key("${run.root}/reference", free=True, verbs=EVERY_READER)
    """Folder of stored log-probs, shared by runs."""
    behind: list[Place] = key([], free=True, verbs="train precompute evaluate")
    """Folders or URLs of published stores, whose entries are fetched rather than computed."""


@schema
class TeacherConfig:
    """The model from whose distributions `distill` learns."""

    path: Place | None = key(None)
    """Folder or hub name of the teacher, which has the token ids of `model.path`."""
    system: NonEmpty | None = key(None, verbs=EVERY_READER)
    """System message that the teacher reads in place of the record's; null: the record's."""
    mode: TeacherMode = key(TeacherMode.cached, free=True)
    """`cached`: asked once, and stored in `reference.store`; `live`: computed beside the policy, which is its
    own teacher with `policy` (present weights) and `adapter` (without its adapter)."""
    k: int = key(48, ge=1)
    """Largest probabilities of the teacher that are kept of each token, beside 16 drawn from the others."""
    offload: Offload = key(Offload.none, free=True)
    """Where the teacher's weights are kept: on the device (`none`) or `cpu`."""

    @property
    def is_policy(self) -> bool:
        """Whether the policy is its own teacher."""
        return self.mode in (TeacherMode.policy, TeacherMode.adapter)


@schema
class ParallelismConfig:
    """Distribution of weights, gradients and optimizer states over processes."""

    kind: ParallelismKind = key(ParallelismKind.zero3, verbs="train precompute evaluate")
    """ZeRO stage 3 or 2, or `ddp`: only optimizer states sharded (stage 1)."""
    offload_parameters: Offload = key(Offload.none)
    """Where the policy's weights are kept: on the device (`none`) or `cpu`."""
    offload_optimizer: Offload = key(Offload.none, verbs="train")
    """Where the optimizer's states are kept: on the device (`none`) or `cpu`."""
    shard_size: int | None = key(None, ge=1, verbs="train precompute")
    """Processes, usually those of a node, over which ZeRO-3 shards (MiCS, arXiv 2205.00119); only gradients
    leave them. null: all."""
    experts: int = key(1, ge=1, verbs="train precompute")
    """Processes that share the experts of each layer (expert parallelism), with ZeRO-3 or a quantized base;
    1: none."""
    sequence_parallel: int = key(1, ge=1)
    """Processes that share the tokens of each micro-batch, for long sequences (DeepSpeed Ulysses)."""
    timeout_seconds: int = key(600, ge=1, le=10**7, verbs="train precompute evaluate")
    """Seconds that a process waits for another one before the run ends."""


LearningRateSchedule = StrEnum("LearningRateSchedule", ["constant", "linear", "cosine", "inverse_sqrt"])
OptimizerKind = StrEnum("OptimizerKind", ["adamw", "adamw_bf16"])
SumsDtype = StrEnum("SumsDtype", ["auto", "bf16", "fp32"])


@schema
class OptimConfig:
    """AdamW, and the learning-rate schedule, a pure function of the step."""

    kind: OptimizerKind = key(OptimizerKind.adamw)
    """`adamw`; `adamw_bf16`: all in bf16, 8 bytes a weight in place of 18. It rounds up or down by a chance
    that depends on `trainer.seed`, the step and the weight alone, needs `model.dtype=bf16`, and takes no
    offload."""
    sums: SumsDtype = key(SumsDtype.auto)
    """The sum of a step's gradients over micro-batches. `auto`: `bf16` with `adamw_bf16`, `fp32` with all
    other kinds, which take no other. With `adamw_bf16`, `fp32` takes 2 bytes a weight more, and is worth it
    from about 32 micro-batches a step of a process; not with `ddp`."""
    lr: float = key(1e-6, gt=0, le=1)
    """Peak learning rate; 5e-7 to 5e-6 is usual if all weights are trained."""
    schedule: LearningRateSchedule = key(LearningRateSchedule.cosine)
    """Course of the learning rate after warm-up. `inverse_sqrt` falls as sqrt(w / step) after w steps of
    warm-up, without as sqrt(10,000 / (10,000 + step))."""
    warmup: float = key(0.1, ge=0)
    """Steps that warm up the learning rate: below 1 a share of all, else their number."""
    min_lr_ratio: float = key(0.0, ge=0, lt=1)
    """Last learning rate of `linear` and `cosine`, as a share of `lr`."""
    weight_decay: float = key(0.0, ge=0)
    """Decoupled weight decay; biases and norms have none."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = key(
        [0.9, 0.999], accepts="two numbers, >= 0 and < 1: [0.9,0.999]", min_length=2, max_length=2
    )
    """Decay of the moments of AdamW."""
    max_grad_norm: float | None = key(1.0, gt=0)
    """Norm to which a larger gradient is clipped; null: none is."""

    @property
    def dtype_of_sums(self) -> Dtype:
        """Return the dtype in which gradients are added over micro-batches."""
        if self.sums is not SumsDtype.auto:
            return Dtype(self.sums)
        return Dtype.bf16 if self.kind is OptimizerKind.adamw_bf16 else Dtype.fp32


@schema
class TrainerConfig:
    """The training loop. Gradient accumulation is derived, never configured."""

    global_batch_pairs: int = key(64, verbs="train precompute", ge=1)
    """Pairs of an optimizer step, over all processes. If an epoch has fewer pairs than the default, a step
    has a smaller power of two, and the run says so."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = key(
        "auto", free=True, verbs="train precompute evaluate", accepts="auto, or a whole number, >= 1"
    )
    """Largest number of tokens in a micro-batch; gradient accumulation follows. `auto`: what fits on
    the GPUs, on a CPU 2048."""
    epochs: float = key(1.0, verbs="train precompute", gt=0, le=1e9)
    """Passes over the training data."""
    max_steps: int | None = key(None, verbs="train precompute", ge=1)
    """Length of the run in steps; null: by `epochs`."""
    eval_every: int = key(0, ge=0, free=True)
    """Steps between evaluations; 0: before the first step and at the end only."""
    save_every: int = key(100, ge=0, free=True)
    """Steps between checkpoints; 0: at the end only."""
    keep_last: int = key(2, ge=0, free=True)
    """Checkpoints to keep; 0: one while the run trains, none once it is complete."""
    keep_best: NonEmpty | None = key(None)
    """Evaluation metric, such as `eval_rewards/accuracies`, whose best checkpoint is kept and becomes
    `model/`; null: the last one does."""
    patience: int | None = key(None, ge=1, free=True)
    """End the run after this many evaluations without a new best value of `keep_best`; null: at the last
    step."""
    log_every: int = key(1, ge=0, free=True)
    """Steps per row of metrics, which are means over them; 0: one row at the end."""
    seed: int = key(0, ge=0, verbs="train precompute evaluate")
    """Seed of the data order, a new adapter's weights, and sampling in `pairs`."""
    deterministic: bool = key(False, free=True, verbs="train precompute evaluate")
    """Use deterministic kernels only; an operation without one is an error. Slower on GPUs."""
    ema_decay: float | None = key(None, gt=0, lt=1)
    """Decay of the moving average (EMA) of the trained weights, for `export.weights=ema`; null: none. After n
    steps the start has the share `ema_decay`^n in it: with 0.999 61 % after 500 steps."""
    prefix_tree: bool = key(True, free=True, verbs="train precompute evaluate")
    """Compute tokens with which several responses of a micro-batch begin once (docs/scaling.md); false: share
    prompts only."""
    stop_after_steps: int | None = key(None, ge=1, free=True)
    """Save and exit with code 75 after this many steps of this start."""
    max_seconds: float | None = key(None, gt=0, le=1e9, free=True)
    """Save and exit with code 75 after this many seconds."""


METRICS_FUNCTION = "metrics.function"


@schema
class MetricsConfig:
    """Your own metrics, beside those of docs/watching.md."""

    function: NonEmpty | None = key(None, runs="Python code of metrics is run")
    """Your own function, `module:function`, of log-probs; the means of its values are the metrics
    `custom/NAME`."""


ExportedWeights = StrEnum("ExportedWeights", ["last", "ema"])


@schema
class ExportConfig:
    """The model folder that `dpo-dist export` writes from checkpoints of `run.dir`."""

    checkpoint: str | None = key(
        None,
        accepts="latest, best, or the name of a folder in checkpoints/, such as step-000100",
        pattern=r"^(latest|best|step-\d{1,18})$",
    )
    """`latest`, `best` (by `trainer.keep_best`), or a name: `step-000100`; null: that of `model/`."""
    weights: ExportedWeights = key(ExportedWeights.last)
    """`last`: the weights of the checkpoint's step; `ema`: their moving average (`trainer.ema_decay`)."""
    merge: bool = key(False)
    """Merge an adapter into its base, and write one model."""
    output: NonEmpty | None = key(None)
    """Folder to write, which must not exist; null: in `<run.dir>/exported`."""


@schema
class EvaluationConfig:
    """The models and pairs that `dpo-dist evaluate` scores."""

    model: NonEmpty | Names | None = key(None, accepts="a path, or a list of paths")
    """A model, an adapter on `model.path`, a checkpoint (`<run.dir>/checkpoints/step-000100`), or a list;
    null: `<run.dir>/model`."""
    data: list[Source] = key([])
    """Pairs in place of `data.eval`, in the same form."""

    @property
    def models(self) -> list[str | None]:
        """The models to evaluate, one after the other."""
        return list(self.model) if isinstance(self.model, list) else [self.model]


def _with_extensions(cls: type[T]) -> type[T]:
    """Add the sections of tools to the keys of a run."""
    for extension in extensions():
        for name, declared in extension.sections.items():
            cls.__annotations__[name] = declared.default_factory
            setattr(cls, name, declared)
    return cls


@schema
@_with_extensions
class RunConfig:
    """One run, resolved and frozen."""

    run: FolderConfig = section(FolderConfig, free=True, verbs=EVERY_VERB)
    model: ModelConfig = section(ModelConfig, verbs=EVERY_VERB)
    data: DataConfig = section(DataConfig, verbs="train precompute evaluate")
    loss: LossConfig = section(LossConfig, verbs="train evaluate")
    reference: ReferenceConfig = section(ReferenceConfig, verbs="train precompute evaluate")
    teacher: TeacherConfig = section(TeacherConfig, verbs="train precompute evaluate")
    optim: OptimConfig = section(OptimConfig, verbs="train")
    trainer: TrainerConfig = section(TrainerConfig, verbs="train")
    metrics: MetricsConfig = section(MetricsConfig, free=True, verbs="train evaluate")
    parallelism: ParallelismConfig = section(ParallelismConfig, free=True, verbs="train precompute evaluate")
    tracking: TrackingConfig = section(TrackingConfig, free=True, verbs="train")
    console: ConsoleConfig = section(ConsoleConfig, free=True, verbs=EVERY_VERB)
    export: ExportConfig = section(ExportConfig, free=True, verbs="export")
    evaluation: EvaluationConfig = section(EvaluationConfig, free=True, verbs="evaluate")

    def section_of(self, kind: type[T]) -> T:
        """Return the section of this class of keys: a tool's own."""
        return next(value for value in vars(self).values() if isinstance(value, kind))

    def with_sections(self, *changed: Any) -> Self:
        """Return the run with these sections of tools in place of its own."""
        names = {type(value): name for name, value in vars(self).items()}
        return replace(self, **{names[type(section)]: section for section in changed})

    def with_scores(self) -> Self:
        """Return the run with a reward model as its model, and data that are encoded for it."""
        model = RewardModelConfig(**vars(self.model))
        return replace(self, model=model, data=ScoredDataConfig(**vars(self.data)))

    @property
    def scorers(self) -> set[str]:
        """The scorers that the loss has: reference, teacher."""
        has_reference = self.loss.needs_reference and self.reference.mode is not ReferenceMode.none
        needed = {"reference": has_reference, "teacher": self.loss.needs_teacher}
        return {scorer for scorer, is_needed in needed.items() if is_needed}

    @property
    def live_scorers(self) -> set[str]:
        """Those that compute each micro-batch, beside the policy or by it."""
        is_stored = {
            "reference": self.reference.mode is ReferenceMode.cached,
            "teacher": self.teacher.mode is TeacherMode.cached,
        }
        return {scorer for scorer in self.scorers if not is_stored[scorer]}

    @property
    def systems(self) -> dict[str, str]:
        """System messages that scorers get in place of the records' own."""
        own = {"reference": self.reference.system, "teacher": self.teacher.system}
        return {scorer: text for scorer, text in own.items() if text is not None and scorer in self.scorers}

    @cached_property
    def identity(self) -> RunIdentity:
        """What defines the run's result."""
        return RunIdentity(self)


SCHEMA = TypeAdapter(RunConfig)
