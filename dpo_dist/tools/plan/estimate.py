"""Compute memory and time of a run from the model's shapes, the data, and the GPUs' datasheet.

The share of the peak that training reaches, and the time to launch a layer's kernels, were measured on one
H100. The speeds of links, hosts and quantized weights are typical values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dpo_dist.kit import (
    DEFAULT_TOKENS,
    GPUS_PER_NODE,
    REACHED_SHARES,
    TORCH_DTYPES,
    Dtype,
    Footprint,
    Offload,
    ParallelismKind,
    ReferenceMode,
    RunConfig,
    Shapes,
    matmul_peak,
)
from dpo_dist.tools.plan.extension import PlanConfig
from dpo_dist.tools.sampling.keys import SamplingConfig
from dpo_dist.tools.sampling.settings import sampling_for

PROMPT_SHARE = 0.3
_GPUS = {
    # GiB that programs can use; then by the datasheet: operations a second of dense products in 16 bits and
    # in float32 (without TF32), and bytes a second of the memory.
    "h100-80g": (79.1, 989e12, 67e12, 3.35e12),
    "h200-141g": (139.8, 989e12, 67e12, 4.8e12),
    "b200-180g": (178.3, 2250e12, 75e12, 7.7e12),
    "a100-80g": (79.2, 312e12, 19.5e12, 2.0e12),
    "a100-40g": (39.4, 312e12, 19.5e12, 1.55e12),
    "l40s-48g": (44.4, 362e12, 91.6e12, 0.86e12),
    "rtx4090-24g": (23.6, 165e12, 82.6e12, 1.0e12),
}
_PRODUCTS_ALONE = 0.76  # the share of the datasheet's operations that matrix products reach on an H100
MFU_RANGE = tuple(share * _PRODUCTS_ALONE for share in REACHED_SHARES)
_NVLINK = 250e9  # bytes a second between the GPUs of a node
_PCIE = 25e9  # bytes a second between a GPU and its host
_HOST_MEMORY = 100e9  # bytes a second that CPU Adam moves on a node
_LAUNCHES = 1.2e-3  # seconds to launch the 240 kernels of a layer, forward and backward
# Seconds of a layer and micro-batch in which the GPU waits for the Python code of ZeRO-3's hooks, by a 1.5B
# model on one H200; a larger layer may hide them.
_HOOKS = 5.7e-3
_SHARDED_TOKEN = 3.3e-3  # seconds per layer and generated token under ZeRO-3; 1.6e-3 without it
_DEQUANTIZING = 0.5  # computing weights from fewer bits reaches this share of the memory's speed
_EXPERTS = 1.5  # experts take longer than dense layers: products are smaller, and tokens are sorted by expert


class Machine(NamedTuple):
    """The GPUs of a run."""

    gpus: int
    gpu: str
    memory: float  # bytes on a GPU
    flops: float  # operations a second on a GPU, by its datasheet
    bandwidth: float  # bytes a second of a GPU's memory
    network: float  # bytes a second of a GPU to other nodes

    def link(self, ranks: int) -> float:
        """Return the bytes a second of a GPU in a group of so many neighbours."""
        if ranks == 1:
            return math.inf
        return _NVLINK if ranks <= GPUS_PER_NODE else self.network


class Data(NamedTuple):
    """The pairs of an epoch."""

    pairs: int
    tokens: float  # of a pair, with its prompt once
    basis: str  # where both numbers come from
    image_tokens: float = 0.0  # placeholders of images in a prompt
    saved: float = 0.0  # share of the tokens that shared prefixes of several pairs save
    responses: float = 2.0  # of a pair
    scorer_prompts: Mapping[str, float] = MappingProxyType({})  # mean tokens of prompts that scorers read

    @property
    def targets(self) -> float:
        """Tokens of a pair's responses."""
        return (1 - PROMPT_SHARE) * self.tokens


