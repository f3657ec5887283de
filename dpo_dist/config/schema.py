"""Every key of a run with its type and default; the only place where a key is declared.

Composition and strictness live in `load`, what must fit together in `check`. A field made by `_free` does
not define the run's result (hardware, placement, how often something is written) and stays out of the
digest that names the run folder.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class Resume(StrEnum):
    auto = "auto"
    never = "never"
    must = "must"


class Dtype(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"


class AttentionBackend(StrEnum):
    auto = "auto"
    flash_attention_2 = "flash_attention_2"
    varlen = "varlen"
    sdpa = "sdpa"


class AdapterVariant(StrEnum):
    lora = "lora"
    rslora = "rslora"
    dora = "dora"


class Quantization(StrEnum):
    int8 = "int8"
    nf4 = "nf4"


class DataFormat(StrEnum):
    auto = "auto"
    hh = "hh"
    text = "text"
    messages = "messages"
    ranked = "ranked"
    completion = "completion"


class Ranked(StrEnum):
    whole = "whole"
    best_worst = "best_worst"
    all_pairs = "all_pairs"


class TextTemplate(StrEnum):
    auto = "auto"
    applied = "applied"
    literal = "literal"


class Truncation(StrEnum):
    keep_start = "keep_start"
    keep_end = "keep_end"
    drop = "drop"


class OnBadRecord(StrEnum):
    drop = "drop"
    error = "error"


class LossKind(StrEnum):
    sigmoid = "sigmoid"
    robust = "robust"
    hinge = "hinge"
    ipo = "ipo"
    sigmoid_norm = "sigmoid_norm"
    exo_pair = "exo_pair"
    nca_pair = "nca_pair"
    bco_pair = "bco_pair"
    sppo_hard = "sppo_hard"
    apo_zero = "apo_zero"
    apo_down = "apo_down"
    discopop = "discopop"
    dpop = "dpop"
    odpo = "odpo"
    simpo = "simpo"
    orpo = "orpo"
    cpo = "cpo"
    sft = "sft"
    aot = "aot"
    aot_unpaired = "aot_unpaired"
    beta_dpo = "beta_dpo"
    plackett_luce = "plackett_luce"


REFERENCE_FREE_KINDS = frozenset({LossKind.simpo, LossKind.orpo, LossKind.cpo, LossKind.sft})
"""The kinds of loss in which the reference's log-probs do not occur."""

COUPLED_KINDS = frozenset({LossKind.aot, LossKind.aot_unpaired, LossKind.beta_dpo})
"""The kinds in which the loss of a pair depends on the other pairs of its global batch."""


class Divergence(StrEnum):
    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    js = "js"
    alpha = "alpha"


class BcoDelta(StrEnum):
    zero = "zero"
    running_mean = "running_mean"


class Weighting(StrEnum):
    none = "none"
    wpo = "wpo"


class ReferenceMode(StrEnum):
    auto = "auto"
    cached = "cached"
    live = "live"
    adapter = "adapter"
    none = "none"


class Numerics(StrEnum):
    strict = "strict"
    tolerant = "tolerant"


