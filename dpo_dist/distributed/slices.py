"""Slices of weights and optimizer states: what one rank has of a model that ZeRO shards (arXiv:1910.02054).

Every kind of parallelism flattens each weight and gives each rank a range of its elements, possibly none. A
checkpoint consists of these ranges, so that any number of ranks with any kind of parallelism can read it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from dpo_dist.distributed.eight_bit import create_states, from_float32, is_eight_bit, to_float32

WEIGHT = "weight"
"""The part of a slice that is the weight itself, for a trained one its float32 master weight."""
EMA = "ema"
"""The part of a slice that is the moving average of the weight."""
_STEP = "step"
_VANISHING_POWER = 2.0**-26
"""Below it, 1 less a power of a beta is 1 in float32."""


@dataclass(frozen=True)
class Slice:
    """A range of the elements of one flattened weight.

    Attributes:
        name: of the weight.
        shape: of the whole weight.
        start: index of the first element of the range.
        parts: weight and optimizer states by name, flat tensors of equal length; views, or copies of states
            that the optimizer has in 8 bits.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class ModelSlices:
    """This rank's slices of one model, as a checkpoint has them.

    Attributes:
        folder: name of their folder in a checkpoint.
        slices: of every weight that changes.
        step: number of updates of the optimizer.
        states: optimizer states of each weight after the first step; 0: none.
    """

    folder: str
    slices: Sequence[Slice]
    step: int = 0
    states: int = 0

    @property
    def elements(self) -> int:
        """Return the number of elements of the weights."""
        return sum(own.parts[WEIGHT].numel() for own in self.slices)

    @property
    def full_bytes(self) -> int:
        """Return the size of the slices in every checkpoint after the first step."""
        return sum(own.parts[WEIGHT].nbytes for own in self.slices) * (1 + self.states)


class Sharded(Protocol):
    """Weights that training changes, saved in slices: the policy, and a reference updated from it."""

    def shards(self) -> ModelSlices:
        """Return this rank's slices, as views; not collective."""
        ...

    def load_shards(self, folder: Path) -> None:
        """Read what a checkpoint has of `shards`, of any number of ranks; collective.

        Raises:
            CheckpointError: a file cannot be read, or is not of this model.
        """
        ...


@dataclass(frozen=True)
class _Flat:
    """A flat tensor of master weights, with the ranges of the weights that it consists of.

    Attributes:
        tensor: this rank's part of a group of weights.
        ranges: weight, start in the tensor, start in the weight, and length of each.
    """

    tensor: Tensor
    ranges: list[tuple[nn.Parameter, int, int, int]]


