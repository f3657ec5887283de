"""DeepSpeed's ZeRO engines: the policy, and a sharded model that is only scored."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.config.schema import FusedLayers, ModelConfig, OptimConfig, OptimizerKind
from dpo_dist.distributed.adamw_bf16 import AdamWBF16
from dpo_dist.distributed.checkpoint.saver import SavedSlices
from dpo_dist.distributed.checkpoint.slices import SHARDS, ModelSlices, OptimizerSlices
from dpo_dist.distributed.deepspeed_config import START, communication
from dpo_dist.distributed.deepspeed_internals import (
    LeafGradients,
    drop_gradients,
    flat_masters,
    gathered_once,
    inner_optimizer,
    join_masters,
    optimizer_tensors,
    record_gather_orders,
    reduce_in_optimizer_only,
    restore_linear,
    set_learning_rate,
    set_loss_scale,
    shard_of,
    whole_numel,
    write_masters_to_model,
)
from dpo_dist.distributed.expert_groups import share_experts
from dpo_dist.distributed.memory import (
    REFERENCE_REMEDY,
    empty,
    explain_out_of_memory,
    free_memory,
    return_memory,
    wait_for_device,
)
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.shard_groups import copy_shards, sum_over_groups
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import first_few
from dpo_dist.model.files.load import check_has_score, load_packed
from dpo_dist.model.layers import (
    decoder_layers,
    join_gradients,
    output_layer,
    partly_used_blocks,
    shared_weights,
    without_gradient,
)
from dpo_dist.model.library_internals import shards_loading, whole_shape
from dpo_dist.model.lora import adapter_off, add_adapter
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.objective.token_logps import Statistic


def mark_zero3_leaves(model: PackedCausalLM) -> None:
    """Mark the modules whose weights ZeRO-3 gathers together and whose gradients it reduces together.

    Decoder layers are marked because fewer and larger messages are faster, and compiled code has no hooks.
    Modules that may use only some of their weights are marked because a rank that skips a part would not
    gather it, and the other ranks would wait. No module is marked that shares weights with another (Zamba):
    ZeRO-3 would reduce the shared gradients after the backward of one of them.
    """
    shared = shared_weights(model.causal_lm)
    for module in (*partly_used_blocks(model.causal_lm), *decoder_layers(model.causal_lm)):
        if shared.isdisjoint(module.parameters()):
            set_z3_leaf_module(module, True)


class Engine:
    """A model that scores micro-batches, sharded by DeepSpeed or not."""

    def __init__(self, model: PackedCausalLM, engine: Any):
        self.model = model
        self._engine = engine

    @property
    def _shards_weights(self) -> bool:
        # A model that is only scored may be no engine of DeepSpeed.
        shards = getattr(self._engine, "zero_optimization_partition_weights", None)
        return shards is not None and bool(shards())

    @property
    def is_synchronised(self) -> bool:
        """Whether each forward is collective: weights are gathered, or tokens exchanged."""
        return dist.get_world_size() > 1 and (self._shards_weights or self.model.exchanges_tokens)

    @property
    def causal_lm(self) -> Any:
        """Return the transformers model of the engine; its tensors may be sharded."""
        return self.model.causal_lm

    @torch.no_grad()
    def token_logps(self, batch: PackedBatch, statistics: Sequence[Statistic] = ()) -> Tensor:
        """Return log-probs of every target, float32 [targets]; with statistics [1 + n, targets]."""
        size = batch.size_in_words(self.model.arrangement)
        with explain_out_of_memory(f"scoring {size}", REFERENCE_REMEDY):
            logps: Tensor = self._engine(batch, tuple(statistics))
        return logps

    @torch.no_grad()
    def logits_of_states(self, *, without_adapter: bool = False) -> Callable[[Tensor], Tensor]:
        """Return `PackedCausalLM.logits_of_states` of the weights as they are now; collective if sharded.

        `without_adapter`: by the base's output layer, of which an adapter may train a copy.
        """
        with adapter_off(self.model) if without_adapter else contextlib.nullcontext():
            return self._logits_of_states()

    def _logits_of_states(self) -> Callable[[Tensor], Tensor]:
        head = output_layer(self.causal_lm)
        with deepspeed.zero.GatheredParameters([*head.parameters()], enabled=self._shards_weights):
            return self.model.logits_of_states(copied=self._shards_weights)

    @contextlib.contextmanager
    def ready_to_generate(self, *, without_adapter: bool = False) -> Iterator[Any]:
        """Yield the transformers model ready for generation; with `without_adapter`, without its adapter.

        The block does not change training. If `is_synchronised`, all ranks must make the same number of
        forwards in the block, and sharded weights are gathered once if they fit into memory.
        """
        was_training = self._engine.training
        self._engine.eval()
        try:
            with (
                adapter_off(self.model) if without_adapter else contextlib.nullcontext(),
                explain_out_of_memory("generating samples", "lower sampling.max_new_tokens"),
                self.model.unpacked() as causal_lm,
                torch.no_grad(),
                self._gathered_once(),
            ):
                yield causal_lm
        finally:
            self._engine.train(was_training)

    def _gathered_once(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def free(self) -> None:
        """Release the memory of the model; it cannot be used afterwards."""
        del self.model, self._engine
        return_memory()


class FrozenEngine(Engine):
    """Sharded model that is only scored."""

    def __init__(self, model: PackedCausalLM, deepspeed_config: dict[str, Any]):
        model.requires_grad_(False)
        mark_zero3_leaves(model)
        deepspeed_config["zero_optimization"].update(communication(3, model.hidden_size, trains=False))
        engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config)
        engine.eval()
        super().__init__(model, engine)
        if self._shards_weights:
            record_gather_orders(engine)

    def free(self) -> None:
        """Release the memory of the model; it cannot be used afterwards."""
        wait_for_device()
        self._engine.destroy()
        _empty_module(self.model)
        del self._engine
        if not shards_loading():  # the policy is not sharded
            restore_linear()
        return_memory()


def _empty_module(module: nn.Module) -> None:
    """Release the storage of weights, their shards and gradients, and of buffers."""
    empty([(weight, weight.grad, shard_of(weight)) for weight in module.parameters()])
    empty(list(module.buffers()))


_LOWEST = 1.0
_STEPS_TO_DOUBLE = 1000


@dataclass(frozen=True)
class LossScale:
    """The factor of the loss in fp16, a power of two, and the updates since its last change."""

    value: float = START
    applied: int = 0

    def after(self, *, is_applied: bool) -> "LossScale":
        """Return the next step's scale: half after an overflow, double after 1,000 without one."""
        if not is_applied:
            return LossScale(max(_LOWEST, self.value / 2))
        if self.applied + 1 == _STEPS_TO_DOUBLE:
            return LossScale(self.value * 2)
        return LossScale(self.value, self.applied + 1)


