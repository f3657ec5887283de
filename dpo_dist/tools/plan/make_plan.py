"""Estimate what a run takes on GPUs that you do not have; suggest the fastest settings that fit."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from transformers import AutoConfig

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.load import complete_config, load_run_config, to_yaml
from dpo_dist.config.losses import LossConfig
from dpo_dist.config.schema import ModelConfig, RunConfig
from dpo_dist.data import DataConfig, DataFormat, DataSource, SourceConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.remote import is_url
from dpo_dist.foundation.text import duration, percent, pluralize, size
from dpo_dist.model.architectures import recorded_arrangement
from dpo_dist.model.files.folder import description_folder, start_folder
from dpo_dist.model.files.load import load_config, without_weights
from dpo_dist.tools.plan.estimate import (
    MFU_RANGE,
    PROMPT_SHARE,
    Data,
    Estimate,
    choose_machine,
    estimate,
)
from dpo_dist.tools.plan.extension import PlanConfig
from dpo_dist.tools.tables import aligned
from dpo_dist.training.start.footprint import GPUS_PER_NODE, quantization_notes, stored_notes

_Progress = Callable[[str, str], AbstractContextManager[Callable[..., None]]]

_TOKENS = 700.0
_PAIRS = 60_000  # UltraFeedback's
_KINDS = ("ddp", "zero2", "zero3", "zero3_offload")
_Setting = tuple[str, Literal["none", "full"] | int]  # overrides, and gradient checkpointing
_ALTERNATIVES: list[_Setting] = [
    (f"parallelism={kind}", layers) for kind in _KINDS for layers in ("none", 4, 2, "full")
]
_QUANTIZED: list[_Setting] = [
    ("model.quantization=nf4 parallelism=ddp", layers) for layers in ("none", "full")
]


class Plan(NamedTuple):
    """The plan of a run: whether it fits, its lines for people, and its content for programs."""

    fits: bool
    lines: list[str]
    content: dict[str, Any]


def make_plan(config: RunConfig, progress: _Progress) -> Plan:
    """Return the plan for training `config` on the GPUs of `config.plan`; hours only if it fits."""
    machine = choose_machine(config.section_of(PlanConfig), config.model.dtype)
    causal_lm = _without_weights(config.model)
    is_packed = recorded_arrangement(causal_lm.config.get_text_config().model_type) is Arrangement.packed
    shares = config.trainer.prefix_tree and is_packed
    of_gpu = math.ceil(config.trainer.global_batch_pairs / machine.gpus) if shares else None
    data = planned_data(
        config.section_of(PlanConfig), config.data, config.model, config.loss, progress, of_gpu
    )
    costs = estimate(config, data, machine, causal_lm)
    parts = costs.needs.parts
    total = costs.needs.total_bytes(costs.micro_batch)
    activations = total - sum(parts.values())
    rows = [*parts.items(), (f"{costs.micro_batch:,} tokens", activations)]
    rows.append((f"in all, of {size(machine.memory)}, of which a tenth stays free", total))
    table = aligned([[name, size(part)] for name, part in rows if part], numbers=(1,))
    disk = ", ".join(f"{size(part)} {name}" for name, part in costs.disk.items())
    lines = [
        f"{config.model.path}: {costs.weights / 1e9:.3g}e9 weights, {costs.trained / 1e9:.3g}e9 "
        f"trained, on {pluralize(machine.gpus, 'GPU')} ({machine.gpu}), {config.parallelism.kind}",
        *(f"  {line}" for line in table),
        *stored_notes(config.model, causal_lm),
        *quantization_notes(config.model, config.reference, causal_lm),
        _verdict(costs),
        f"host memory of a node: {size(costs.host)}; disk: {disk}",
    ]
    if config.section_of(PlanConfig).gpu is None and not torch.cuda.device_count():
        lines.insert(0, "this machine has no GPU: the plan is for a machine of plan.gpus and plan.gpu")
    content: dict[str, Any] = {
        "fits": costs.fits,
        "bytes": {**parts, "micro-batch": activations},
        "host_bytes": costs.host,
        "disk_bytes": costs.disk,
        "micro_batch_tokens": costs.largest,
        "saved_by_prefixes": data.saved,
    }
    if costs.fits:
        lines += _hours(costs)
        content |= costs.hours()
    if config.section_of(PlanConfig).suggest:
        overrides = _suggest(costs, causal_lm)
        content["suggested"] = overrides
        lines.append(f"suggested: {overrides}" if overrides else "nothing fits: take more GPUs or an adapter")
    return Plan(costs.fits, lines, content)


def plan_in_brief(config: RunConfig, tokens: float) -> list[tuple[str, str]]:
    """Return whether training `config` fits, and how long it takes, for pairs of `tokens` tokens.

    Empty if this machine has no GPU and `config.plan` names none.
    """
    plan = config.section_of(PlanConfig)
    if plan.gpu is None and plan.gpus is None and not torch.cuda.device_count():
        return []
    machine = choose_machine(plan, config.model.dtype)
    data = Data(plan.pairs or 10_000, plan.tokens_per_pair or tokens, "")
    costs = estimate(config, data, machine, _without_weights(config.model))
    lines = [("plan", f"{_verdict(costs)} ({pluralize(machine.gpus, 'GPU')}, {machine.gpu})")]
    if costs.fits:
        pairs = f"{pluralize(data.pairs, config.loss.unit)} of {data.tokens:,.0f} tokens"
        lines.append(("hours", f"{_span(*costs.hours()['epoch_seconds'])} for {pairs}"))
    return lines


def _verdict(costs: Estimate) -> str:
    room = "the memory that a token takes in this architecture is not known: begin with small micro-batches"
    if costs.largest is not None:
        room = f"there is room for micro-batches of {costs.largest:,} tokens"
    if costs.fits:
        return f"fits: {room}"
    if costs.config.section_of(PlanConfig).suggest:
        return f"does not fit: {room}"
    return f"does not fit: {room}; `dpo-dist plan plan.suggest=true` looks for settings that fit"


def _hours(costs: Estimate) -> list[str]:
    """Return the lines about the time of each phase, and about its bottleneck."""
    data = costs.data
    trainer = costs.config.trainer
    hours = costs.hours()
    fast, slow = map(costs.seconds, MFU_RANGE)
    times = [[name, _span(fast[name], slow[name])] for name in fast]
    times.append(["in all, at 38 to 27 % of the datasheet's operations", _span(*hours["epoch_seconds"])])
    length = f"trainer.max_steps={trainer.max_steps}"
    if trainer.max_steps is None:
        length = f"trainer.epochs={trainer.epochs:g}"
    times.append([f"this run, {length}", _span(*hours["run_seconds"])])
    if "price" in hours:
        times.append(["price", " to ".join(f"{end:,.2f}" for end in hours["price"])])
    epoch = f"{pluralize(data.pairs, costs.config.loss.unit)} of {data.tokens:,.0f} tokens"
    if data.image_tokens:
        epoch += f", {data.image_tokens:,.0f} of them of images"
    elif costs.config.model.images is not None:
        epoch += ", without the work of the vision tower, as the images are not known"
    if data.saved >= 0.01:
        epoch += f", {percent(data.saved)} of them saved by shared prefixes"
    lines = [
        f"an epoch of {epoch} ({data.basis}):",
        *(f"  {line}" for line in aligned(times, numbers=(1,))),
    ]
    if costs.sending > costs.computing / MFU_RANGE[0]:
        has_gain = costs.machine.gpus > GPUS_PER_NODE and costs.config.parallelism.hpz == 1
        by_node = f"set parallelism.hpz={GPUS_PER_NODE} with zero3, " if has_gain else ""
        lines.append(
            "communication-bound: exchanging weights takes longer than computing; raise "
            f"trainer.global_batch_pairs, {by_node}or use fewer GPUs"
        )
    return lines


def _span(fast: float, slow: float) -> str:
    ends = (duration(end) if end >= 1 else "under 1 s" for end in (fast, slow))
    return " to ".join(dict.fromkeys(ends))


def planned_data(
    plan: PlanConfig,
    data: DataConfig,
    model: ModelConfig,
    loss: LossConfig,
    progress: _Progress,
    sharing: int | None = None,
) -> Data:
    """Return an epoch's pairs and tokens: from the keys, from local data, or from the cards of hub data.

    `sharing`: pairs of a step on a GPU, which share prefixes; None: they share none.
    """
    sources = data.train
    if None not in (plan.pairs, plan.tokens_per_pair):
        return Data(plan.pairs or 0, plan.tokens_per_pair or 0.0, "given")
    if not sources or any(map(_is_on_hub, sources)):
        sizes = list(filter(None, map(_by_its_card, sources)))
        basis = "by the cards of the data"
        if not sizes or len(sizes) < len(sources):
            sizes = [(_PAIRS, _TOKENS)]
            basis = "assumed"
        all_pairs = sum(pairs for pairs, _ in sizes)
        tokens = sum(pairs * each for pairs, each in sizes)
        pairs = plan.pairs or round(all_pairs * (1 - data.eval_share))
        basis += "; set plan.pairs and plan.tokens_per_pair"
        return Data(pairs, plan.tokens_per_pair or tokens / all_pairs, basis)
    from dpo_dist.tools.doctor.examine import prepare, saved_by_tree  # noqa: PLC0415  (slow)

    datasets_of_sources = prepare(data, model, loss, progress).datasets
    with_weights = []
    for datasets, source in zip(datasets_of_sources, sources, strict=False):  # evaluation data come after
        if datasets:
            with_weights.append((datasets[0], source.weight))
    pairs = max(1, round(sum(len(dataset) * weight for dataset, weight in with_weights)))
    tokens_of_each = []
    image_tokens = 0.0
    for dataset, weight in with_weights:
        tokens_of_each.append(int(dataset.piece_tokens.sum()) * weight / pairs)
        if dataset.images:
            image_tokens += int(dataset.images.prompt_tokens.sum()) * weight
    tokens = sum(tokens_of_each)
    saved = 0.0
    if sharing is not None and plan.tokens_per_pair is None:
        for (dataset, weight), part in zip(with_weights, tokens_of_each, strict=True):
            together = max(1, round(sharing * len(dataset) * weight / pairs))
            saved += saved_by_tree(dataset, together) * part / tokens
    tokens_per_pair = plan.tokens_per_pair or tokens
    return Data(plan.pairs or pairs, tokens_per_pair, "of data.train", image_tokens / pairs, saved)


def _is_on_hub(source: SourceConfig) -> bool:
    return DataSource(source).files() is None and not is_url(source.path)


def _by_its_card(source: SourceConfig) -> tuple[float, float] | None:
    """Return how many pairs an epoch takes from a hub dataset, and their mean tokens; None if not known."""
    name = "/".join(filter(None, (source.path, source.name, source.split or "train")))
    pairs, tokens = own_table(Path(__file__).with_name("data_sizes.yaml")).get(name, (0, 0.0))
    if source.format is DataFormat.completion:  # a prompt with one response
        tokens *= (1 + PROMPT_SHARE) / 2
    if not pairs:
        return None
    return min(pairs, source.limit or pairs) * source.weight, tokens


def _without_weights(model: ModelConfig) -> Any:
    """Return the model without weights; models of shipped presets need no network."""
    shape = own_table(Path(__file__).with_name("shapes.yaml")).get(model.path)
    if shape is not None:
        model_config = AutoConfig.for_model(**shape)
    else:
        folder = description_folder(model.path, model.revision, needs_weights=False)
        model_config = load_config(folder, model)
    return without_weights(model_config, model, start_folder(model))


def _suggest(costs: Estimate, causal_lm: Any) -> str | None:
    """Return the overrides that fit with the shortest epoch; None if nothing fits."""
    seconds: dict[str, float] = {}
    former = yaml.safe_load(to_yaml(costs.config))
    former["parallelism"] |= {"offload_optimizer": "none", "offload_parameters": "none"}  # presets keep them
    quantized = [] if costs.config.model.adapter is None else _QUANTIZED
    key = "model.gradient_checkpointing"

    @cache  # composing takes longer than the estimate
    def composed(words: str) -> RunConfig:
        overrides = [*words.split(), f"{key}=full", "trainer.micro_batch_tokens=auto"]
        return load_run_config(overrides, saved=former)

    for words, layers in (*_ALTERNATIVES, *quantized):
        try:
            base = composed(words)
            model = replace(base.model, gradient_checkpointing=layers)
            config = complete_config(replace(base, model=model))
        except ConfigError:  # settings that cannot be combined, such as ZeRO with a quantized base
            continue
        alternative = estimate(config, costs.data, costs.machine, causal_lm)
        if alternative.fits and alternative.largest:
            seconds[f"{words} {key}={layers}"] = alternative.hours()["epoch_seconds"][0]
    return min(seconds, key=lambda words: seconds[words], default=None)
