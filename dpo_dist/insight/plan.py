"""Memory and hours of a run on GPUs that are not there, and the settings that fit with the least work."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import torch
import yaml
from transformers import AutoConfig

from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.config.schema import (
    ZERO_STAGES,
    Offload,
    ParallelismKind,
    PlanConfig,
    ReferenceMode,
    RunConfig,
)
from dpo_dist.data.sources import local_files
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import counted, duration, size
from dpo_dist.insight.tables import aligned
from dpo_dist.model.flops import REACHED_SHARES, matmul_peak, recomputed_share, step_flops
from dpo_dist.model.folder import description_folder, start_folder
from dpo_dist.model.load import load_config, without_weights
from dpo_dist.training.footprint import Footprint, footprint, state_bytes

Progress = Callable[[str, str], AbstractContextManager[Callable[..., None]]]


_GPUS = {  # GiB that programs can use, and operations a second of dense products in bf16 by the datasheet
    "h100-80g": (79.1, 989e12),
    "h200-141g": (139.8, 989e12),
    "b200-180g": (178.3, 2250e12),
    "a100-80g": (79.2, 312e12),
    "a100-40g": (39.4, 312e12),
    "l40s-48g": (44.4, 362e12),
    "rtx4090-24g": (23.6, 165e12),
}
_PRODUCTS_ALONE = 0.76  # the share of the datasheet's operations that matrix products reach on an H100
_REACHED = tuple(share * _PRODUCTS_ALONE for share in REACHED_SHARES)
_GPUS_OF_A_NODE = 8
_NVLINK = 250e9  # bytes a second between the GPUs of a node
_BY_NODE = f"set parallelism.hpz={_GPUS_OF_A_NODE} with zero3, "
_HOOKS = 0.03  # seconds a generated token, of ZeRO-3's hooks
_TOKENS, _PAIRS = 700.0, 60_000  # UltraFeedback's
_PROMPT_SHARE = 0.3
_ALTERNATIVES = [
    f"parallelism={kind} model.gradient_checkpointing={checkpointing}"
    for kind in ("ddp", "zero2", "zero3", "zero3_offload")
    for checkpointing in ("none", "4", "2", "full")
]
_QUANTIZED = [
    f"model.quantization=nf4 parallelism=ddp model.gradient_checkpointing={checkpointing}"
    for checkpointing in ("none", "full")
]


class Plan(NamedTuple):
    """The plan of a run: whether it fits, its lines for people, and its content for programs."""

    fits: bool
    lines: list[str]
    content: dict[str, Any]


class _Machine(NamedTuple):
    gpus: int
    gpu: str
    memory: float  # bytes of a GPU
    flops: float  # operations a second of a GPU by its datasheet


def _machine(plan: PlanConfig) -> _Machine:
    """Return the GPUs that `plan` names, or else those of this machine, or else H100s."""
    here = torch.cuda.device_count()
    if plan.gpu is None and here:
        peak = matmul_peak(torch.device("cuda"), torch.bfloat16)
        memory = torch.cuda.mem_get_info()[1]
        name = torch.cuda.get_device_name()
        return _Machine(plan.gpus or here, name, memory, peak / _PRODUCTS_ALONE)
    name = plan.gpu or "h100-80g"
    gib, flops = _GPUS[name]
    return _Machine(plan.gpus or 8, name, gib * 2**30, flops)


def make_plan(config: RunConfig, progress: Progress) -> Plan:
    """Return the plan of training `config` on the GPUs of `config.plan`."""
    data, machine = _data(config, progress), _machine(config.plan)
    causal_lm = _without_weights(config)
    estimate = _estimate(config, data, machine, causal_lm)
    needs, memory, gpus = estimate.needs, machine.memory, machine.gpus
    used, checkpoint = needs.used(estimate.micro_batch), state_bytes(config) * estimate.trained
    rows = [*needs.parts.items(), (f"{estimate.micro_batch:,} tokens", used - sum(needs.parts.values()))]
    rows.append((f"in all, of {size(memory)}, of which a tenth stays free", used))
    fast, slow = (estimate.seconds(reached) for reached in _REACHED)
    times = [[name, _span(fast[name], slow[name])] for name in fast]
    ends = [sum(fast.values()), sum(slow.values())]
    times.append(["in all, at 38 to 27 % of the datasheet's operations", _span(*ends)])
    steps, epochs = config.trainer.max_steps, config.trainer.epochs
    length = f"trainer.epochs={epochs:g}" if steps is None else f"trainer.max_steps={steps}"
    if steps is not None:
        epochs = steps * config.trainer.global_batch_pairs / data.pairs
    runs = [sum(estimate.seconds(reached, epochs).values()) for reached in _REACHED]
    times.append([f"this run, {length}", _span(*runs)])
    if config.plan.price is not None:
        times.append(["price", " to ".join(f"{end / 3600 * gpus * config.plan.price:,.0f}" for end in runs)])
    lines = [
        f"{config.model.path}: {estimate.weights / 1e9:.3g}e9 weights, {estimate.trained / 1e9:.3g}e9 "
        f"trained, on {counted(gpus, 'GPU')} ({machine.gpu}), {config.parallelism.kind}",
        *(f"  {line}" for line in aligned([[name, size(part)] for name, part in rows], numbers=(1,))),
        estimate.verdict(),
        f"host memory of a node: {size(estimate.host)}; disk: {size(checkpoint)} a checkpoint, "
        f"{size(2.0 * estimate.weights)} the model, {size(data.targets * data.pairs * 4)} the log-probs",
        f"an epoch of {counted(data.pairs, config.loss.unit)} of {data.tokens:,.0f} tokens ({data.basis}):",
        *(f"  {line}" for line in aligned(times, numbers=(1,))),
    ]
    if estimate.sending > estimate.computing / _REACHED[0]:
        lines.append(
            "communication-bound: exchanging weights takes longer than computing; raise "
            f"trainer.global_batch_pairs, {_BY_NODE if gpus > _GPUS_OF_A_NODE else ''}or use fewer GPUs"
        )
    content = {
        "fits": estimate.fits,
        "bytes": needs.parts | {"micro-batch": used - sum(needs.parts.values())},
        "micro_batch_tokens": estimate.largest,
        "epoch_seconds": ends,
        "run_seconds": runs,
    }
    if config.plan.suggest:
        content["suggested"] = suggested = _suggest(config, data, machine, causal_lm)
        lines.append(f"suggested: {suggested}" if suggested else "nothing fits: take more GPUs or an adapter")
    return Plan(estimate.fits, lines, content)


def plan_in_brief(config: RunConfig, tokens: float) -> tuple[str, str]:
    """Return whether training `config` on pairs of so many `tokens` fits, and how long it takes."""
    plan, machine = config.plan, _machine(config.plan)
    data = _Data(plan.pairs or 10_000, plan.tokens_per_pair or tokens, "")
    causal_lm = _without_weights(config)
    estimate = _estimate(config, data, machine, causal_lm)
    ends = (sum(estimate.seconds(reached).values()) for reached in _REACHED)
    return (
        f"{estimate.verdict()} ({counted(machine.gpus, 'GPU')}, {machine.gpu})",
        f"{_span(*ends)} for {counted(data.pairs, config.loss.unit)} of {data.tokens:,.0f} tokens",
    )


def _span(fast: float, slow: float) -> str:
    ends = (duration(end) if end >= 1 else "under 1 s" for end in (fast, slow))
    return " to ".join(dict.fromkeys(ends))


class _Data(NamedTuple):
    pairs: int  # of an epoch
    tokens: float  # of a pair, with its prompt once
    basis: str  # where both are from

    @property
    def targets(self) -> float:
        """Tokens of the responses of a pair."""
        return (1 - _PROMPT_SHARE) * self.tokens


def _data(config: RunConfig, progress: Progress) -> _Data:
    plan, sources = config.plan, config.data.train
    if None not in (plan.pairs, plan.tokens_per_pair):
        return _Data(plan.pairs or 0, plan.tokens_per_pair or 0.0, "given")
    if not sources or any(local_files(source) is None for source in sources):
        given = plan.pairs or _PAIRS, plan.tokens_per_pair or _TOKENS
        return _Data(*given, "assumed; set plan.pairs and plan.tokens_per_pair")
    from dpo_dist.insight.doctor.examine import prepare  # noqa: PLC0415  (slow)

    of_sources = zip(prepare(config, progress).datasets, sources, strict=False)  # then those of evaluation
    used = [(datasets[0], source.weight) for datasets, source in of_sources if datasets]
    pairs = max(1, round(sum(len(dataset) * weight for dataset, weight in used)))
    tokens = sum(int(dataset.piece_tokens.sum()) * weight for dataset, weight in used) / pairs
    return _Data(plan.pairs or pairs, plan.tokens_per_pair or tokens, "of data.train")


@dataclass(frozen=True)
class _Estimate:
    """Memory and time of a configuration."""

    config: RunConfig
    machine: _Machine
    weights: int
    trained: int
    needs: Footprint
    largest: int | None  # tokens of the largest micro-batch that fits
    computing: float  # seconds of an epoch of training at all operations of the datasheet
    scoring: float  # the same of a forward alone
    sending: float  # seconds in which weights and gradients are exchanged
    sampling: float

    @property
    def micro_batch(self) -> int:
        """Tokens of the micro-batches."""
        tokens = self.config.trainer.micro_batch_tokens
        return (self.largest or 0) if tokens == "auto" else tokens

    @property
    def fits(self) -> bool:
        """Whether the micro-batches fit, and the longest response with its prompt."""
        return self.needs.fits(max(self.micro_batch, self.config.data.max_length), self.machine.memory)

    @property
    def host(self) -> float:
        """Bytes of host memory on a node of rank 0, which reads the model and writes checkpoints."""
        here = min(1.0, _GPUS_OF_A_NODE / self.machine.gpus)
        is_offloaded = self.config.parallelism.offload_optimizer is not Offload.none
        return 2.0 * self.weights + (16.0 if is_offloaded else 12.0) * self.trained * here

    def seconds(self, reached: float, epochs: float = 1.0) -> dict[str, float]:
        """Return the seconds of `epochs` by phase, at this share of the operations of the datasheet."""
        # `ddp` sends its gradients after backward; ZeRO-2 and ZeRO-3 send while they compute.
        together = sum if self.config.parallelism.kind is ParallelismKind.ddp else max
        phases = {"training": epochs * together((self.computing / reached, self.sending))}
        mode = self.config.reference.mode
        if mode is not ReferenceMode.none:
            once = ", once for all runs" if mode is ReferenceMode.cached else ""
            phases[f"reference{once}"] = (min(1.0, epochs) if once else epochs) * self.scoring / reached
        return phases | ({"samples": epochs * self.sampling} if self.sampling else {})

    def verdict(self) -> str:
        """Return in words whether the run fits."""
        room = f"there is room for micro-batches of {self.largest:,} tokens"
        if self.largest is None:
            room = "what a token of this architecture takes is not known: begin with small micro-batches"
        if self.fits:
            return f"fits: {room}"
        hint = "; `dpo-dist plan plan.suggest=true` looks for settings that fit"
        return f"does not fit: {room}{'' if self.config.plan.suggest else hint}"


def _estimate(config: RunConfig, data: _Data, machine: _Machine, causal_lm: Any) -> _Estimate:
    gpus, trainer = machine.gpus, config.trainer
    weights = sum(map(torch.numel, causal_lm.parameters()))
    trained = sum(weight.numel() for weight in causal_lm.parameters() if weight.requires_grad)
    prompt, response = _PROMPT_SHARE * data.tokens, data.targets / 2
    attended = prompt**2 / 2 + 2 * response * (prompt + response / 2)
    work = data.pairs * step_flops(causal_lm).of(round(data.tokens), round(data.targets), round(attended))
    work /= gpus * machine.flops
    again, forward = recomputed_share(config.model), work / (3 if config.model.adapter is None else 2)
    of_partners = forward if config.loss.needs_partners else 0.0
    needs = footprint(config, causal_lm, gpus)
    largest = needs.largest_micro_batch(machine.memory)
    tokens = (largest or _TOKENS) if trainer.micro_batch_tokens == "auto" else trainer.micro_batch_tokens
    steps, stage = math.ceil(data.pairs / trainer.global_batch_pairs), ZERO_STAGES[config.parallelism.kind]
    link = _NVLINK if gpus <= _GPUS_OF_A_NODE else config.plan.network / 8 * 1e9
    is_wide = config.parallelism.reduce_in_float32
    gradients = (4.0 if (gpus > _GPUS_OF_A_NODE if is_wide is None else is_wide) else 2.0) * trained
    sent, times = 2.0 * trained + gradients, 1  # bytes of a step
    if stage == 3:  # of a micro-batch, in which weights are gathered twice; with copies on nodes once a step
        times = math.ceil(trainer.global_batch_pairs * data.tokens / gpus / tokens)
        sent = (2.0 if config.parallelism.hpz == 1 else 1 / times) * 2.0 * weights + gradients
    sampling = 0.0
    if config.samples.prompts and stage == 3:
        evaluations = 1 + (steps // trainer.eval_every if trainer.eval_every else 0)
        generated, has_room = config.samples.max_new_tokens, 4 * weights < machine.memory - needs.used(0)
        gathers = 1 if has_room else generated  # of all weights
        sampling = evaluations * (gathers * 2 * weights / link + generated * _HOOKS)
    return _Estimate(
        config,
        machine,
        weights,
        trained,
        needs,
        largest,
        computing=work * (1 + again) + of_partners,
        scoring=forward + of_partners,
        sending=steps * times * sent / link if gpus > 1 else 0.0,
        sampling=sampling,
    )


def _without_weights(config: RunConfig) -> Any:
    """Return the model without weights; those of the shipped presets need no network."""
    shapes = yaml.safe_load(files("dpo_dist.insight").joinpath("shapes.yaml").read_text(encoding="utf-8"))
    if (shape := shapes.get(config.model.path)) is not None:
        model_config = AutoConfig.for_model(**shape)
    else:
        folder = description_folder(config.model.path, config.model.revision, needs_weights=False)
        model_config = load_config(folder, config.model)
    return without_weights(model_config, config.model, start_folder(config.model))


def _suggest(config: RunConfig, data: _Data, machine: _Machine, causal_lm: Any) -> str | None:
    """Return the overrides of the settings that fit with the shortest epoch; None if none fit."""
    seconds: dict[str, float] = {}
    quantized = [words for words in _QUANTIZED if config.model.adapter is not None]
    for words in (*_ALTERNATIVES, *quantized):
        overrides = [*words.split(), "trainer.micro_batch_tokens=auto"]
        try:
            changed = load_run_config(overrides, former=yaml.safe_load(to_yaml(config)))
        except ConfigError:  # such as ZeRO of a quantized base
            continue
        estimate = _estimate(changed, data, machine, causal_lm)
        if estimate.fits and estimate.largest:
            # By copies to the host, or by computing weights from 4 bits.
            slower = 2.0 if "offload" in words else 1.5 if "nf4" in words else 1.0
            seconds[words] = slower * sum(estimate.seconds(_REACHED[0]).values())
    return min(seconds, key=lambda words: seconds[words], default=None)