def load_to_train(
    folder: Path, model: ModelConfig, longest: int, world: World, seed: int, adapter: Path | None = None
) -> PackedCausalLM:
    """Return a model with its adapter, in the groups of `world`; collective.

    `adapter`: the folder of an adapter that is continued; a new one is drawn by `seed`, and so is the output
    layer of a reward model that starts from a causal model.
    """
    if model.gives_scores and adapter is not None:
        check_has_score(folder, adapter, "model.adapter.path")
    packed = load_packed(
        folder, model, longest, world.device, sequence=world.sequence, share=world.share_of_experts, seed=seed
    )
    copy_shards(packed.parameters(), world)
    if model.adapter is not None:
        add_adapter(packed, model, seed, adapter)
    share_experts(packed, world)
    return packed


ADAM_EPS = 1e-8
"""Added to the root of the second moment."""


def create_optimizer(model: PackedCausalLM, optim: OptimConfig, seed: int) -> torch.optim.Optimizer:
    """Return the optimizer of the trained weights; with offload, Accelerate puts CPU Adam in its place.

    Decayed are all but biases and norms; and weights without a gradient, such as a vision tower's, are not,
    so that they do not change. `seed`: of the chance by which `adamw_bf16` rounds.
    """
    unmoved = without_gradient(model.causal_lm)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    undecayed = {weight for weight in trained if len(whole_shape(weight)) <= 1} | unmoved
    parts = [
        ([weight for weight in trained if weight not in undecayed], optim.weight_decay),
        ([weight for weight in trained if weight in undecayed], 0.0),
    ]
    groups = [{"params": weights, "weight_decay": decay} for weights, decay in parts if weights]
    betas = (optim.betas[0], optim.betas[1])
    if optim.kind is OptimizerKind.adamw_bf16:
        compiles = model.fused is FusedLayers.compile
        return AdamWBF16(groups, optim.lr, betas, ADAM_EPS, seed, compiles)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=ADAM_EPS, fused=True)


