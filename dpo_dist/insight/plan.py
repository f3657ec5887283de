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
from dpo_dist.config.schema import ZERO_STAGES, Offload, ReferenceMode, RunConfig
from dpo_dist.data.sources import local_files
from dpo_dist.foundation.text import counted, duration, size
from dpo_dist.insight.tables import aligned
from dpo_dist.model.flops import step_flops
from dpo_dist.model.folder import description_folder, start_folder, tokenizer_folder
from dpo_dist.model.load import load_config, load_tokenizer, without_weights
from dpo_dist.training.footprint import Footprint, footprint

Progress = Callable[[str, str], AbstractContextManager[Callable[..., None]]]


class _Gpu(NamedTuple):
    gib: float  # that programs can use
    flops: float  # of dense products in bf16, by the datasheet


_GPUS = {
    "h100-80g": _Gpu(79.1, 989e12),
    "h200-141g": _Gpu(139.8, 989e12),
    "b200-180g": _Gpu(178.3, 2250e12),
    "a100-80g": _Gpu(79.2, 312e12),
    "a100-40g": _Gpu(39.4, 312e12),
    "l40s-48g": _Gpu(44.4, 362e12),
    "rtx4090-24g": _Gpu(23.6, 165e12),
}
# Shares of the datasheet's operations: 35 to 50 % of the 76 % that matrix products alone reach on an H100.
_REACHED = 0.38, 0.27
_GPUS_OF_A_NODE = 8
_NVLINK = 250e9  # bytes a second between the GPUs of a node
_SENT = {3: 5.8, 2: 4.0, 1: 4.0}  # bytes a weight: under ZeRO-3 in each micro-batch, else in each step
_HOOKS = 0.03  # seconds a generated token, of ZeRO-3's hooks
_TOKENS, _PAIRS = 700.0, 60_000  # UltraFeedback's
_PROMPT_SHARE = 0.3
_ALTERNATIVES = [
    f"parallelism={kind} model.gradient_checkpointing={checkpointing}"
    for kind in ("ddp", "zero2", "zero3", "zero3_offload")
    for checkpointing in ("none", "4", "2", "full")
]


class Plan(NamedTuple):
    """The plan of a run: whether it fits, its lines for people, and its content for programs."""

    fits: bool
    lines: list[str]
    content: dict[str, Any]


def make_plan(config: RunConfig, progress: Progress) -> Plan:
    """Return the plan of training `config` on the GPUs of `config.plan`."""
    data = _data(config, progress)
    estimate = _estimate(config, data)
    needs, memory, gpus = estimate.needs, _GPUS[config.plan.gpu].gib * 2**30, config.plan.gpus
    used = needs.used(estimate.micro_batch)
    rows = [*needs.parts.items(), (f"{estimate.micro_batch:,} tokens", used - sum(needs.parts.values()))]
    rows.append((f"of {size(memory)}, of which a tenth stays free", used))
    fast, slow = (estimate.seconds(reached) for reached in _REACHED)
    times = [[name, f"{duration(fast[name])} to {duration(slow[name])}"] for name in fast]
    ends = [sum(fast.values()), sum(slow.values())]
    times.append(["in all, at 38 to 27 % of the datasheet's operations", " to ".join(map(duration, ends))])
    if config.plan.price is not None:
        times.append(["price", " to ".join(f"{end / 3600 * gpus * config.plan.price:,.0f}" for end in ends)])
    lines = [
        f"{config.model.path}: {estimate.weights / 1e9:.3g}e9 weights, {estimate.trained / 1e9:.3g}e9 "
        f"trained, on {counted(gpus, 'GPU')} ({config.plan.gpu}), {config.parallelism.kind}",
        *(f"  {line}" for line in aligned([[name, size(part)] for name, part in rows], numbers=(1,))),
        estimate.verdict(),
        f"host memory of a node: {size(estimate.host)}; disk: {size(12.0 * estimate.trained)} a checkpoint, "
        f"{size(2.0 * estimate.weights)} the model, {size(data.targets * data.pairs * 4)} the log-probs",
        f"an epoch of {counted(data.pairs, 'pair')} of {data.tokens:,.0f} tokens ({data.basis}):",
        *(f"  {line}" for line in aligned(times, numbers=(1,))),
    ]
    if estimate.sending > estimate.computing / _REACHED[0]:
        lines.append(
            "communication-bound: exchanging weights takes longer than computing; raise "
            "trainer.global_batch_pairs, or use fewer GPUs"
        )
    content = {
        "fits": estimate.fits,
        "bytes": needs.parts | {"micro-batch": used - sum(needs.parts.values())},
        "micro_batch_tokens": estimate.largest,
        "epoch_seconds": ends,
    }
    if config.plan.suggest:
        content["suggested"] = suggested = _suggest(config, data)
        lines.append(f"suggested: {suggested}" if suggested else "nothing fits: take more GPUs or an adapter")
    return Plan(estimate.fits, lines, content)


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

    folder = description_folder(config.model.path, config.model.revision, needs_weights=False)
    tokenizer_files = tokenizer_folder(folder, start_folder(config.model))
    tokenizer = load_tokenizer(tokenizer_files, config.model)
    datasets, _ = prepare(
        *(config, tokenizer, tokenizer_files, len(tokenizer)),
        lambda source: progress(f"encoding {source}", "record"),
    )
    used = [of_source[0] for of_source in datasets[: len(sources)] if of_source]
    pairs = max(1, sum(map(len, used)))
    tokens = sum(int(dataset.piece_tokens.sum()) for dataset in used) / pairs
    return _Data(plan.pairs or pairs, plan.tokens_per_pair or tokens, "of data.train")


