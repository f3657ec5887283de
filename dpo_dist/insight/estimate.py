"""Memory and time of a run by arithmetic: the shapes of its model, its data, and the datasheet of the GPUs.

Measured on one H100 are the shares of its operations that training reaches, and the kernels of a layer. The
speeds of links, hosts and quantized weights are those of usual machines.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from dpo_dist.config.schema import (
    ZERO_STAGES,
    Dtype,
    Offload,
    ParallelismKind,
    PlanConfig,
    ReferenceMode,
    RunConfig,
)
from dpo_dist.model.flops import (
    REACHED_SHARES,
    matmul_peak,
    recomputed_share,
    step_flops,
    visited_experts,
)
from dpo_dist.model.load import TORCH_DTYPES
from dpo_dist.training.context import DEFAULT_TOKENS
from dpo_dist.training.footprint import (
    BYTES_OF_QUANTIZED,
    Footprint,
    footprint,
    quantized_weights,
    state_bytes,
)

GPUS_OF_A_NODE = 8
PROMPT_SHARE = 0.3
_GPUS = {
    # GiB that programs can use; by the datasheet operations a second of dense products in 16 bits and in
    # float32 (without TF32), and bytes a second of the memory.
    "h100-80g": (79.1, 989e12, 67e12, 3.35e12),
    "h200-141g": (139.8, 989e12, 67e12, 4.8e12),
    "b200-180g": (178.3, 2250e12, 75e12, 7.7e12),
    "a100-80g": (79.2, 312e12, 19.5e12, 2.0e12),
    "a100-40g": (39.4, 312e12, 19.5e12, 1.55e12),
    "l40s-48g": (44.4, 362e12, 91.6e12, 0.86e12),
    "rtx4090-24g": (23.6, 165e12, 82.6e12, 1.0e12),
}
_PRODUCTS_ALONE = 0.76  # the share of the datasheet's operations that matrix products reach on an H100
REACHED = tuple(share * _PRODUCTS_ALONE for share in REACHED_SHARES)
_NVLINK = 250e9  # bytes a second between the GPUs of a node
_PCIE = 25e9  # bytes a second between a GPU and its host
_HOST_MEMORY = 100e9  # bytes a second of a node while CPU Adam updates
_LAUNCHES = 1.2e-3  # seconds to launch the 240 kernels of a layer, forward and backward
_HOOKS = 1.1e-3  # seconds of ZeRO-3's hooks of a layer, for each generated token
_DEQUANTIZING = 0.5  # the share of the memory's speed at which weights are computed from fewer bits
_EXPERTS = 1.5  # times the work of a dense model: products are smaller, and tokens are sorted by expert


class Machine(NamedTuple):
    """The GPUs of a run."""

    gpus: int
    gpu: str
    memory: float  # bytes of a GPU
    flops: float  # operations a second of a GPU by its datasheet
    bandwidth: float  # bytes a second of a GPU's memory


class Data(NamedTuple):
    """The pairs of an epoch."""

    pairs: int
    tokens: float  # of a pair, with its prompt once
    basis: str  # where both are from

    @property
    def targets(self) -> float:
        """Tokens of the responses of a pair."""
        return (1 - PROMPT_SHARE) * self.tokens


class Work(NamedTuple):
    """Seconds of an epoch of training, or of scoring by the reference."""

    computing: float  # at all operations of the datasheet
    launching: float  # kernels, by the host
    sending: float  # weights and gradients between GPUs
    alone: float  # what nothing overlaps with: copies to the host, CPU Adam, weights from fewer bits

    def seconds(self, reached: float, together: Callable[[tuple[float, float]], float] = max) -> float:
        """Return the seconds in all, at this share of the operations of the datasheet."""
        return together((max(self.computing / reached, self.launching), self.sending)) + self.alone


def machine_of(plan: PlanConfig, dtype: Dtype) -> Machine:
    """Return the GPUs that `plan` names, or else those of this machine, or else H100s."""
    here, kind = torch.cuda.device_count(), plan.gpu or "h100-80g"
    gib, half, single, bandwidth = _GPUS[kind]
    if plan.gpu is None and here:
        peak = matmul_peak(torch.device("cuda"), TORCH_DTYPES[dtype])
        memory = torch.cuda.mem_get_info()[1]
        name = torch.cuda.get_device_name()
        return Machine(plan.gpus or here, name, memory, peak / _PRODUCTS_ALONE, bandwidth)
    return Machine(plan.gpus or 8, kind, gib * 2**30, single if dtype is Dtype.fp32 else half, bandwidth)


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a run."""

    config: RunConfig
    data: Data
    machine: Machine
    needs: Footprint
    weights: int
    trained: int
    quantized: int
    layers: int
    number: int  # bytes of a weight
    link: float  # bytes a second between GPUs
    steps: int  # of an epoch
    micro_batch: int  # tokens
    times: int  # micro-batches of a process in a step
    forward: float  # seconds of an epoch's forwards at all operations of the datasheet

    @property
    def whole(self) -> float:
        """Bytes of all weights."""
        return float(self.number * self.weights)

    @property
    def largest(self) -> int | None:
        """Tokens of the largest micro-batch that fits; None if not known."""
        return self.needs.largest_micro_batch(self.machine.memory)

    @property
    def fits(self) -> bool:
        """Whether the micro-batches fit, and the longest response with its prompt."""
        return self.needs.fits(max(self.micro_batch, self.config.data.max_length), self.machine.memory)

    @property
    def host(self) -> float:
        """Bytes of host memory on a node of rank 0, which reads the model and writes checkpoints."""
        states = (state_bytes(self.config) + 4 * self._is_optimizer_away) * self.trained
        return self.whole + self._of_node * (states + self.whole * self._is_policy_away)

    @property
    def disk(self) -> dict[str, float]:
        """Bytes that a run writes: with an adapter no other weights; log-probs only if they are stored."""
        is_whole = self.config.model.adapter is None
        model = self.whole if is_whole else float(self.number * self.trained)
        taken = {"a checkpoint": state_bytes(self.config) * self.trained, "the model": model}
        if self.config.reference.mode is ReferenceMode.cached:
            taken["the log-probs"] = 4.0 * self.data.targets * self.data.pairs
        return taken

    @property
    def training(self) -> Work:
        """The work of training an epoch."""
        parallelism, number, again = (
            self.config.parallelism,
            self.number,
            recomputed_share(self.config.model),
        )
        useful = self.forward * (3 if self.config.model.adapter is None else 2)
        is_wide = parallelism.reduce_in_float32
        if is_wide is None:
            is_wide = self.machine.gpus > GPUS_OF_A_NODE
        gradients = (4 if is_wide else number) * self.trained
        sent = float(number * self.trained + gradients)  # bytes of a step
        if self._is_sharded:  # weights are gathered twice in a micro-batch; with copies on nodes once a step
            gathers = 2 * self.times if parallelism.hpz == 1 else 2
            sent = self.times * gradients + gathers * self.whole
        on_host = 2 * self.times * self._fetching * self._is_policy_away
        if self._is_optimizer_away:  # gradients go to the host, and updated weights come back
            on_host += (4 + number) * self.trained / self.machine.gpus / _PCIE
            moved = 2 * state_bytes(self.config) + 4 + number  # bytes that CPU Adam reads and writes
            on_host += moved * self.trained * self._of_node / _HOST_MEMORY
        return Work(
            useful * (1 + again) + self.forward * self.config.loss.needs_partners,
            self._launching * (1 + again),
            self.steps * sent / self.link,
            self.steps * on_host + 2 * (1 + again) * self._dequantizing,
        )

    @property
    def scoring(self) -> Work:
        """The work of the reference: of the policy's engine with its adapter off, or of a sharded one."""
        is_policy = self.config.reference.mode is ReferenceMode.adapter
        is_away = self._is_policy_away if is_policy else self.config.reference.offload is not Offload.none
        micro_batches = self.steps * self.times
        return Work(
            self.forward * (1 + self.config.loss.needs_partners),
            self._launching / 3,
            micro_batches * self.whole / self.link * (self._is_sharded or not is_policy),
            micro_batches * self._fetching * is_away + self._dequantizing,
        )

    @property
    def sampling(self) -> float:
        """Seconds of the samples of an epoch."""
        samples, every = self.config.samples, self.config.trainer.eval_every
        has_room = 2 * self.whole < self.machine.memory - self.needs.used(0)
        gathers = (1 if has_room else samples.max_new_tokens) * self._is_sharded  # of all weights
        launching = samples.max_new_tokens * self.layers * (_LAUNCHES / 3 + _HOOKS * self._is_sharded)
        evaluations = 1 + (self.steps // every if every and samples.prompts else 0)
        evaluations *= samples.prompts != 0 and bool(self.config.data.eval_sources)
        return evaluations * (gathers * self.whole / self.link + launching)

    def seconds(self, reached: float, epochs: float = 1.0) -> dict[str, float]:
        """Return the seconds of `epochs` by phase, at this share of the operations of the datasheet."""
        # `ddp` in bf16 sends its gradients after backward; the others send while they compute.
        is_bf16, kind = self.config.model.dtype is Dtype.bf16, self.config.parallelism.kind
        together = sum if is_bf16 and kind is ParallelismKind.ddp else max
        phases = {"training": epochs * self.training.seconds(reached, together)}
        mode = self.config.reference.mode
        if mode is not ReferenceMode.none:
            once = ", once for all runs" if mode is ReferenceMode.cached else ""
            phases[f"reference{once}"] = (min(1.0, epochs) if once else epochs) * self.scoring.seconds(
                reached
            )
        return phases | ({"samples": epochs * self.sampling} if self.sampling else {})

    def hours(self) -> dict[str, list[float]]:
        """Return the seconds of an epoch and of the run, and its price: each fast and slow."""
        trainer, price, epochs = self.config.trainer, self.config.plan.price, self.config.trainer.epochs
        if trainer.max_steps is not None:
            epochs = trainer.max_steps * trainer.global_batch_pairs / self.data.pairs
        once, runs = ([sum(self.seconds(end, n).values()) for end in REACHED] for n in (1.0, epochs))
        prices = {} if price is None else {"price": [end / 3600 * self.machine.gpus * price for end in runs]}
        return {"epoch_seconds": once, "run_seconds": runs, **prices}

    @property
    def _of_node(self) -> float:
        """Share of the GPUs that one node has."""
        return min(1.0, GPUS_OF_A_NODE / self.machine.gpus)

    @property
    def _is_sharded(self) -> bool:
        return ZERO_STAGES[self.config.parallelism.kind] == 3

    @property
    def _is_optimizer_away(self) -> bool:
        return self.config.parallelism.offload_optimizer is not Offload.none

    @property
    def _is_policy_away(self) -> bool:
        return self.config.parallelism.offload_parameters is not Offload.none

    @property
    def _fetching(self) -> float:
        """Seconds in which a GPU copies its part of the weights from the host."""
        return self.whole / self.machine.gpus / _PCIE

    @property
    def _launching(self) -> float:
        return self.steps * self.times * self.layers * _LAUNCHES

    @property
    def _dequantizing(self) -> float:
        """Seconds of the forwards of an epoch."""
        if (kind := self.config.model.quantization) is None:
            return 0.0
        moved = (BYTES_OF_QUANTIZED[kind] + self.number) * self.quantized
        return self.steps * self.times * moved / (_DEQUANTIZING * self.machine.bandwidth)


def estimate(config: RunConfig, data: Data, machine: Machine, causal_lm: Any) -> Estimate:
    """Return the estimate of training `causal_lm`, the policy on the meta device."""
    gpus, text = machine.gpus, causal_lm.config.get_text_config()
    network = _NVLINK if gpus <= GPUS_OF_A_NODE else config.plan.network / 8 * 1e9
    prompt, response = PROMPT_SHARE * data.tokens, data.targets / 2
    attended = prompt**2 / 2 + 2 * response * (prompt + response / 2)
    work = data.pairs * step_flops(causal_lm).of(round(data.tokens), round(data.targets), round(attended))
    work *= (_EXPERTS if visited_experts(text) else 1.0) / (gpus * machine.flops)
    found = Estimate(
        config,
        data,
        machine,
        needs := footprint(config, causal_lm, gpus),
        weights=sum(map(torch.numel, causal_lm.parameters())),
        trained=sum(weight.numel() for weight in causal_lm.parameters() if weight.requires_grad),
        quantized=quantized_weights(causal_lm),
        layers=int(text.num_hidden_layers),
        number=TORCH_DTYPES[config.model.dtype].itemsize,
        link=math.inf if gpus == 1 else network,
        steps=math.ceil(data.pairs / config.trainer.global_batch_pairs),
        micro_batch=(tokens := _micro_batch(config, needs, machine)),
        times=1,
        forward=work / (3 if config.model.adapter is None else 2),
    )
    # The larger micro-batches that fit beside offloaded or quantized weights are not counted as a gain.
    on_device = replace(config.parallelism, offload_optimizer=Offload.none, offload_parameters=Offload.none)
    plain = replace(config, parallelism=on_device, model=replace(config.model, quantization=None))
    without = footprint(plain, causal_lm, gpus)
    if replace(found, needs=without, micro_batch=(fewer := _micro_batch(plain, without, machine))).fits:
        tokens = min(tokens, fewer)
    # A pair above the budget has a micro-batch of its own.
    of_step = config.trainer.global_batch_pairs * data.tokens / gpus
    return replace(found, times=math.ceil(of_step / max(tokens, data.tokens)))


def _micro_batch(config: RunConfig, needs: Footprint, machine: Machine) -> int:
    if config.trainer.micro_batch_tokens != "auto":
        return config.trainer.micro_batch_tokens
    largest = needs.largest_micro_batch(machine.memory)
    return DEFAULT_TOKENS if largest is None else largest
