"""The reference model, loaded to score: sharded, offloaded where wanted, and freed when done."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import ModelConfig, RunConfig
from dpo_dist.data.packing import PackedBatch
from dpo_dist.distributed.deepspeed_config import frozen_config, with_layer_prefetch, with_nvme
from dpo_dist.distributed.device_memory import return_memory
from dpo_dist.distributed.engine import FrozenEngine, sharded_loading, whole_loading
from dpo_dist.distributed.nvme import own_folder
from dpo_dist.distributed.world import World
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.load import load_config, load_packed
from dpo_dist.reference.digest import ModelFiles

log = logging.getLogger(__name__)

# With h the hidden size, training keeps some 63 h bytes of activations for each token and layer (measured;
# arXiv:2205.05198 counts 34 h), or 2 h and one layer's 63 h with gradient checkpointing; scoring has one
# layer's only. At 28 layers four times the tokens then take a seventh of the memory; or twice as much with
# checkpointing, where gradients and optimizer states, which are not there yet, leave room for it.
_SCORING_TOKENS_FACTOR = 4


def scoring_tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch that is only scored: `reference.micro_batch_tokens`, or by the trainer's."""
    return config.reference.micro_batch_tokens or _SCORING_TOKENS_FACTOR * config.trainer.micro_batch_tokens


class QuantizedReference:
    """A quantized model, which no engine can shard: whole on every rank."""

    def __init__(self, model: PackedCausalLM):
        self._model = model.eval()

    @torch.no_grad()
    def token_logps(self, batch: PackedBatch) -> Tensor:
        """float32 [targets]; not collective."""
        logps: Tensor = self._model(batch)
        return logps

    def free(self) -> None:
        """Give its memory back."""
        del self._model
        return_memory()


ReferenceEngine = FrozenEngine | QuantizedReference


def scored_model(config: RunConfig) -> ModelConfig:
    """How the reference is loaded: as the policy, but for what only training needs, and its quantization."""
    return replace(
        config.model,
        gradient_checkpointing="none",
        adapter=None,
        quantization=config.reference.quantization,
    )


def load_reference(folder: Path, config: RunConfig, world: World) -> ReferenceEngine:
    """The reference model of `folder` beside the policy, in the policy's precision unless it is quantized.

    Collective.
    """
    log.info("loading the reference from %s", folder)
    model_config = scored_model(config)
    if model_config.quantization is not None:
        with whole_loading(world):
            return QuantizedReference(load_packed(folder, model_config, config.data.max_length, world.device))
    return _load_sharded(folder, model_config, config, world)


def load_digested(files: ModelFiles, config: RunConfig, world: World) -> ReferenceEngine:
    """Load the reference whose `files` were digested, and check that it was still these; collective.

    Raises:
        ReferenceModelError: a file has changed since it was digested.
    """
    engine = load_reference(files.folder, config, world)
    world.together(files.check_unchanged)
    return engine


def _load_sharded(folder: Path, model_config: ModelConfig, config: RunConfig, world: World) -> FrozenEngine:
    placement = config.reference
    deepspeed_config, own = frozen_config(placement.offload, config.model.dtype), None
    if placement.nvme_path is not None:
        own = own_folder(placement.nvme_path, world)
        largest_shard = math.ceil(_largest_weight(folder, model_config, world) / world.size)
        deepspeed_config = with_nvme(deepspeed_config, own, largest_shard)
    with sharded_loading(world, deepspeed_config):
        model = load_packed(folder, model_config, config.data.max_length, world.device)
    hidden_size = model.causal_lm.config.hidden_size
    return FrozenEngine(model, with_layer_prefetch(deepspeed_config, hidden_size), own)


def _largest_weight(folder: Path, config: ModelConfig, world: World) -> int:
    """Elements of the model's largest weight, none of which is read for it."""
    with whole_loading(world), torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            load_config(folder, config), trust_remote_code=config.trust_remote_code
        )
    sizes: list[int] = [weight.numel() for weight in causal_lm.parameters()]
    return max(sizes)
