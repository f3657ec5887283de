"""DeepSpeed ZeRO engines: the policy, and a sharded model that is only scored."""

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dpo_dist.config.optim_schema import OptimConfig
from dpo_dist.data.arrangement import size_in_words
from dpo_dist.data.packing import PackedBatch
from dpo_dist.distributed.averages import Averages
from dpo_dist.distributed.deepspeed_config import policy_communication
from dpo_dist.distributed.device_memory import (
    REFERENCE_REMEDY,
    empty,
    empty_module,
    explain_out_of_memory,
    policy_remedy,
    return_memory,
    wait_for_device,
)
from dpo_dist.distributed.eight_bit import check_lengths
from dpo_dist.distributed.gather_order import record_gather_orders
from dpo_dist.distributed.joined import restore_linear
from dpo_dist.distributed.leaves import gather_at_once, reduce_at_once
from dpo_dist.distributed.loss_scale import LossScale
from dpo_dist.distributed.optimizer import STATES_OF_ADAM, create_optimizer
from dpo_dist.distributed.slice_files import SavedSlices
from dpo_dist.distributed.slices import ModelSlices, OptimizerSlices
from dpo_dist.distributed.world import World
from dpo_dist.model.adapters import adapted_layers, adapter_off
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.objective.token_logps import Statistic

SHARDS = "engine"
"""The folder of the policy's slices in a checkpoint."""


class FrozenEngine:
    """Sharded model that is only scored; `folder` contains its weights if they are on NVMe."""

    def __init__(self, model: PackedCausalLM, deepspeed_config: dict[str, Any], folder: Path | None = None):
        self.model, self._folder = model, folder
        model.requires_grad_(False)
        gather_at_once(model)
        self._engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config)
        self._engine.eval()

    @torch.no_grad()
    def token_logps(self, batch: PackedBatch, statistics: Sequence[Statistic] = ()) -> Tensor:
        """Return float32 [targets], log-probs; with statistics [1 + n, targets]. Collective."""
        size = size_in_words(batch.layout, self.model.arrangement)
        with explain_out_of_memory(f"scoring {size}", REFERENCE_REMEDY):
            logps: Tensor = self._engine(batch, tuple(statistics))
        return logps

    @property
    def causal_lm(self) -> Any:
        """Return the transformers model of the engine; its tensors are sharded."""
        return self._engine.module.causal_lm

    @property
    def is_synchronised(self) -> bool:
        """Whether each forward is collective: weights are gathered from all ranks."""
        return dist.get_world_size() > 1 and bool(self._engine.zero_optimization_partition_weights())

    @contextlib.contextmanager
    def generating(self, *, of_base: bool = False) -> Iterator[Any]:
        """Yield the transformers model in a state in which it generates; see `PolicyEngine.generating`."""
        if self._engine.zero_optimization_partition_weights():
            record_gather_orders(self._engine, self._engine.optimizer)
        with _generating(self._engine.module, of_base=of_base) as causal_lm:
            yield causal_lm

    def free(self) -> None:
        """Release the memory of the model; it cannot be used afterwards."""
        wait_for_device()
        self._engine.destroy()
        for weight in self._engine.module.parameters():
            if weight.nvme_swapper is not None:
                weight.nvme_swapper.buffers = None
        empty_module(self._engine.module)
        del self._engine
        if not is_deepspeed_zero3_enabled():  # the policy is not sharded
            restore_linear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        return_memory()


