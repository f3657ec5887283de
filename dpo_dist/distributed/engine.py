"""DeepSpeed ZeRO engines of the policy and of a sharded model that is only scored."""

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from torch import Tensor, nn
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
)

from dpo_dist.config.schema import OptimConfig
from dpo_dist.data.packing import PackedBatch
from dpo_dist.distributed.checkpoint_manifest import recorded_writes
from dpo_dist.distributed.deepspeed_config import policy_communication
from dpo_dist.distributed.device_memory import (
    describe_batch,
    explain_out_of_memory,
    policy_remedy,
    reference_remedy,
    return_memory,
)
from dpo_dist.distributed.gather_order import keep_gather_orders
from dpo_dist.distributed.whole_weights import whole_weights
from dpo_dist.distributed.world import World
from dpo_dist.model.adapters import adapted_layers, adapter_off
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.layers import decoder_layers


def whole_loading(world: World) -> contextlib.AbstractContextManager[None]:
    """Within it, transformers loads and makes whole weights, whatever the policy's configuration says."""
    return sharded_loading(world, {"zero_optimization": {"stage": 0}})


@contextlib.contextmanager
def sharded_loading(world: World, deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Within it, transformers loads weights as this configuration shards them, not as the policy's does."""
    inner = HfDeepSpeedConfig(deepspeed_config)  # held: transformers keeps a weak reference
    try:
        yield
    finally:
        del inner
        set_hf_deepspeed_config(world.accelerator.state.deepspeed_plugin.dschf)


class FrozenEngine:
    """A sharded model that is only scored; `folder` is where its weights lie on NVMe."""

    def __init__(self, model: PackedCausalLM, deepspeed_config: dict[str, Any], folder: Path | None = None):
        self._folder = folder
        model.requires_grad_(False)
        _gather_whole_layers(model)
        self._engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config)
        self._engine.eval()

    @torch.no_grad()
    def token_logps(self, batch: PackedBatch) -> Tensor:
        """float32 [targets]; collective under ZeRO-3."""
        with explain_out_of_memory(f"scoring {describe_batch(batch)}", reference_remedy()):
            logps: Tensor = self._engine(batch)
        return logps

    @property
    def causal_lm(self) -> Any:
        """The transformers model inside; its tensors are sharded."""
        return self._engine.module.causal_lm

    def free(self) -> None:
        """Give its memory back."""
        self._engine.destroy()
        # DeepSpeed's own lists and caches go on referring to the modules, so their tensors are emptied.
        for weight in self._engine.module.parameters():
            weight.ds_tensor.data = weight.data = weight.new_empty(0)
            if weight.nvme_swapper is not None:
                weight.nvme_swapper.buffers = None
        for buffer in self._engine.module.buffers():
            buffer.data = buffer.new_empty(0)
        del self._engine
        # Loading replaced it for the whole process, which would change the digits of a policy that is whole.
        if not is_deepspeed_zero3_enabled():
            torch.nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        return_memory()


class PolicyEngine:
    """The trained model: forward, accumulated backward, and the optimizer step. Methods are collective."""

    def __init__(self, model: PackedCausalLM, optim: OptimConfig, world: World):
        # Where the optimizer is offloaded, Accelerate puts DeepSpeed's CPU Adam in its place.
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, optim.weight_decay),
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            fused=True,
        )
        self._world = world
        zero = world.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero.update(policy_communication(zero["stage"], model.causal_lm.config.hidden_size))
        _gather_whole_layers(model)
        self._engine, _ = world.accelerator.prepare(model, optimizer)
        self._backwards, self._current = 0, ("", "")
        keep_gather_orders(self._engine)

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def token_logps(self, batch: PackedBatch, with_collisions: bool = False) -> Tensor:
        """Return log-probs of every target, float32 [targets]; with collisions [2, targets] (`LogpHead`)."""
        with self._naming(batch):
            logps: Tensor = self._engine(batch, with_collisions)
        return logps

    @torch.no_grad()
    def base_token_logps(self, batch: PackedBatch) -> Tensor:
        """float32 [targets] of the model with its adapter off."""
        with adapter_off(self._engine.module):
            return self.token_logps(batch)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients of a local sum of losses; `is_last` ends the step's accumulation.

        DeepSpeed averages gradients over ranks, so the sum over ranks needs the factor world size.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        with explain_out_of_memory(*self._current):
            self._engine.backward(loss * self._world.size)
        self._backwards = 0 if is_last else self._backwards + 1

    def _naming(self, batch: PackedBatch) -> contextlib.AbstractContextManager[None]:
        """Within it, and in the backward that follows, running out of GPU memory is reported with `batch`."""
        work = f"micro-batch {self._backwards + 1} of a step" if self._engine.training else "scoring"
        self._current = f"{work}: {describe_batch(batch)}", policy_remedy(batch)
        return explain_out_of_memory(*self._current)

    def step(self, learning_rate: float) -> Tensor:
        """Clip and update; returns the gradient norm before clipping, a scalar on the device.

        A norm that is not finite is the same on every rank, and then no weight has changed.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        with explain_out_of_memory("the optimizer's step", policy_remedy()):
            self._engine.step()
        norm = self._engine.get_global_grad_norm() if self._engine.was_step_applied() else math.inf
        return torch.as_tensor(norm, device=self._world.device)

    def save_shards(self, folder: str) -> list[Path]:
        """Write weights, master weights and optimizer states, every rank its own; returns this rank's files.

        Raises:
            OSError: this rank cannot write its own; the others go on.
        """
        try:
            with recorded_writes(self._engine.checkpoint_engine) as written:
                options = {"save_latest": False, "exclude_frozen_parameters": True}
                self._engine.save_checkpoint(folder, tag="engine", **options)
        except (OSError, RuntimeError) as error:  # PyTorch tells of a full disk by a RuntimeError
            # The other ranks, done with theirs, are in the collective calls that end DeepSpeed's saving: join
            # them. If it was a rank's death that failed here, it fails again.
            if hasattr(self._engine.optimizer, "checkpoint_event_epilogue"):
                self._engine.optimizer.checkpoint_event_epilogue()
            dist.barrier()
            raise OSError(str(error)) from error
        scripts = Path(folder).glob("*.py") if self._world.is_main else ()  # DeepSpeed's, to convert shards
        return [*written, *scripts]

    def load_shards(self, folder: str) -> None:
        """Read what `save_shards` wrote on the same number of ranks."""
        self._engine.load_checkpoint(
            folder,
            tag="engine",
            load_module_strict=not adapted_layers(self._engine.module),
            load_lr_scheduler_states=False,
        )

    def whole_weights(self) -> dict[str, Tensor] | None:
        """All trained weights under their transformers names, on rank 0's host memory; None elsewhere."""
        weights = whole_weights(self._engine, self._world.is_main)
        return weights and {name.removeprefix("causal_lm."): tensor for name, tensor in weights.items()}

    @property
    def causal_lm(self) -> Any:
        """The transformers model inside; its tensors may be sharded."""
        return self._engine.module.causal_lm


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms do not; under ZeRO-3 only `ds_shape` still knows which is which."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        (matrices if dimensions > 1 else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _gather_whole_layers(model: PackedCausalLM) -> None:
    """Have ZeRO-3 gather the weights of a compiled layer at once: its hooks then lie outside of the code."""
    if model.compiled:
        deepspeed.utils.set_z3_leaf_modules(model, list({type(layer) for layer in decoder_layers(model)}))