class PolicyEngine(Engine):
    """The trained model: forward, accumulated backward, optimizer step. Methods are collective.

    `seed`: of the chance by which `adamw_bf16` rounds.
    `loss_scale` is used in the next step; None without fp16. `has_overflowed` says that the last step was not
    applied, and that a smaller loss scale may help.
    """

    def __init__(
        self,
        model: PackedCausalLM,
        optim: OptimConfig,
        world: World,
        ema_decay: float | None = None,
        seed: int = 0,
    ):
        zero = world.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero.update(communication(zero["stage"], model.hidden_size))
        mark_zero3_leaves(model)
        if zero["stage"] < 3:
            # ZeRO-3 joins the gradients of a leaf itself; the aliases would keep the leaf's weights gathered.
            for module in partly_used_blocks(model.causal_lm):
                join_gradients(module)
        world.barrier()  # ranks load at unequal speed, and DeepSpeed's calls would time out
        engine, _ = world.accelerator.prepare(model, create_optimizer(model, optim, seed))
        if world.size == 1:
            reduce_in_optimizer_only(engine)
        super().__init__(model, engine)
        inner = inner_optimizer(engine)
        if isinstance(inner, AdamWBF16):
            join_masters(engine)
            inner.names = self._trained_names()
            inner.ranges = dict(flat_masters(engine))
        self._world = world
        self._seed = seed
        self._current = ""
        self._leaf_gradients = None
        if self._shards_weights:
            record_gather_orders(engine)
            self._leaf_gradients = LeafGradients(engine)
        self._lost: set[nn.Parameter] = set()
        self.loss_scale = LossScale() if self._engine.fp16_enabled() else None
        self.has_overflowed = False
        self._averages: dict[Tensor, Tensor] = {}  # moving averages, by flat master tensor
        self._ema_decay = ema_decay
        if ema_decay is not None:
            self._averages = {master: master.detach().float().clone() for master in self._slices().masters()}

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def token_logps(self, batch: PackedBatch, statistics: Sequence[Statistic] = ()) -> Tensor:
        """Return log-probs of every target, float32 [targets]; with statistics [1 + n, targets]."""
        logps: Tensor = self._forward(batch, statistics)
        return logps

    def routed_token_logps(
        self, batch: PackedBatch, statistics: Sequence[Statistic] = ()
    ) -> tuple[Tensor, Tensor]:
        """Return `token_logps` and `router.routing_sums` of a mixture of experts."""
        logps, sums = self._forward(batch, statistics, with_routing=True)
        return logps, sums

    def _forward(self, batch: PackedBatch, statistics: Sequence[Statistic], **options: bool) -> Any:
        """Run the forward; out-of-memory errors in it and in the next backward name `batch`."""
        work = "a micro-batch" if self._engine.training else "scoring"
        self._current = f"{work}: {batch.size_in_words(self.model.arrangement)}"
        with explain_out_of_memory(self._current):
            return self._engine(batch, tuple(statistics), **options)

    def _gathered_once(self) -> contextlib.AbstractContextManager[None]:
        if not self.is_synchronised or not self._shards_weights:
            return contextlib.nullcontext()
        # If all weights fit into half of the free memory of every rank.
        size = sum(whole_numel(weight) * weight.element_size() for weight in self.model.parameters())
        if self._world.agree(2 * size > free_memory(self._world.device, self._world.size)):
            return contextlib.nullcontext()
        return gathered_once(self._engine)

    @torch.no_grad()
    def scored(
        self, batch: PackedBatch, statistics: Sequence[Statistic] = (), *, without_adapter: bool = False
    ) -> Tensor:
        """Return `token_logps` without gradients; with `without_adapter`, of the base model."""
        with adapter_off(self.model) if without_adapter else contextlib.nullcontext():
            return self.token_logps(batch, statistics)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradients of this rank's sum of losses; `is_last` ends the step's accumulation.

        DeepSpeed averages gradients over ranks, so the loss is multiplied by the world size to get the sum.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        with explain_out_of_memory(self._current):
            self._engine.backward(loss * self._world.size)
        if is_last:
            sum_over_groups(self._engine, self._world)
        if self._leaf_gradients is not None:
            self._lost |= self._leaf_gradients.drop_lost()

    @property
    def has_lost_gradients(self) -> bool:
        """Whether ZeRO-3 left gradients of this rank out of an update."""
        return bool(self._lost)

    def check_gradients(self) -> None:
        """Raise an error if a rank `has_lost_gradients`."""
        self._world.together(self._check_own_gradients)

    def _check_own_gradients(self) -> None:
        if not self._lost:
            return
        names = [name for name, weight in self.causal_lm.named_parameters() if weight in self._lost]
        raise ConfigError(
            "ZeRO-3 does not train all weights of this model: it reduces gradients before they are complete",
            where="parallelism.kind",
            got=f"zero3, and the gradients of {first_few(names)} came too late",
            remedy="set parallelism=zero2 or ddp",
        )

    def step(self, learning_rate: float) -> Tensor:
        """Clip gradients, update weights, and return the norm before clipping, a scalar on the device.

        If the norm is not finite, no weight has changed; all ranks agree on this.
        """
        set_learning_rate(self._engine, learning_rate)
        with explain_out_of_memory("the optimizer's step"):
            self._engine.step()
        is_applied = self._engine.was_step_applied()
        self.has_overflowed = False
        if self.loss_scale is not None:
            self.has_overflowed = not is_applied and self.loss_scale.value > _LOWEST
            self.set_loss_scale(self.loss_scale.after(is_applied=is_applied))
        if not is_applied:
            drop_gradients(self._engine)
            return torch.as_tensor(math.inf, device=self._world.device)
        # In float32: in 16 bits a change of a thousandth would round to none.
        for master, average in self._averages.items():
            average.lerp_(master.detach().float(), 1 - (self._ema_decay or 0.0))
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self._world.device)

    def set_loss_scale(self, scale: LossScale | None) -> None:
        """Scale the next losses by `scale`, the same on all ranks; None if the model is not in fp16."""
        self.loss_scale = scale
        if scale is not None:
            set_loss_scale(self._engine, scale.value)

    def shards(self) -> ModelSlices:
        """Return this rank's slices of master weights and optimizer states; not collective."""
        slices = self._slices()
        return ModelSlices(SHARDS, list(slices) if self._world.writes_shards else [], slices.step)

    def load_shards(self, folder: Path) -> None:
        """Load the shards from a checkpoint that any number of ranks wrote, with any kind of parallelism."""
        saved = self._world.on_main(lambda: SavedSlices.find(folder, SHARDS))
        slices = self._slices()
        slices.create_states(saved.parts, saved.step)
        self._world.together(lambda: saved.load_into(slices, self._seed))
        write_masters_to_model(self._engine)

    def _trained_names(self) -> dict[nn.Parameter, str]:
        return {weight: name for name, weight in self.causal_lm.named_parameters() if weight.requires_grad}

    def _slices(self) -> OptimizerSlices:
        return OptimizerSlices(self._engine, self._trained_names(), self._averages)

    def free(self) -> None:
        """Release the memory of model, gradients and optimizer; the engine cannot be used afterwards."""
        wait_for_device()
        tensors = optimizer_tensors(self._engine)
        self._engine.destroy()
        empty([*self._averages.values(), *tensors])
        _empty_module(self.model)
        del self._engine
        return_memory()
