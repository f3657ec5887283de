"""Estimate what a run takes on GPUs that you do not have; suggest the fastest settings that fit."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml

from dpo_dist.data import SCORERS, DataConfig, DataSource, SourceConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.remote import is_url
from dpo_dist.foundation.text import aligned, duration, percent, pluralize, size
from dpo_dist.foundation.types import ProgressOf
from dpo_dist.kit import (
    GPUS_PER_NODE,
    LossConfig,
    ModelConfig,
    RunConfig,
    Shapes,
    check_groups,
    check_shapes,
    complete_config,
    load_run_config,
    policy_without_weights,
    teacher_without_weights,
    to_yaml,
)
from dpo_dist.tools.plan.estimate import (
    MFU_RANGE,
    PROMPT_SHARE,
    Data,
    Estimate,
    choose_machine,
    estimate,
)
from dpo_dist.tools.plan.extension import PlanConfig

_TOKENS = 700.0
_PAIRS = 60_000  # UltraFeedback's
_KINDS = ("ddp", "zero2", "zero3", "zero3_offload")
_OF_A_NODE = [f"zero3 parallelism.shard_size={GPUS_PER_NODE}"]
_SHARING = f"zero3 parallelism.experts={GPUS_PER_NODE}"
_OF_EXPERTS = [_SHARING, f"{_SHARING} parallelism.shard_size={GPUS_PER_NODE}"]
_TILES = "model.tiled_mlp=true"
_LONG = ("model.activation_offload=true", f"model.activation_offload=true {_TILES}")
_NO_OFFLOAD = {"offload_optimizer": "none", "offload_parameters": "none"}
_Setting = tuple[str, Literal["none", "full"] | int]  # overrides, and gradient checkpointing
_QUANTIZED: list[_Setting] = [
    ("model.quantization=nf4 parallelism=ddp", layers) for layers in ("none", "full")
]


class Plan(NamedTuple):
    """The plan of a run: whether it fits, its lines for people, and its content for programs."""

    fits: bool
    lines: list[str]
    content: dict[str, Any]


def make_plan(config: RunConfig, progress: ProgressOf, *, suggests: bool = True) -> Plan:
    """Return the plan for training `config` on the GPUs of `config.plan`; hours only if it fits.

    `suggests`: with the settings that have the shortest epoch, whose search takes seconds.
    """
    machine = choose_machine(config.section_of(PlanConfig), config.model.dtype)
    causal_lm = _without_weights(config.model)
    teacher = _teacher_without_weights(config)
    _check(config, causal_lm, machine.gpus)
    shapes = Shapes(config, causal_lm)
    shares = config.trainer.prefix_tree and shapes.is_packed
    of_gpu = math.ceil(config.trainer.global_batch_pairs / machine.gpus) if shares else None
    data = planned_data(
        config.section_of(PlanConfig),
        config.data,
        config.model,
        config.loss,
        progress,
        of_gpu,
        config.systems,
    )
    found = estimate(config, data, machine, causal_lm, teacher)
    parts = found.needs.parts
    used = found.needs.total_bytes(found.tokens)
    activations = found.needs.activations(found.tokens)
    of_pair = ", the longest pair" if found.tokens > found.micro_batch else ""
    rows = [*parts.items(), (f"{found.tokens:,} tokens{of_pair}", activations)]
    rows.append((f"in all, of {size(machine.memory)}, of which a tenth stays free", used))
    is_elsewhere = config.section_of(PlanConfig).gpu is None and not torch.cuda.device_count()
    lines = [
        *(["this machine has no GPU: the plan is for a machine of plan.gpus and plan.gpu"] * is_elsewhere),
        f"{config.model.path}: {shapes.weights / 1e9:.3g}e9 weights, {shapes.trained / 1e9:.3g}e9 "
        f"trained, on {pluralize(machine.gpus, 'GPU')} ({machine.gpu}), {config.parallelism.kind}",
        *(f"  {line}" for line in aligned([[name, size(part)] for name, part in rows if part], numbers=(1,))),
        *shapes.notes(),
        _verdict(found),
        f"host memory of a node: {size(found.host)}; disk: "
        f"{', '.join(f'{size(taken)} {name}' for name, taken in found.disk.items())}",
        *(_hours(found) if found.fits else []),
    ]
    content: dict[str, Any] = {
        "fits": found.fits,
        "bytes": parts | {"micro-batch": activations},
        "host_bytes": found.host,
        "disk_bytes": found.disk,
        "micro_batch_tokens": found.largest,
        "saved_by_prefixes": data.saved,
        **(found.hours() if found.fits else {}),
    }
    if suggests:
        suggested, seconds = _suggest(found)
        content["suggested"] = suggested
        needs_host = suggested is not None and "zero3_offload" in suggested
        in_bf16 = _in_bf16(found) if needs_host or suggested is None else ""
        if suggested:
            lines.append(f"suggested: {suggested} (an epoch: {_span(*seconds)})")
        if in_bf16:
            lines.append(f"{'or on the GPUs alone' if suggested else 'nothing fits but'}: {in_bf16}")
        elif suggested is None:
            lines.append("nothing fits: more GPUs (plan.gpus), or model.adapter.r=16, need less on each")
    return Plan(found.fits, lines, content)


def _verdict(found: Estimate) -> str:
    room = "the memory that a token takes in this architecture is not known: begin with small micro-batches"
    if found.largest is not None:
        room = f"there is room for micro-batches of {found.largest:,} tokens"
    if found.fits:
        return f"fits: {room}"
    return f"does not fit: {room}"


def _hours(found: Estimate) -> list[str]:
    """Return the lines about the time of each phase, and about its bottleneck."""
    data = found.data
    trainer = found.config.trainer
    hours = found.hours()
    fast, slow = (found.seconds(reached) for reached in MFU_RANGE)
    times = [[name, _span(fast[name], slow[name])] for name in fast]
    times.append(["in all, at 38 to 27 % of the datasheet's operations", _span(*hours["epoch_seconds"])])
    length = f"trainer.max_steps={trainer.max_steps}"
    if trainer.max_steps is None:
        length = f"trainer.epochs={trainer.epochs:g}"
    times.append([f"this run, {length}", _span(*hours["run_seconds"])])
    pairs = pluralize(data.pairs, found.config.loss.unit)
    of_images = f", {data.image_tokens:,.0f} of them of images" if data.image_tokens else ""
    if found.config.model.images is not None and not data.image_tokens:
        of_images = ", without the work of the vision tower, as the images are not known"
    fewer = f", {percent(data.saved)} of them saved by shared prefixes" if data.saved >= 0.01 else ""
    lines = [
        f"an epoch of {pairs} of {data.tokens:,.0f} tokens{of_images}{fewer} ({data.basis}):",
        *(f"  {line}" for line in aligned(times, numbers=(1,))),
    ]
    if found.sending > found.computing / MFU_RANGE[0]:
        lines.append(
            "communication-bound: exchanging weights takes longer than computing; larger steps "
            "(trainer.global_batch_pairs) or fewer GPUs exchange less"
        )
    return lines


def _check(config: RunConfig, causal_lm: Any, gpus: int) -> None:
    """Raise ConfigError for what a start on so many GPUs refuses."""
    check_groups(config.parallelism, gpus, trains=True)
    check_shapes(causal_lm, config.data.longest, config.parallelism)


def _try(found: Estimate, config: RunConfig) -> Estimate | None:
    """Return the estimate of a changed run of the same model; None if it is refused, or does not fit."""
    causal_lm = found.shapes.causal_lm
    try:
        changed = complete_config(config)
        _check(changed, causal_lm, found.machine.gpus)
    except ConfigError:  # settings that cannot be combined, such as ZeRO with a quantized base
        return None
    tried = estimate(changed, found.data, found.machine, causal_lm, found.shapes.teacher)
    return tried if tried.fits else None


def _in_bf16(found: Estimate) -> str:
    """Return how the run fits with `adamw_bf16`; "" if it does not, or has it already."""
    if found.config.optim.kind == "adamw_bf16":
        return ""
    former = yaml.safe_load(to_yaml(found.config))
    former["parallelism"] |= _NO_OFFLOAD
    words = "optim.kind=adamw_bf16"
    try:
        config = load_run_config([words], saved=former)
    except ConfigError:  # the run cannot have it
        return ""
    causal_lm = found.shapes.causal_lm
    suggested, _ = _suggest(estimate(config, found.data, found.machine, causal_lm, found.shapes.teacher))
    return f"{words} {suggested}" if suggested else ""


def _span(fast: float, slow: float) -> str:
    ends = (duration(end) if end >= 1 else "under 1 s" for end in (fast, slow))
    return " to ".join(dict.fromkeys(ends))


def planned_data(
    plan: PlanConfig,
    data: DataConfig,
    model: ModelConfig,
    loss: LossConfig,
    progress: ProgressOf,
    sharing: int | None = None,
    systems: Mapping[str, str] | None = None,
) -> Data:
    """Return an epoch's pairs and tokens: from the keys, from local data, or from the cards of hub data.

    `sharing`: pairs of a step on a GPU, which share prefixes; None: they share none. `systems`: those that
    scorers get in place of the records' own.
    """
    sources = data.train
    if None not in (plan.pairs, plan.tokens_per_pair):
        return Data(plan.pairs or 0, plan.tokens_per_pair or 0.0, "given")
    if not sources or any(map(_is_on_hub, sources)):
        known = [_by_its_card(source) for source in sources]
        sizes = [entry for entry in known if entry is not None]
        basis = "by the cards of the data"
        if not sizes or len(sizes) < len(known):
            sizes = [(_PAIRS, _TOKENS)]
            basis = "assumed"
        whole = sum(pairs for pairs, _ in sizes)
        tokens = sum(pairs * each for pairs, each in sizes)
        pairs = plan.pairs or round(whole * (1 - data.eval_share))
        how = f"{basis}; set plan.pairs and plan.tokens_per_pair"
        return Data(pairs, plan.tokens_per_pair or tokens / whole, how)
    from dpo_dist.kit import prepare_data, saved_by_tree  # noqa: PLC0415  (slow)

    of_sources = zip(
        prepare_data(data, model, loss, progress, systems).datasets, sources, strict=False
    )  # evaluation data come after these
    used = [(datasets[0], source.weight) for datasets, source in of_sources if datasets]
    pairs = max(1, round(sum(len(dataset) * weight for dataset, weight in used)))
    of_each = [int(dataset.piece_tokens.sum()) * weight / pairs for dataset, weight in used]
    tokens = sum(of_each)
    images = (
        sum(int(data.images.prompt_tokens.sum()) * weight for data, weight in used if data.images) / pairs
    )
    saved = 0.0
    if sharing is not None and plan.tokens_per_pair is None:
        for (dataset, weight), part in zip(used, of_each, strict=True):
            together = max(1, round(sharing * len(dataset) * weight / pairs))
            saved += saved_by_tree(dataset, together) * part / tokens
    responses = sum(len(dataset.keys) * weight for dataset, weight in used) / pairs
    read = dict[str, float]()
    for scorer in SCORERS:
        if any(scorer in dataset.scorer_prompts for dataset, _ in used):
            sums = [_prompt_tokens(dataset, scorer) * weight for dataset, weight in used]
            read[scorer] = sum(sums) / pairs
    return Data(
        plan.pairs or pairs, plan.tokens_per_pair or tokens, "of data.train", images, saved, responses, read
    )


def _prompt_tokens(dataset: Any, scorer: str) -> int:
    """Return the tokens of all prompts of a dataset as a scorer reads them."""
    own = dataset.piece_tokens[dataset.first_pieces[:-1]]
    others = dataset.scorer_prompts.get(scorer)
    return int(own.sum() if others is None else np.where(others.tokens > 0, others.tokens, own).sum())


def _is_on_hub(source: SourceConfig) -> bool:
    return DataSource(source).files() is None and not is_url(source.path)


def _by_its_card(source: SourceConfig) -> tuple[float, float] | None:
    """Return how many pairs an epoch takes from a hub dataset, and their mean tokens; None if not known."""
    name = "/".join(filter(None, (source.path, source.name, source.split or "train")))
    pairs, tokens = own_table(Path(__file__).with_name("data_sizes.yaml")).get(name, (0, 0.0))
    if source.fields == "completion":  # a prompt with one response
        tokens *= (1 + PROMPT_SHARE) / 2
    return (min(pairs, source.limit or pairs) * source.weight, tokens) if pairs else None


def _without_weights(model: ModelConfig) -> Any:
    """Return the model without weights; models of shipped presets need no network."""
    return policy_without_weights(model, _shape(model.path))


def _teacher_without_weights(config: RunConfig) -> Any:
    return teacher_without_weights(config, _shape(config.teacher.path or ""))


def _shape(path: str) -> Mapping[str, Any] | None:
    return own_table(Path(__file__).with_name("shapes.yaml")).get(path)


def _suggest(found: Estimate) -> tuple[str | None, list[float]]:
    """Return the overrides that fit with the shortest epoch, and its seconds; None if nothing fits."""
    seconds: dict[str, list[float]] = {}
    former = yaml.safe_load(to_yaml(found.config))
    # Presets keep these.
    former["parallelism"] |= _NO_OFFLOAD
    former["parallelism"] |= {"shard_size": None, "experts": 1}
    quantized = [] if found.config.model.adapter is None else _QUANTIZED
    key = "model.gradient_checkpointing"

    @cache  # composing takes longer than the estimate
    def composed(words: str) -> RunConfig:
        overrides = [*words.split(), f"{key}=full", "trainer.micro_batch_tokens=auto"]
        return load_run_config(overrides, saved=former)

    alternatives: list[_Setting] = [
        (f"parallelism={kind}", layers)
        for kind in (*_KINDS, *_OF_A_NODE, *_OF_EXPERTS)
        for layers in ("none", 4, 2, "full")
    ]
    settings = [*alternatives, *quantized]
    groups = [settings]
    for more in _LONG:
        groups.append([(f"{words} {more}", layers) for words, layers in settings if layers == "full"])
    for group in groups:
        if seconds:
            break  # what follows is slower
        for words, layers in group:
            try:
                base = composed(words)
            except ConfigError:
                continue
            changed = replace(base, model=replace(base.model, gradient_checkpointing=layers))
            tried = _try(found, changed)
            if tried and tried.largest and (_TILES not in words or tried.needs.in_tile):
                seconds[f"{words} {key}={layers}"] = tried.hours()["epoch_seconds"]
    fastest = min(seconds, key=lambda words: seconds[words], default=None)
    return fastest, seconds.get(fastest or "", [])