class PolicyEngine:
    """The trained model: forward, accumulated backward, optimizer step. Methods are collective.

    Args:
        model: with the weights at the start.
        optim: the optimizer.
        world: of this start.
        ema_decay: of the moving average of the weights; None: there is none.

    Attributes:
        loss_scale: of the next step in fp16; None with another `model.dtype`.
        has_overflowed: the last step was not applied, and a smaller loss scale may help.
    """

    def __init__(
        self, model: PackedCausalLM, optim: OptimConfig, world: World, ema_decay: float | None = None
    ):
        self.model, self._world = model, world
        zero = world.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero.update(policy_communication(zero["stage"], model.hidden_size))
        gather_at_once(model)
        reduce_at_once(model, zero["stage"])
        world.barrier()  # ranks have loaded at unequal speed, and calls of DeepSpeed time out
        self._engine, _ = world.accelerator.prepare(model, create_optimizer(model, optim))
        self._backwards, self._current = 0, ("", "")
        if self._engine.zero_optimization_partition_weights():
            record_gather_orders(self._engine, self._engine.optimizer.parameter_offload)
        self.loss_scale = LossScale() if self._engine.fp16_enabled() else None
        self.has_overflowed = False
        self._averages = Averages({}, 0.0)
        check_lengths(self._engine.optimizer.optimizer, self._slices().masters())
        if ema_decay is not None:
            self._averages = Averages.of(self._slices().masters(), ema_decay)

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def token_logps(self, batch: PackedBatch, statistics: Sequence[Statistic] = ()) -> Tensor:
        """Return log-probs of every target, float32 [targets]; with statistics [1 + n, targets]."""
        with self._named_in_errors(batch):
            logps: Tensor = self._engine(batch, tuple(statistics))
        return logps

    def routed_token_logps(
        self, batch: PackedBatch, statistics: Sequence[Statistic] = ()
    ) -> tuple[Tensor, Tensor]:
        """Return `token_logps` and `objective.router_losses.routing_sums` of a mixture of experts."""
        with self._named_in_errors(batch):
            logps, sums = self._engine(batch, tuple(statistics), with_routing=True)
        return logps, sums

    @torch.no_grad()
    def base_token_logps(self, batch: PackedBatch) -> Tensor:
        """Return `token_logps` of the base model, without the adapter."""
        with adapter_off(self._engine.module):
            return self.token_logps(batch)

    @property
    def is_synchronised(self) -> bool:
        """Whether each forward is collective: weights are gathered from all ranks."""
        return self._world.size > 1 and bool(self._engine.zero_optimization_partition_weights())

    @contextlib.contextmanager
    def generating(self, *, of_base: bool = False) -> Iterator[Any]:
        """Yield the transformers model in a state in which it generates.

        Training after the block continues as if it had not been. If `is_synchronised`, all ranks make the
        same number of forwards in the block.

        Args:
            of_base: generate without the adapter.
        """
        was_training = self._engine.training
        self.train(False)
        try:
            with _generating(self._engine.module, of_base=of_base) as causal_lm:
                yield causal_lm
        finally:
            self.train(was_training)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients of this rank's sum of losses; `is_last` ends the accumulation of the step.

        DeepSpeed averages gradients over ranks, so the loss is multiplied by the world size to get the sum.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        with explain_out_of_memory(*self._current):
            self._engine.backward(loss * self._world.size)
        self._backwards = 0 if is_last else self._backwards + 1

    def _named_in_errors(self, batch: PackedBatch) -> contextlib.AbstractContextManager[None]:
        """Name `batch` in out-of-memory errors of the block, and of the backward that follows."""
        work = f"micro-batch {self._backwards + 1} of a step" if self._engine.training else "scoring"
        arranged = (batch.layout, self.model.arrangement)
        self._current = f"{work}: {size_in_words(*arranged)}", policy_remedy(*arranged)
        return explain_out_of_memory(*self._current)

    def step(self, learning_rate: float) -> Tensor:
        """Clip gradients, update weights, and return the norm before clipping, a scalar on the device.

        If the norm is not finite, which it is on all ranks or on none, no weight has changed.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        with explain_out_of_memory("the optimizer's step", policy_remedy()):
            self._engine.step()
        is_applied = self._engine.was_step_applied()
        self.has_overflowed = not is_applied and self.loss_scale is not None and self.loss_scale.can_fall
        if self.loss_scale is not None:
            self.set_loss_scale(self.loss_scale.after(is_applied=is_applied))
        if not is_applied:
            _drop_gradients(self._engine.optimizer)
            return torch.as_tensor(math.inf, device=self._world.device)
        self._averages.update()
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self._world.device)

    def set_loss_scale(self, scale: LossScale | None) -> None:
        """Scale the next losses by `scale`, which is None unless the model is in fp16; on all ranks alike."""
        self.loss_scale = scale
        if scale is not None:
            self._engine.optimizer.loss_scale = scale.value

    def shards(self) -> ModelSlices:
        """Return this rank's slices of master weights and optimizer states; not collective."""
        slices = self._slices()
        states = STATES_OF_ADAM + bool(self._averages.of_masters)
        return ModelSlices(SHARDS, list(slices), slices.step, states)

    def load_shards(self, folder: Path) -> None:
        """Read what a checkpoint has of `shards`, of any number of ranks, with any kind of parallelism.

        Raises:
            CheckpointError: a file cannot be read, or is not of this model.
        """
        saved = self._world.on_main(lambda: SavedSlices.find(folder, SHARDS))
        slices = self._slices()
        slices.create_states(saved.parts, saved.step)
        self._world.together(lambda: saved.load_into(slices))
        slices.write_to_model()

    def _slices(self) -> OptimizerSlices:
        names = {weight: name for name, weight in self.causal_lm.named_parameters() if weight.requires_grad}
        return OptimizerSlices(self._engine, names, self._world.rank, self._averages.of_masters)

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Return all trained weights by transformers name, in host memory, on rank 0; None on other ranks.

        Without an adapter, buffers and weights that the architecture does not train are among them.
        """
        is_adapted = bool(adapted_layers(self.causal_lm))
        if self._engine.zero_optimization_partition_weights():
            weights = self._engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=is_adapted)
        else:
            weights = _copied_to_host(self._engine.module.state_dict()) if self._world.is_main else None
        if not self._world.is_main:
            return None
        whole = {name.removeprefix("causal_lm."): tensor for name, tensor in weights.items()}
        added = dict(self.causal_lm.named_buffers()) if is_adapted else {}  # by DeepSpeed
        return {name: tensor for name, tensor in whole.items() if name not in added}

    @property
    def causal_lm(self) -> Any:
        """Return the transformers model of the engine; its tensors may be sharded."""
        return self._engine.module.causal_lm

    def free(self) -> None:
        """Release the memory of model, gradients and optimizer; the engine cannot be used afterwards."""
        wait_for_device()
        optimizer = self._engine.optimizer
        self._engine.destroy()
        empty(list(self._averages.of_masters.values()))
        empty(vars(optimizer))
        empty(vars(getattr(optimizer, "optimizer", optimizer)))
        empty_module(self._engine.module)
        del self._engine
        return_memory()


@contextlib.contextmanager
def _generating(model: PackedCausalLM, *, of_base: bool) -> Iterator[Any]:
    with (
        adapter_off(model) if of_base else contextlib.nullcontext(),
        explain_out_of_memory("generating samples", "lower samples.batch_tokens or samples.max_new_tokens"),
        model.unpacked() as causal_lm,
        torch.no_grad(),
    ):
        yield causal_lm


def _drop_gradients(optimizer: Any) -> None:
    """Drop the gradients of a skipped step; with ZeRO-2, bf16 and offload the next ones are added to them."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))


def _copied_to_host(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy each tensor out of DeepSpeed's flat buffers; tied weights stay one tensor."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in weights.values():
        if (tensor.data_ptr(), tensor.shape) not in copies:
            copies[tensor.data_ptr(), tensor.shape] = tensor.detach().to("cpu", copy=True)
    return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in weights.items()}