class Offload(StrEnum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class ParallelismKind(StrEnum):
    zero3 = "zero3"
    zero2 = "zero2"
    ddp = "ddp"


class LearningRateSchedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"
    off = "off"


def _free(default: Any) -> Any:
    """A field that does not define the run's result."""
    return field(default=default, metadata={"defines_result": False})


@dataclass(frozen=True)
class FolderConfig:
    """`run`: where everything of this run goes. `dir` null: `root`/`name`-`digest`."""

    dir: str | None = None
    name: str = "run"
    root: str = "output"
    resume: Resume = Resume.auto


@dataclass(frozen=True)
class AdapterConfig:
    """`model.adapter`: low-rank matrices that are trained in place of the model's own.

    `target_modules` is `all-linear` (all linear layers but the output layer) or a list of names. `rslora`
    scales by alpha / sqrt(r) (arXiv:2312.03732), `dora` also trains the norm of each weight's rows
    (arXiv:2402.09353).
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Any = "all-linear"
    variant: AdapterVariant = AdapterVariant.lora


@dataclass(frozen=True)
class ModelConfig:
    """`model`: the policy.

    `gradient_checkpointing` is `none`, `full` or n: every n-th decoder layer. A bool is accepted by its type
    only to be refused with a remedy. `adapter` is null or an `AdapterConfig`.
    """

    path: str = MISSING
    revision: str | None = None
    dtype: Dtype = Dtype.bf16
    attention: AttentionBackend = _free(AttentionBackend.auto)
    gradient_checkpointing: bool | int | str = _free("none")
    compile: bool = _free(False)
    liger: bool = _free(False)
    adapter: Any = None
    quantization: Quantization | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SourceConfig:
    """One entry of `data.train` or `data.eval`; a bare string there means `path`.

    `name` (the configuration, or subset), `data_dir` and `revision` select data of a dataset on the hub.
    `weight` 2 gives every pair of the source twice an epoch, 0.5 a seeded half of them.
    """

    path: str = MISSING
    format: DataFormat = DataFormat.auto
    split: str | None = None
    name: str | None = None
    data_dir: str | None = None
    revision: str | None = None
    weight: float = 1.0
    limit: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """`data`: pairs, and the limits within which they are encoded. Lengths are in tokens.

    `ranked`: what becomes of more than two responses: one ranking, its best and worst, or every pair of it.
    `template`: what is done with texts that a chat template has already been applied to: an error where most
    are so (`auto`), read as they stand (`applied`), or as the letters that they are (`literal`).
    `template_date`: the day (YYYY-MM-DD) that a chat template with a clock is told.
    `processes` null: as many as there are usable cores, where there are enough records for it.
    """

    train: list[Any] = field(default_factory=list)
    eval: list[Any] = field(default_factory=list)
    max_length: int = 1024
    max_prompt_length: int | None = None
    truncation: Truncation = Truncation.keep_start
    on_bad_record: OnBadRecord = OnBadRecord.drop
    max_bad_share: float = 0.05
    text_as_messages: bool = False
    template: TextTemplate = TextTemplate.auto
    template_date: str = "2024-07-26"
    ranked: Ranked = Ranked.whole
    cache: str = _free("output/encoded")
    processes: int | None = _free(None)


@dataclass(frozen=True)
class LossTermConfig:
    """One summand of `loss.terms`."""

    kind: LossKind = MISSING
    weight: float = 1.0


@dataclass(frozen=True)
class SyncReferenceConfig:
    """`loss.sync_reference`: after every `every` steps the reference becomes (1 - `mixup`) times itself plus
    `mixup` times the policy (TR-DPO, arXiv:2404.09656). `every` null: never.
    """

    every: int | None = None
    mixup: float = 0.6


@dataclass(frozen=True)
class LossConfig:
    """`loss`: what is optimised. An option that the chosen kinds do not use is an error.

    `label_smoothing` null: the kind's own, 0 or for `exo_pair` 1e-3.
    """

    kind: LossKind = LossKind.sigmoid
    beta: float = 0.1
    label_smoothing: float | None = None
    divergence: Divergence = Divergence.reverse_kl
    alpha_coefficient: float = 0.5
    length_average: bool = True
    bco_delta: BcoDelta = BcoDelta.zero
    discopop_tau: float = 0.05
    dpop_lambda: float = 50.0
    offset_alpha: float = 1.0
    simpo_gamma: float = 0.5
    orpo_lambda: float = 0.1
    cpo_nll_weight: float = 1.0
    beta_alpha: float = 0.6
    beta_momentum: float = 0.9
    ld_alpha: float | None = None
    weighting: Weighting = Weighting.none
    reference_free: bool = False
    terms: list[Any] = field(default_factory=list)
    sync_reference: SyncReferenceConfig = field(default_factory=SyncReferenceConfig)

    @property
    def kinds(self) -> tuple[LossKind, ...]:
        """The kinds of which the loss is made: those of `terms`, or `kind`."""
        return tuple(term.kind for term in self.terms) or (self.kind,)

    @property
    def is_coupled(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its global batch."""
        return not COUPLED_KINDS.isdisjoint(self.kinds)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on a reference's log-probs."""
        return not self.reference_free and not REFERENCE_FREE_KINDS.issuperset(self.kinds)

    @property
    def is_one_sided(self) -> bool:
        """Whether only the chosen responses matter."""
        return set(self.kinds) == {LossKind.sft}


@dataclass(frozen=True)
class ReferenceConfig:
    """`reference`: where the frozen model's log-probs come from.

    `mode` auto: `none` for a loss that needs no reference, `adapter` for an adapter whose base is the
    reference, else `cached`. `micro_batch_tokens` null: four times the trainer's, as scoring keeps no
    activations.
    """

    mode: ReferenceMode = ReferenceMode.auto
    path: str | None = None
    revision: str | None = None
    quantization: Quantization | None = None
    offload: Offload = _free(Offload.none)
    numerics: Numerics = Numerics.strict
    nvme_path: str | None = _free(None)
    store: str = _free("output/reference")
    micro_batch_tokens: int | None = _free(None)
    rows_per_shard: int = _free(4096)
    audit_pairs: int = _free(16)


@dataclass(frozen=True)
class ParallelismConfig:
    """`parallelism`: how weights, gradients and optimizer states are spread over processes."""

    kind: ParallelismKind = ParallelismKind.zero3
    offload_parameters: Offload = Offload.none
    offload_optimizer: Offload = Offload.none
    timeout_seconds: int = 600


@dataclass(frozen=True)
class OptimConfig:
    """`optim`: AdamW and its learning-rate schedule, a pure function of the step."""

    lr: float = 1e-6
    schedule: LearningRateSchedule = LearningRateSchedule.cosine
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class TrainerConfig:
    """`trainer`: the loop. Gradient accumulation is derived, never configured.

    `eval_every`, `save_every` and `log_every` count optimizer steps; 0 means at the end only. `eval_at_start`
    evaluates before the first step too. `keep_last` 0 keeps one checkpoint while the run trains and none once
    it is complete. `deterministic`: only kernels that give the same bits again, or an error; slower on GPUs.
    """

    global_batch_pairs: int = 64
    micro_batch_tokens: int = _free(8192)
    epochs: float = 1.0
    max_steps: int | None = None
    eval_every: int = _free(0)
    eval_at_start: bool = _free(False)
    save_every: int = _free(0)
    keep_last: int = _free(2)
    log_every: int = _free(1)
    seed: int = 0
    deterministic: bool = _free(False)
    stop_after_steps: int | None = _free(None)
    max_seconds: float | None = _free(None)


@dataclass(frozen=True)
class TrackingConfig:
    """`tracking`: Weights & Biases. `auto`: online where a key is present, else offline."""

    wandb: WandbMode = WandbMode.auto
    project: str = "dpo_dist"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved and frozen."""

    run: FolderConfig = field(default_factory=FolderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