@dataclass(frozen=True)
class _Estimate:
    """Memory and time of a configuration."""

    config: RunConfig
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
        most = max(self.micro_batch, self.config.data.max_length)
        return self.largest is None or self.largest >= most

    @property
    def host(self) -> float:
        """Bytes of host memory on a node of rank 0, which reads the model and writes checkpoints."""
        here = min(1.0, _GPUS_OF_A_NODE / self.config.plan.gpus)
        is_offloaded = self.config.parallelism.offload_optimizer is not Offload.none
        return 2.0 * self.weights + (16.0 if is_offloaded else 12.0) * self.trained * here

    def seconds(self, reached: float) -> dict[str, float]:
        """Return the seconds of an epoch by phase, at this share of the operations of the datasheet."""
        phases = {"training": max(self.computing / reached, self.sending)}
        mode = self.config.reference.mode
        if mode is not ReferenceMode.none:
            once = ", once for all runs" if mode is ReferenceMode.cached else ""
            phases[f"reference{once}"] = self.scoring / reached
        return phases | ({"samples": self.sampling} if self.sampling else {})

    def verdict(self) -> str:
        """Return in words whether the run fits."""
        if self.largest is None:
            return "what a token of this architecture takes is not known: begin with small micro-batches"
        fits = "fits" if self.fits else "does not fit"
        more = "" if self.fits else "; plan.suggest=true looks for settings that fit"
        return f"{fits}: there is room for micro-batches of {self.largest:,} tokens{more}"


def _estimate(config: RunConfig, data: _Data) -> _Estimate:
    plan, trainer = config.plan, config.trainer
    causal_lm = without_weights(_model_config(config), config.model, start_folder(config.model))
    weights = sum(map(torch.numel, causal_lm.parameters()))
    trained = sum(weight.numel() for weight in causal_lm.parameters() if weight.requires_grad)
    prompt, response = _PROMPT_SHARE * data.tokens, data.targets / 2
    attended = prompt**2 / 2 + 2 * response * (prompt + response / 2)
    work = data.pairs * step_flops(causal_lm).of(round(data.tokens), round(data.targets), round(attended))
    work /= plan.gpus * _GPUS[plan.gpu].flops
    checkpointing = config.model.gradient_checkpointing
    recomputed = (
        {"none": 0.0, "full": 1.0}[checkpointing] if isinstance(checkpointing, str) else 1 / checkpointing
    )
    again = recomputed / (3 if config.model.adapter is None else 2)
    needs = footprint(config, causal_lm, plan.gpus)
    largest = needs.largest_micro_batch(_GPUS[plan.gpu].gib * 2**30)
    tokens = (largest or _TOKENS) if trainer.micro_batch_tokens == "auto" else trainer.micro_batch_tokens
    steps, stage = math.ceil(data.pairs / trainer.global_batch_pairs), ZERO_STAGES[config.parallelism.kind]
    link = _NVLINK if plan.gpus <= _GPUS_OF_A_NODE else plan.network / 8 * 1e9
    sent, times = _SENT[stage] * trained, 1
    if stage == 3:
        micro_batches = trainer.global_batch_pairs * data.tokens / plan.gpus / tokens
        sent, times = _SENT[stage] * weights, math.ceil(micro_batches)
    sampling = 0.0
    if config.samples.prompts and stage == 3:  # which gathers all weights for each token
        evaluations = 1 + (steps // trainer.eval_every if trainer.eval_every else 0)
        sampling = evaluations * config.samples.max_new_tokens * (2 * weights / link + _HOOKS)
    return _Estimate(
        *(config, weights, trained, needs, largest, work * (1 + again), work / 3),
        sending=steps * times * sent / link if plan.gpus > 1 else 0.0,
        sampling=sampling,
    )


def _model_config(config: RunConfig) -> Any:
    """Return the configuration of the model; those of the shipped presets need no network."""
    shapes = yaml.safe_load(files("dpo_dist.insight").joinpath("shapes.yaml").read_text(encoding="utf-8"))
    if (shape := shapes.get(config.model.path)) is not None:
        return AutoConfig.for_model(**shape)
    folder = description_folder(config.model.path, config.model.revision, needs_weights=False)
    return load_config(folder, config.model)


def _suggest(config: RunConfig, data: _Data) -> str | None:
    """Return the overrides of the settings that fit with the shortest epoch; None if none fit."""
    seconds: dict[str, float] = {}
    for words in _ALTERNATIVES:
        changed = load_run_config(
            [*words.split(), "trainer.micro_batch_tokens=auto"], former=yaml.safe_load(to_yaml(config))
        )
        estimate = _estimate(changed, data)
        if estimate.fits and estimate.largest:
            slower = 2.0 if "offload" in words else 1.0  # of copies to the host
            seconds[words] = slower * sum(estimate.seconds(_REACHED[0]).values())
    return min(seconds, key=lambda words: seconds[words], default=None)