class OptimizerSlices:
    """This rank's slices of the weights that a DeepSpeed engine trains, with their optimizer states.

    Args:
        engine: the DeepSpeed engine.
        names: of the trained weights.
        rank: of this process.
        averages: of the `masters`; empty: there are none.
    """

    def __init__(
        self,
        engine: Any,
        names: Mapping[nn.Parameter, str],
        rank: int,
        averages: Mapping[Tensor, Tensor] = MappingProxyType({}),
    ):
        self._optimizer, self._names, self._rank = engine.optimizer, names, rank
        self._averages = averages
        self._loaded: dict[Tensor, dict[str, Tensor]] = {}  # 8-bit states in float32, until they are set

    def __iter__(self) -> Iterator[Slice]:
        """Yield the slices; optimizer states exist after the first step, or `create_states`."""
        for flat in self._flats():
            tensors = {WEIGHT: flat.tensor.detach(), **self._moments(flat)}
            if flat.tensor in self._averages:
                tensors[EMA] = self._averages[flat.tensor]
            for weight, start, start_in_weight, length in flat.ranges:
                parts = {part: tensor.narrow(0, start, length) for part, tensor in tensors.items()}
                yield Slice(self._names[weight], _whole_shape(weight), start_in_weight, parts)

    def masters(self) -> list[Tensor]:
        """Return the flat float32 tensors that the optimizer updates, with padding; not copies."""
        return [flat.tensor for flat in self._flats()]

    @property
    def step(self) -> int:
        """Return the number of updates that the optimizer states are of."""
        return max((int(self._states(flat).get(_STEP, 0)) for flat in self._flats()), default=0)

    def create_states(self, parts: Sequence[str], step: int) -> None:
        """Create optimizer states that do not exist yet, to be filled, and set the number of updates.

        Args:
            parts: of slices; those that are no states are ignored.
            step: number of updates.
        """
        inner = self._optimizer.optimizer
        names = [part for part in parts if part not in (WEIGHT, EMA)]
        for flat in self._flats():
            if names and is_eight_bit(inner):
                create_states(inner, flat.tensor, step)
                self._loaded[flat.tensor] = to_float32(self._states(flat))
                continue
            states = self._states(flat)
            for name in names:
                if name not in states:
                    states[name] = torch.zeros_like(flat.tensor, requires_grad=False)
            if names:
                counts_by_tensor = not isinstance(inner, DeepSpeedCPUAdam)
                device = flat.tensor.device
                states[_STEP] = torch.tensor(float(step), device=device) if counts_by_tensor else step
        if isinstance(inner, DeepSpeedCPUAdam) and names:
            _restore_powers(inner, step)

    def write_to_model(self) -> None:
        """Set 8-bit states to what was loaded, and the model's weights to the master weights; collective."""
        for master, moments in self._loaded.items():
            from_float32(moments, self._optimizer.optimizer.state[master])
        self._loaded.clear()
        if not isinstance(self._optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._optimizer.update_lp_params()
            return
        self._optimizer.checkpoint_event_prologue()
        for group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._optimizer.checkpoint_event_epilogue()

    def _moments(self, flat: _Flat) -> dict[str, Tensor]:
        """Return the states of the tensor's shape, float32; of an 8-bit optimizer copies in host memory."""
        states = self._states(flat)
        if is_eight_bit(self._optimizer.optimizer):
            return self._loaded.get(flat.tensor) or to_float32(states)
        shape = flat.tensor.shape
        return {
            name: state
            for name, state in states.items()
            if isinstance(state, Tensor) and state.shape == shape
        }

    def _states(self, flat: _Flat) -> dict[str, Any]:
        states: dict[str, Any] = self._optimizer.optimizer.state[flat.tensor]
        return states

    def _flats(self) -> Iterator[_Flat]:
        optimizer, ranges_of = self._optimizer, _ranges_of_mapping
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            tensors, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
            ranges_of = self._ranges_of_stage_3
        elif isinstance(optimizer, BF16_Optimizer):
            tensors, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
        else:
            tensors, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        for tensor, weights in zip(tensors, groups, strict=True):
            yield _Flat(tensor, ranges_of(weights))

    def _ranges_of_stage_3(self, weights: Sequence[Any]) -> list[tuple[nn.Parameter, int, int, int]]:
        """Stage 3 cuts each weight into slices of equal length, of which the last ones may be padded."""
        ranges, start = [], 0
        for weight in weights:
            first, length = _own_range(weight, self._rank)
            if length:
                ranges.append((weight, start, first, length))
            start += weight.partition_numel()
        return ranges


def _restore_powers(adam: Any, step: int) -> None:
    """Give DeepSpeed's CPU Adam the powers of its betas that it has after `step` updates.

    It multiplies them in float32 with every update and has no other access to them. After any other number of
    updates than the next one it computes the power anew, which is rounded differently.
    """
    beta1, beta2 = adam.param_groups[0]["betas"]
    if max(beta1, beta2) ** step < _VANISHING_POWER:
        return
    dummies = [torch.zeros(1) for _ in range(4)]
    for number in range(step + 1):  # 0 starts anew
        adam.ds_opt_adam.adam_update(adam.opt_id, number, 0.0, beta1, beta2, 1.0, 0.0, True, *dummies)


def frozen_slices(weights: Mapping[str, Any], rank: int) -> Iterator[Slice]:
    """Yield this rank's slices of weights that ZeRO-3 shards and no optimizer trains."""
    for name, weight in weights.items():
        first, length = _own_range(weight, rank)
        if length:
            part = weight.ds_tensor.detach().view(-1)[:length]
            yield Slice(name, _whole_shape(weight), first, {WEIGHT: part})


def _own_range(weight: Any, rank: int) -> tuple[int, int]:
    """Return first element and length of this rank's slice of a weight that ZeRO-3 shards."""
    size = weight.partition_numel()
    first = min(rank * size, weight.ds_numel)
    return first, min(size, weight.ds_numel - first)


def _ranges_of_mapping(weights: Sequence[Any]) -> list[tuple[nn.Parameter, int, int, int]]:
    """Stages 1 and 2 cut all weights together, laid end to end, into one slice for each rank."""
    ranges = []
    for weight in weights:
        if weight._hp_mapping is not None:  # None: no element of it is in this rank's slice
            master, own = weight._hp_mapping.hp_fragment_address, weight._hp_mapping.lp_fragment_address
            ranges.append((weight, master.start, own.start, own.numel))
    return ranges


def _whole_shape(weight: Any) -> tuple[int, ...]:
    return tuple(getattr(weight, "ds_shape", weight.shape))