def choose_machine(plan: PlanConfig, dtype: Dtype) -> Machine:
    """Return the GPUs that `plan` names, else this machine's, else H100s."""
    here = torch.cuda.device_count()
    kind = plan.gpu or "h100-80g"
    gib, half, single, bandwidth = _GPUS[kind]
    network = plan.network * 1e9
    if plan.gpu is None and here:
        peak = matmul_peak(torch.device("cuda"), TORCH_DTYPES[dtype])
        memory = torch.cuda.mem_get_info()[1]
        name = torch.cuda.get_device_name()
        return Machine(plan.gpus or here, name, memory, peak / _PRODUCTS_ALONE, bandwidth, network)
    peak = single if dtype is Dtype.fp32 else half
    return Machine(plan.gpus or 8, kind, gib * 2**30, peak, bandwidth, network)


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a run; seconds are per epoch."""

    config: RunConfig
    data: Data
    machine: Machine
    needs: Footprint
    shapes: Shapes
    steps: int
    micro_batch: int  # tokens
    step_tokens: float  # that a process computes in a step
    times: int  # micro-batches of a process in a step
    computing: float  # seconds of training at the datasheet's peak
    scoring: float  # seconds of the reference at the datasheet's peak
    asking: float  # seconds of the teacher at the datasheet's peak
    launching: float  # seconds in which the host launches kernels
    hooks: float  # seconds in which the GPU waits for ZeRO-3's hooks
    exchanging: float  # seconds in which tokens go to their experts and back
    dequantizing: float  # seconds in which weights are computed from fewer bits

    @property
    def whole(self) -> float:
        """Bytes of all weights."""
        return float(self.shapes.number * self.shapes.weights)

    @property
    def largest(self) -> int | None:
        """Tokens of the largest micro-batch that fits; None if this is not known."""
        return self.needs.largest_micro_batch(self.machine.memory)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, or of the longest pair, which is not divided."""
        return max(self.micro_batch, self.config.data.max_length)

    @property
    def fits(self) -> bool:
        """Whether the micro-batches and the longest pair fit."""
        return self.needs.fits(self.tokens, self.machine.memory)

    @property
    def host(self) -> float:
        """Bytes of host memory on rank 0's node."""
        on_node = min(self.machine.gpus, GPUS_PER_NODE)
        inputs = self.shapes.offloaded_inputs / self.config.parallelism.sequence_parallel
        return self.shapes.host_bytes(self.machine.gpus) + on_node * inputs * self.tokens

    @property
    def disk(self) -> dict[str, float]:
        """Bytes that a run writes, by kind."""
        taken = self.shapes.disk_bytes()
        if self.config.reference.mode is ReferenceMode.cached:
            taken["the log-probs"] = 4.0 * self.data.targets * self.data.pairs
        if self.shapes.teacher_bytes:
            chosen = self.data.targets / self.data.responses
            taken["the teacher's distributions"] = self.shapes.teacher_bytes * chosen * self.data.pairs
        return taken

    @property
    def sending(self) -> float:
        """Seconds in which GPUs exchange weights and gradients."""
        parallelism = self.config.parallelism
        gpus = self.machine.gpus
        link = self.machine.link
        shards = parallelism.shard_size or gpus
        is_wide = shards > GPUS_PER_NODE
        gradients = float((4 if is_wide else self.shapes.number) * self.shapes.trained)
        if not self._is_sharded:
            updated = self.shapes.number * self.shapes.trained
            return self.steps * (updated + gradients) / link(gpus)
        gathered = self.whole
        of_experts = 0.0
        if parallelism.experts > 1:  # they do not travel, but if trained to the ranks with equal experts
            gathered -= self.shapes.number * self.shapes.experts
            if self.config.model.adapter is None:
                share = self.shapes.experts / self.shapes.trained
                equal = 2 * self.shapes.number * self.shapes.experts + share * gradients
                is_alone = shards == parallelism.experts
                of_experts = 0.0 if is_alone else self.times * equal / parallelism.experts / link(shards)
                gradients *= 1 - share
        gathering = 2 * self.times * gathered / link(shards)  # in forward and backward
        reducing = self.times * gradients / link(shards)
        # Once a step, ranks with the same shards of other copies sum them in float32: out and back.
        between = 2 * 4 * self.shapes.trained / shards / link(gpus) if shards < gpus else 0.0
        return self.steps * (gathering + of_experts + reducing + between)

    @property
    def on_host(self) -> float:
        """Seconds in which GPUs wait for their hosts: for copies and for CPU Adam."""
        parallelism = self.config.parallelism
        gpus = self.machine.gpus
        seconds = 0.0
        if parallelism.offload_parameters is not Offload.none:  # copied for forward, and again for backward
            seconds += 2 * self.times * self.whole / gpus / _PCIE
        if parallelism.offload_optimizer is not Offload.none:  # gradients go out, updated weights come in
            seconds += (4 + self.shapes.number) * self.shapes.trained / gpus / _PCIE
            moved = 2 * self.shapes.states + 4 + self.shapes.number  # bytes that CPU Adam reads and writes
            seconds += moved * self.shapes.trained * min(1.0, GPUS_PER_NODE / gpus) / _HOST_MEMORY
        # Inputs of layers go out in forward, and come in in backward.
        seconds += 2 * self.shapes.offloaded_inputs * self.step_tokens / _PCIE
        return self.steps * seconds

    @property
    def sampling(self) -> float:
        """Seconds to generate samples under ZeRO-3, which gathers all weights; counted as 0 otherwise."""
        sampling = self.config.section_of(SamplingConfig)
        every = self.config.trainer.eval_every
        tokens = sampling_for("train", sampling).max_new_tokens
        if not self._is_sharded or sampling.prompts == 0 or not self.config.data.eval_sources:
            return 0.0
        has_room = 2 * self.whole < self.machine.memory - self.needs.total_bytes(0)
        gathers = 1 if has_room else tokens
        # The reference responds once, the policy at each evaluation or at the last one only.
        evaluations = 1 + (math.ceil(self.steps / every) if every and sampling.prompts else 1)
        generating = tokens * self.shapes.layers * _SHARDED_TOKEN
        shards = self.config.parallelism.shard_size or self.machine.gpus
        return evaluations * (gathers * self.whole / self.machine.link(shards) + generating)

    def seconds(self, reached: float, epochs: float = 1.0) -> dict[str, float]:
        """Return the seconds of `epochs` by phase, at this share of the GPU's datasheet FLOP/s."""
        # `ddp` in bf16 sends its gradients after backward; other kinds send while they compute.
        is_bf16 = self.config.model.dtype is Dtype.bf16
        kind = self.config.parallelism.kind
        together = sum if is_bf16 and kind is ParallelismKind.ddp else max
        training = together((max(self.computing / reached, self.launching), self.sending)) + self.dequantizing
        training += self.hooks + self.exchanging
        phases = {"training": epochs * (training + self.on_host)}
        mode = self.config.reference.mode
        if mode is not ReferenceMode.none:
            once = ", once for all runs" if mode is ReferenceMode.cached else ""
            # Scoring also sends and waits less than training, about in proportion to its computing.
            scored = (min(1.0, epochs) if once else epochs) * self.scoring / self.computing
            phases[f"reference{once}"] = scored * training
        if self.asking:
            once = ", once for all runs" if self.shapes.teacher_bytes else ""
            asked = min(1.0, epochs) if once else epochs
            phases[f"teacher{once}"] = asked * self.asking / reached
        return phases | ({"samples": epochs * self.sampling} if self.sampling else {})

    def hours(self) -> dict[str, list[float]]:
        """Return the seconds of an epoch and of the run, each as [fast, slow]."""
        trainer = self.config.trainer
        epochs = self.config.trainer.epochs
        if trainer.max_steps is not None:
            epochs = trainer.max_steps * trainer.global_batch_pairs / self.data.pairs
        once, runs = ([sum(self.seconds(end, n).values()) for end in MFU_RANGE] for n in (1.0, epochs))
        return {"epoch_seconds": once, "run_seconds": runs}

    @property
    def _is_sharded(self) -> bool:
        return self.config.parallelism.kind is ParallelismKind.zero3


