"""The trained weights of an engine in one place, and a model folder of them."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.files.save import write_adapter, write_weights
from dpo_dist.model.lora import adapted_layers
from tests.support import tiny


def whole_weights(policy: PolicyEngine) -> dict[str, Tensor] | None:
    """All trained weights by transformers name on rank 0, None on the others; collective."""
    is_adapted = bool(adapted_layers(policy.causal_lm))
    if policy._shards_weights:
        weights = policy._engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=is_adapted)
    else:
        parameters = policy._engine.module.named_parameters()
        trained = {name for name, parameter in parameters if parameter.requires_grad}
        weights, copies = policy._engine.module.state_dict(), {}
        for weight in weights.values():  # out of DeepSpeed's flat buffers; tied weights stay one tensor
            copies.setdefault((weight.data_ptr(), weight.shape), weight.detach().to("cpu", copy=True))
        weights = {
            name: copies[weight.data_ptr(), weight.shape]
            for name, weight in weights.items()
            if name in trained or not is_adapted
        }
    if not policy._world.is_main:
        return None
    added = dict(policy.causal_lm.named_buffers()) if is_adapted else {}  # by DeepSpeed
    whole = {name.removeprefix("causal_lm."): weight for name, weight in weights.items()}
    return {name: weight for name, weight in whole.items() if name not in added}


def write_trained(causal_lm: Any, weights: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True)
    if adapted_layers(causal_lm):
        dtype = next(iter(weights.values())).dtype
        write_adapter(folder, causal_lm, weights, dtype)
    else:
        write_weights(folder, causal_lm, weights)
    tiny.qwen().save_pretrained(folder)


def write_model(policy: PolicyEngine, folder: Path, world: World) -> None:
    weights = whole_weights(policy)
    if weights is not None:
        write_trained(policy.causal_lm, weights, folder)
    world.barrier()
