"""Load the reference model for scoring (sharded, offloaded or quantized), and look up its log-probs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.config.schema import ModelConfig, Quantization, ReferenceConfig
from dpo_dist.data import Example, ImageProcessor
from dpo_dist.distributed.deepspeed_config import frozen_config, sharded_loading, unsharded_loading
from dpo_dist.distributed.expert_groups import share_experts
from dpo_dist.distributed.processes.failures import is_communication_error
from dpo_dist.distributed.processes.world import World, check_same_code
from dpo_dist.distributed.shard_groups import copy_shards
from dpo_dist.distributed.zero import Engine, FrozenEngine, PolicyEngine
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.exactness import Agree, StartCheck
from dpo_dist.model.files.load import load_packed
from dpo_dist.model.lora import load_adapter
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.reference.digest import ModelFiles
from dpo_dist.reference.store import LogpStore

log = logging.getLogger(__name__)

# How long a rank whose forward failed waits for the other ranks. They fail in the same forward or finish it
# at about the same time; a rank that waits inside the forward for this rank would wait without end.
FAULT_SECONDS = 60.0


def fault_agreement(world: World, key: str = "model.path", *, are_forwards_collective: bool) -> Agree:
    """Return the function by which ranks agree on a model's fault (see `Agree`). Its errors name `key`."""

    def agree(fault: str) -> str:
        if are_forwards_collective and is_communication_error(fault):
            raise RuntimeError(fault)  # not the model's fault: the watcher names the rank that failed
        try:
            world.barrier(FAULT_SECONDS if fault and are_forwards_collective else None)
        except TimeoutError:
            raise ConfigError(
                "the model's forward fails on one rank, and the others wait for it",
                where=key,
                got=f"{world.peers[world.rank]}: {fault}",
                remedy="see the traceback in this rank's log; compare devices and packages of the hosts",
            ) from None
        return next(filter(None, world.gather(fault)), "")

    return agree


def run_start_check(
    engine: Engine,
    max_length: int,
    world: World,
    key: str = "model.path",
    *,
    processor: ImageProcessor | None = None,
    texts: Sequence[Example] = (),
    trains: bool = False,
) -> None:
    """Set the cheapest arrangement in which the model's log-probs are exact (`StartCheck`). Collective.

    If the model `trains`, also check its log-probs in training mode and, with several ranks, that all
    sequences use the same weights. `max_length`: tokens of the longest prompt plus response. `processor`:
    that of a model that reads images. `texts`: examples whose ends a reward model must read. Errors name
    `key`.
    """
    check_same_code(world)
    are_collective = engine.is_synchronised or world.sequence is not None
    agree = fault_agreement(world, key, are_forwards_collective=are_collective)
    world.barrier()  # a rank that starts the check late would count as failed
    was_training = engine.model.training
    engine.model.eval()
    assert processor is not None or engine.model.images is None, "images would not be checked"
    images = () if processor is None else processor.invented
    check = StartCheck(engine.model, engine.token_logps, world.device, max_length, key, agree, images, texts)
    check.choose_arrangement()
    if trains:
        check.check_training()
        if world.size > 1:
            check.check_use()
    engine.model.train(was_training)


def scoring_config(model: ModelConfig, quantization: Quantization | None) -> ModelConfig:
    """Return the settings of `model` without options of training, with this quantization."""
    return replace(
        model,
        gradient_checkpointing="none",
        activation_offload=False,
        adapter=None,
        quantization=quantization,
    )


def load_reference(
    files: ModelFiles,
    model: ModelConfig,
    reference: ReferenceConfig,
    longest: int,
    world: World,
    processor: ImageProcessor | None = None,
) -> Engine:
    """Load the reference with its adapter, in the precision of `model`, the policy's settings; collective.

    `longest`: tokens of the longest prompt with its response. `processor`: of images, if they are read.
    """
    key = "model.path" if reference.path is None else "reference.path"
    adapter = files.adapter
    finish = None if adapter is None else partial(load_adapter, folder=adapter, key="model.adapter.path")
    settings = scoring_config(model, reference.quantization)
    return load_for_scoring(
        files.folder, settings, reference, longest, world, finish, key=key, processor=processor
    )


def load_for_scoring(
    folder: Path,
    model_config: ModelConfig,
    placement: ReferenceConfig,
    longest: int,
    world: World,
    finish: Callable[[PackedCausalLM], None] | None = None,
    *,
    key: str = "model.path",
    processor: ImageProcessor | None = None,
    texts: Sequence[Example] = (),
) -> Engine:
    """Load a model that is only scored, offloaded as `placement` says; collective.

    `finish` changes the loaded model, sharded or not: it adds an adapter or replaces weights. `texts`: as in
    `run_start_check`. Errors name `key`.
    """
    log.info("loading a model to score from %s", folder)

    def load() -> PackedCausalLM:
        model = load_packed(
            folder,
            model_config,
            longest,
            world.device,
            key,
            world.sequence,
            world.share_of_experts,
            seed=None if finish is None else 0,  # what it draws is replaced by `finish`
        )
        copy_shards(model.parameters(), world)
        if finish is not None:
            finish(model)
        return model.requires_grad_(False)

    if model_config.quantization is not None:
        with unsharded_loading(world):  # ZeRO cannot shard it: every rank has the whole model
            model = load().eval()
            share_experts(model, world)
        engine = Engine(model, model)
    else:
        deepspeed_config = frozen_config(placement.offload, model_config.dtype)
        with sharded_loading(world, deepspeed_config):
            model = load()
            share_experts(model, world)
        world.barrier()  # ranks load at different speeds, and a slow one would time out DeepSpeed's next call
        engine = FrozenEngine(model, deepspeed_config)
    run_start_check(engine, longest, world, key, processor=processor, texts=texts)
    return engine


@dataclass(frozen=True)
class ReferenceProvider:
    """Returns the reference's per-token log-probs of a micro-batch; one field is set, none in mode `none`."""

    engine: Engine | None = None  # `live`: a model beside the policy
    policy: PolicyEngine | None = None  # `adapter`: the policy with its adapter switched off
    store: LogpStore | None = None  # `cached`: entries of all batches, looked up by content

    def add_stored_logps(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch with stored log-probs, on the host; unchanged without a store. Thread-safe.

        A dummy batch gets zeros.
        """
        if self.store is None:
            return batch
        if not len(batch.keys):
            return replace(batch, reference_logps=torch.zeros(len(batch.targets)))
        keys = batch.keys_for("reference")
        entries = self.store.read(keys)
        for key, entry, tokens in zip(keys.tolist(), entries, batch.response_lengths, strict=True):
            if len(entry) != tokens:  # two wrong lengths that cancel would shift log-probs between responses
                raise self.store.wrong_entry(key, f"{len(entry)} tokens in place of {tokens}")
        values = np.concatenate(entries)
        scored = values if batch.mask is None else values[batch.mask]
        return replace(batch, reference_logps=torch.from_numpy(scored))

    def token_logps(self, batch: PackedBatch) -> Tensor | None:
        """Return float32 [targets] on the batch's device; None in mode `none`.

        `batch` comes from `add_stored_logps`. Collective if a model computes the log-probs.
        """
        if self.engine is not None:
            return self.engine.token_logps(batch.view("reference"))
        if self.policy is not None:
            return self.policy.scored(batch.view("reference"), without_adapter=True)
        return batch.reference_logps