def estimate(
    config: RunConfig, data: Data, machine: Machine, causal_lm: Any, teacher: Any = None
) -> Estimate:
    """Return the estimate of training `causal_lm`, the policy on the meta device, beside its `teacher`."""
    gpus = machine.gpus
    model = config.model
    shapes = Shapes(config, causal_lm, teacher)
    prompt = PROMPT_SHARE * data.tokens
    response = data.targets / 2

    def attended(prompt: float) -> float:
        return prompt**2 / 2 + 2 * response * (prompt + response / 2)

    computed = (1 - data.saved) * data.tokens
    of_pair = round(computed), round(data.targets), round(attended(prompt)), round(data.image_tokens)
    work = data.pairs * shapes.flops(*of_pair)
    useful = work / (gpus * machine.flops)
    again = shapes.recomputed_share
    useful *= _EXPERTS if shapes.has_experts else 1.0
    forward = useful / (3 if model.adapter is None else 2)
    partners = forward * config.loss.needs_partners
    scoring = forward + partners
    read = data.scorer_prompts.get("reference")
    if read is not None:
        as_read = round(read + data.targets), round(data.targets), round(attended(read)), of_pair[3]
        scoring *= shapes.flops(*as_read) / shapes.flops(*of_pair)
    asking = 0.0
    if teacher is not None:  # a forward of each chosen response, a third of a training step's work
        chosen = data.targets / data.responses
        row = data.scorer_prompts.get("teacher", prompt) + chosen
        of_chosen = round(row), round(chosen), round(row**2 / 2), 0
        asking = data.pairs * Shapes(config, teacher).flops(*of_chosen) / 3
    needs = shapes.footprint(gpus, machine.memory)
    micro_batch = _micro_batch(config, needs, machine)
    # Offloaded or quantized weights leave room for larger micro-batches, which are not counted as faster.
    on_device = replace(config.parallelism, offload_optimizer=Offload.none, offload_parameters=Offload.none)
    in_memory = replace(model, quantization=None, activation_offload=False)
    plain = replace(config, parallelism=on_device, model=in_memory)
    without = Shapes(plain, causal_lm, teacher).footprint(gpus, machine.memory)
    tokens = micro_batch
    if without.fits(config.data.max_length, machine.memory):
        tokens = min(tokens, _micro_batch(config, without, machine))
    # A pair above the budget has a micro-batch of its own.
    step_tokens = config.trainer.global_batch_pairs * computed / gpus
    times = math.ceil(step_tokens / max(tokens, data.tokens))
    steps = math.ceil(data.pairs / config.trainer.global_batch_pairs)
    sharing = config.parallelism.experts
    # To their experts and back: in forward, in backward, and where layers are computed again.
    exchanges = 2 * (2 + again * useful / forward)
    elsewhere = (sharing - 1) / sharing * shapes.number * shapes.exchanged
    sent = exchanges * data.pairs * computed / gpus * elsewhere
    return Estimate(
        config,
        data,
        machine,
        needs,
        shapes,
        steps=steps,
        micro_batch=micro_batch,
        step_tokens=step_tokens,
        times=times,
        computing=useful * (1 + again) + partners,
        scoring=scoring,
        asking=asking / (gpus * machine.flops),
        launching=(1 + again) * steps * times * shapes.layers * _LAUNCHES,
        hooks=steps * times * shapes.layers * _HOOKS
        if config.parallelism.kind is ParallelismKind.zero3
        else 0.0,
        exchanging=sent / machine.link(sharing),
        dequantizing=2
        * (1 + again)
        * steps
        * times
        * shapes.dequantized
        / (_DEQUANTIZING * machine.bandwidth),
    )


def _micro_batch(config: RunConfig, needs: Footprint, machine: Machine) -> int:
    if config.trainer.micro_batch_tokens != "auto":
        return config.trainer.micro_batch_tokens
    largest = needs.largest_micro_batch(machine.memory)
    return DEFAULT_TOKENS if largest is None else largest
