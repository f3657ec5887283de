"""Estimate a run's bytes on each device and on disk, from the model's shapes: without weights or a device.

tests/simulated_cuda/test_scaling.py compares bytes on a device with the allocations of a simulated device;
docs/scaling.md has them as a table.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.losses import DistillOptions
from dpo_dist.config.run_folder import checkpoint_folders
from dpo_dist.config.schema import (
    ZERO_STAGES,
    AttentionBackend,
    Dtype,
    ModelConfig,
    Offload,
    OptimConfig,
    OptimizerKind,
    Quantization,
    ReferenceMode,
    RunConfig,
    TeacherMode,
    TrainerConfig,
)
from dpo_dist.distributed.deepspeed_config import SUB_GROUP
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import size
from dpo_dist.model.architectures import describe_reward_model, recorded_arrangement
from dpo_dist.model.attention.kernels import LARGEST_HEAD, choose_backend, layer_heads
from dpo_dist.model.experts import expert_modules, packable
from dpo_dist.model.files.folder import description_folder, start_folder
from dpo_dist.model.files.load import TORCH_DTYPES, load_config, without_weights
from dpo_dist.model.flops import StepFlops, recomputed_share, step_flops, visited_experts
from dpo_dist.model.layers import (
    attention_layers,
    decoder_layers,
    image_parts,
    image_weights,
    layer_values,
    output_layer,
    weights_of,
)
from dpo_dist.model.tiled_mlp import TILE_ROWS, tiled_mlps
from dpo_dist.objective.distillation import sparse_rows
from dpo_dist.objective.token_logps import chunk_bytes
from dpo_dist.training.start.open_run import Run

UPDATE = "gradients of an update, when no activations live"
KEYS_PER_TOKEN = 1.6
"""Most keys that attention keeps per token: responses that share a prompt need more than 1."""
_KEPT_FREE = 0.1
_MOST_TOKENS = 32_768  # more are not faster, and the reference scores several times as many at once
_TOKENS_MULTIPLE = 256  # tokens; micro-batches are a multiple, so that the number is easy to read
GPUS_PER_NODE = 8
PROCESS_BYTES = 1e9
"""Host memory of a process without its model: Python and libraries, 0.84e9 in a run without a GPU."""
_CONTEXT_BYTES = 2e9  # bytes of CUDA and NCCL
_CUDA_BYTES = 0.8e9  # chosen, for one process, which needs no NCCL: kernels and cuBLAS's workspaces
_GATHERED_WEIGHTS = 1e9  # weights that ZeRO-3 gathers at once, or the largest layer if that has more
_STATES_PER_MASTER = 2.0
"""Size of the states of AdamW for a weight that it updates, relative to that weight."""
# In 4 bits, 64 weights share a scale of 8 bits, and 256 scales one of 32 bits.
BYTES_PER_QUANTIZED_WEIGHT = {Quantization.int8: 1.0, Quantization.nf4: 0.5 + (1 + 4 / 256) / 64}
_BYTES_IN_MXFP4 = 17 / 32
_UNEVEN = 2.0  # chosen: tokens of the rank whose experts a router prefers, in shares of the mean
_MLP_GRADIENTS = 4.0  # numbers for each of an MLP's width; see `activation_bytes`
_TRACED_TOKENS = 64, 128  # tokens
_TRACED_ATTENTION = "dpo_dist_trace"


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device: `parts` that do not depend on the micro-batch, and `per_token` of a micro-batch.

    `per_token` is None if it is not known for the model. With tiles, `in_tile` are the bytes per token of the
    first `tile_tokens` only, and `sums` those of the sums over several tiles.
    """

    parts: dict[str, float]
    per_token: float | None
    in_tile: float = 0.0
    tile_tokens: int = 0
    sums: float = 0.0

    def fits(self, tokens: int, memory: float) -> bool:
        """Return whether micro-batches of `tokens` leave a tenth of `memory` bytes free."""
        return self.total_bytes(tokens) <= (1 - _KEPT_FREE) * memory

    def largest_micro_batch(self, memory: float) -> int | None:
        """Return how many tokens fit into nine tenths of `memory` bytes; None if not known."""
        if self.per_token is None:
            return None
        room = (1 - _KEPT_FREE) * memory - self._lasting
        if self.parts.get(UPDATE, 0.0) > room:
            return 0
        tokens = room / (self.per_token + self.in_tile)
        if tokens > self.tile_tokens:
            of_tiles = self.tile_tokens * self.in_tile + self.sums
            tokens = max(self.tile_tokens, (room - of_tiles) / self.per_token)
        return max(0, min(_MOST_TOKENS, int(tokens) // _TOKENS_MULTIPLE * _TOKENS_MULTIPLE))

    @property
    def _lasting(self) -> float:
        return sum(size for name, size in self.parts.items() if name != UPDATE)

    def activations(self, tokens: int) -> float:
        """Return the bytes of a micro-batch's activations, 0 if they are not known."""
        of_tiles = min(tokens, self.tile_tokens) * self.in_tile
        of_tiles += self.sums if tokens > self.tile_tokens else 0.0
        return tokens * (self.per_token or 0.0) + of_tiles

    def total_bytes(self, tokens: int) -> float:
        """Return the bytes of training with micro-batches of `tokens`, as far as they are known."""
        return self._lasting + max(self.parts.get(UPDATE, 0.0), self.activations(tokens))


@dataclass(frozen=True)
class _Counts:
    """Numbers of weights of a model."""

    weights: int
    trained: int
    largest_trained: int
    largest_layer: int
    experts: int
    packed: list[list[int]]  # those in the packed experts of each layer
    quantized: int
    is_expert_adapted: bool
    is_tower_trained: bool


@lru_cache(maxsize=2)  # `plan` estimates many settings of one policy, and its teacher
def _counts(causal_lm: Any) -> _Counts:
    trained = [weight.numel() for weight in causal_lm.parameters() if weight.requires_grad]
    layers = [[*layer.parameters()] for layer in decoder_layers(causal_lm)]
    packed = {*packable(causal_lm).values()}
    return _Counts(
        weights=_count_weights(causal_lm.parameters()),
        trained=sum(trained),
        largest_trained=max(trained, default=0),
        largest_layer=max(map(_count_weights, layers), default=0),
        experts=sum(_count_weights(module.parameters(recurse=False)) for module in expert_modules(causal_lm)),
        packed=[[weight.numel() for weight in layer if weight in packed] for layer in layers],
        quantized=quantized_weights(causal_lm),
        is_expert_adapted=any(
            ".experts" in name and ".lora_" in name for name, _ in causal_lm.named_parameters()
        ),
        is_tower_trained=any(weight.requires_grad for weight in image_weights(causal_lm)),
    )


@lru_cache(maxsize=2)
def _flops(causal_lm: Any) -> StepFlops:
    return step_flops(causal_lm)


@dataclass(frozen=True)
class Shapes:
    """What the shapes of a run's model say of its bytes and FLOPs."""

    config: RunConfig
    causal_lm: Any  # the policy on the meta device; see `policy_without_weights`
    teacher: Any = None  # on the meta device, if the loss has one

    @property
    def is_packed(self) -> bool:
        """Whether the model's responses are packed, so that they can share prefixes."""
        text = self.causal_lm.config.get_text_config()
        return recorded_arrangement(text.model_type) is Arrangement.packed

    @property
    def has_experts(self) -> bool:
        """Whether a token visits some experts of many."""
        return visited_experts(self.causal_lm.config.get_text_config()) > 0

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.causal_lm.config.get_text_config().num_hidden_layers)

    @property
    def weights(self) -> int:
        """All weights."""
        return _counts(self.causal_lm).weights

    @property
    def experts(self) -> int:
        """Weights of experts that processes can share (`parallelism.experts`)."""
        return _counts(self.causal_lm).experts

    @property
    def exchanged(self) -> int:
        """Numbers that a token sends to all its experts of all layers, if they are on other processes."""
        text = self.causal_lm.config.get_text_config()
        return len(expert_modules(self.causal_lm)) * visited_experts(text) * int(text.hidden_size)

    @property
    def trained(self) -> int:
        """Weights that are trained."""
        return _counts(self.causal_lm).trained

    @property
    def largest_trained(self) -> int:
        """Weights in the largest trained tensor."""
        return _counts(self.causal_lm).largest_trained

    @cached_property
    def states(self) -> float:
        """Bytes of a trained weight in a checkpoint: the master weight, if there is one, and its states."""
        return state_bytes(self.config.optim, self.config.trainer)

    @property
    def number(self) -> int:
        """Bytes of a weight that is not quantized."""
        return TORCH_DTYPES[self.config.model.dtype].itemsize

    @property
    def dequantized(self) -> float:
        """Bytes that are moved to dequantize all weights once."""
        kind = self.config.model.quantization
        if kind is None:
            return 0.0
        return (BYTES_PER_QUANTIZED_WEIGHT[kind] + self.number) * _counts(self.causal_lm).quantized

    @property
    def recomputed_share(self) -> float:
        """The FLOPs that gradient checkpointing computes again, as a share of a step's."""
        return recomputed_share(self.config.model)

    def flops(self, tokens: int, targets: int, attended: int, image_tokens: int) -> float:
        """Return the FLOPs of a training step with these counts."""
        return _flops(self.causal_lm).step(tokens, targets, attended, image_tokens)

    def footprint(self, processes: int, memory: float = math.inf) -> Footprint:
        """Return the footprint of each of `processes` that train the model, on GPUs with so many bytes."""
        config = self.config
        causal_lm = self.causal_lm
        number = self.number
        stage = ZERO_STAGES[config.parallelism.kind]
        of_sum = TORCH_DTYPES[config.optim.dtype_of_sums].itemsize
        updates_weights = config.optim.kind is OptimizerKind.adamw_bf16  # no master weights
        of_states = self.states - (number if updates_weights else 0)
        master = of_states if config.parallelism.offload_optimizer is Offload.none else 0.0
        resident = config.parallelism.offload_parameters is Offload.none
        held = _weight_bytes(config.model.quantization, number, causal_lm)
        # In bf16, stage 1 keeps a micro-batch's gradients beside their float32 sum.
        uses_bf16_optimizer = stage == 1 and config.model.dtype is Dtype.bf16 and not updates_weights
        gradients: float = (of_sum + number * uses_bf16_optimizer) * self.trained
        shards = self._shards(processes)
        gradients /= 1 if stage == 1 else shards
        if stage == 2 and shards > 1 and config.optim.dtype_of_sums is Dtype.bf16:
            gradients += number * self.largest_trained  # each that has a part on the rank is whole there
        output = output_layer(causal_lm).weight
        chunks = 0.0 if config.model.gives_scores else 4.1 * chunk_bytes(memory)  # of logits
        head = chunks + (4.0 * output.numel() if output.requires_grad else 0.0)
        gathered = min(max(_GATHERED_WEIGHTS, _counts(causal_lm).largest_layer), self.weights)
        sharing = config.parallelism.experts
        whole = 0.0  # frozen experts are not sharded again
        if sharing > 1 and config.model.adapter is not None:
            whole = self.experts * self._expert_bytes(config.model.quantization)
        parts = {
            "weights": resident * ((held - whole) / (shards if stage == 3 else 1) + whole / sharing),
            "experts of a layer": _unpacked_bytes(config, number, causal_lm) / sharing,
            "gradients": gradients,
            "optimizer states": master * self.trained / shards,
            UPDATE: self._updated_together(shards) if updates_weights else 0.0,
            "gathered weights": number * gathered if stage == 3 and shards > 1 else 0.0,
            # DeepSpeed reduces 5e8 gradients at a time, in a flat float32 copy (2 GB) and its bf16 cast
            # (1 GB).
            "reduction": 3e9 * min(1.0, self.trained / 5e8) if uses_bf16_optimizer and processes > 1 else 0.0,
            "output layer": head,
            **({"CUDA": _CUDA_BYTES} if processes == 1 else {"CUDA and NCCL": _CONTEXT_BYTES}),
        }
        if config.reference.mode is ReferenceMode.live and config.reference.offload is Offload.none:
            bits = config.reference.quantization
            experts = self.experts * self._expert_bytes(bits) if sharing > 1 else 0.0
            others = _weight_bytes(bits, number, causal_lm) - experts
            # ZeRO shards no quantized weights.
            parts["reference"] = others / (shards if bits is None else 1) + experts / sharing
        teacher = config.teacher
        is_beside = teacher.mode is TeacherMode.live and teacher.offload is Offload.none
        if self.teacher is not None and is_beside:
            parts["teacher"] = number * _counts(self.teacher).weights / shards
        if config.loss.options_of(DistillOptions).mix > 0 and (
            self.teacher is not None or (stage == 3 and shards > 1)
        ):
            # Whole for the policy's head, which compares whole distributions.
            parts["teacher's output layer"] = number * output_layer(self.teacher or causal_lm).weight.numel()
        # What a trained tower keeps depends on the share of images in the data.
        checkpointing = config.model.gradient_checkpointing
        uneven = _UNEVEN if sharing > 1 else 1.0
        per_token = None
        if not _counts(causal_lm).is_tower_trained:
            per_token = activation_bytes(causal_lm, checkpointing, uneven)
        if per_token is None:
            return Footprint({name: part for name, part in parts.items() if part}, None)
        ranks = config.parallelism.sequence_parallel
        per_token = (per_token - self.offloaded_inputs) / ranks
        in_tile = 0.0
        sums = 0.0
        mlps = tiled_mlps(causal_lm) if config.model.tiled_mlp else {}
        if len(mlps) == self.layers and checkpointing == "full":
            in_tile = _bytes_in_tile(causal_lm, [*mlps.values()]) / ranks
            trained = (weight for weight in next(iter(mlps.values())).parameters() if weight.requires_grad)
            sums = (4.0 + number) * sum(map(torch.numel, trained))  # in float32, and a tile's own
        footprint = {name: part for name, part in parts.items() if part}
        return Footprint(footprint, per_token - in_tile, in_tile, TILE_ROWS * ranks, sums)

    def _updated_together(self, shards: int) -> float:
        """Return the bytes of the copied gradients of weights that `adamw_bf16` updates together."""
        together = self.trained / shards
        if ZERO_STAGES[self.config.parallelism.kind] == 3:
            together = min(together, max(SUB_GROUP, self.largest_trained / shards))
        return self.number * together

    @property
    def offloaded_inputs(self) -> float:
        """Bytes of a token's inputs of checkpointed layers, all but one of which wait in host memory."""
        if not self.config.model.activation_offload:
            return 0.0
        checkpointed = _checkpointed(self.layers, self.config.model.gradient_checkpointing)
        hidden = int(self.causal_lm.config.get_text_config().hidden_size)
        return float(self.number * hidden * max(0, checkpointed - 1))

    def _expert_bytes(self, quantization: Quantization | None) -> float:
        """Return the bytes of a weight of an expert."""
        if quantization is None:
            return float(self.number)
        if quantization is Quantization.nf4 and _is_mxfp4(self.causal_lm):
            return _BYTES_IN_MXFP4
        return BYTES_PER_QUANTIZED_WEIGHT[quantization]

    def host_bytes(self, gpus: int) -> float:
        """Return the bytes of host memory on rank 0's node, which reads the model and writes checkpoints."""
        on_node = min(gpus, GPUS_PER_NODE)
        whole = float(self.number * self.weights)
        states = self.states
        if self.config.parallelism.offload_optimizer is not Offload.none:
            states += 4  # gradients
        policy = 0.0 if self.config.parallelism.offload_parameters is Offload.none else whole
        shards = self._shards(gpus)
        # Of several copies, one is written to checkpoints.
        saved = min(on_node, shards) * states * self.trained
        return on_node * PROCESS_BYTES + whole + (saved + on_node * policy) / shards

    def _shards(self, processes: int) -> int:
        """Return how many of `processes` have one copy of all states."""
        return self.config.parallelism.shard_size or processes

    def disk_bytes(self) -> dict[str, float]:
        """Return the bytes of a checkpoint, and of the model or the adapter that a run ends with."""
        return disk_bytes(self.config, self.weights, self.trained, self.states)

    @property
    def teacher_bytes(self) -> float:
        """Bytes that the store has of the teacher for each token of a chosen response."""
        if self.teacher is None or self.config.teacher.mode is not TeacherMode.cached:
            return 0.0
        vocabulary = self.teacher.config.get_text_config().vocab_size
        return 4.0 * sparse_rows(self.config.teacher, self.config.loss, vocabulary).width

    def notes(self) -> list[str]:
        """Return lines about weights whose files are quantized."""
        return stored_notes(self.config.model, self.causal_lm)


def policy_without_weights(model: ModelConfig, shape: Mapping[str, Any] | None = None) -> Any:
    """Return the policy on the meta device; with `shape`, values of its config.json, without its files."""
    if shape is not None:
        model_config = AutoConfig.for_model(**shape)
        if model.gives_scores:
            describe_reward_model(model_config, "model.path")
    else:
        folder = description_folder(model.path, model.revision, needs_weights=False)
        model_config = load_config(folder, model)
    return without_weights(model_config, model, start_folder(model))


def teacher_without_weights(config: RunConfig, shape: Mapping[str, Any] | None = None) -> Any:
    """Return the teacher on the meta device, as `policy_without_weights` does; None without a teacher."""
    path = config.teacher.path
    if not config.loss.needs_teacher or path is None:
        return None
    whole = replace(config.model, adapter=None, quantization=None, tiled_mlp=False)
    teacher = replace(whole, path=path, revision=None)
    return policy_without_weights(teacher, shape)


def state_bytes(optim: OptimConfig, trainer: TrainerConfig) -> float:
    """Return the bytes of weight or master weight and states per trained weight, as in a checkpoint."""
    number = 2.0 if optim.kind is OptimizerKind.adamw_bf16 else 4.0
    average = 4.0 if trainer.ema_decay is not None else 0.0
    return number * (1 + _STATES_PER_MASTER) + average


def disk_bytes(config: RunConfig, weights: int, trained: int, states: float) -> dict[str, float]:
    """Return the bytes of a checkpoint, and of the model or the adapter that a run ends with."""
    weights_to_write = weights if config.model.adapter is None else trained
    number = TORCH_DTYPES[config.model.dtype].itemsize
    return {"a checkpoint": states * trained, "the model": float(number * weights_to_write)}


def fit_micro_batches(run: Run, causal_lm: Any) -> None:
    """Print the memory of micro-batches; choose their size if the key is `auto`. Collective."""
    if run.world.device.type != "cuda":
        return
    memory = min(run.world.gather(torch.cuda.mem_get_info()[0]))
    whole = torch.cuda.get_device_properties(run.world.device).total_memory
    teacher = teacher_without_weights(run.config)
    shapes = Shapes(run.config, causal_lm, teacher)
    needs = shapes.footprint(run.world.size, min(run.world.gather(whole)))
    tokens = needs.largest_micro_batch(memory)
    model = run.config.model
    is_sdpa = choose_backend(model.attention, model.dtype, run.world.device) is AttentionBackend.sdpa
    if tokens is None or is_sdpa:
        run.say(
            f"micro-batches: {run.micro_batch_tokens:,} tokens; this model's memory per token is not known"
        )
        return
    if run.config.trainer.micro_batch_tokens == "auto":
        run.micro_batch_tokens = max(tokens, _TOKENS_MULTIPLE)
    longest = max(run.micro_batch_tokens, run.config.data.max_length)
    fit = f"about {size(needs.total_bytes(longest))} of {size(memory)} on each GPU"
    if longest > run.micro_batch_tokens:
        fit += f" for a pair of {longest:,}"
    line = f"micro-batches: up to {run.micro_batch_tokens:,} tokens ({fit})"
    if needs.fits(longest, memory):
        run.note(line)
    else:
        remedy = "`dpo-dist plan` looks for settings that fit"
        run.warn(f"{line}: the longest pair may not fit; {remedy}")


def quantized_weights(causal_lm: Any) -> int:
    """Return the number of weights that are quantized: experts and linear layers of text, no adapter's."""
    linear = set()
    for name, module in causal_lm.named_modules():
        is_of_adapter = ".lora_" in name or ".modules_to_save." in name
        if isinstance(module, nn.Linear) and not is_of_adapter:
            linear.add(module.weight)
    of_images = weights_of(image_parts(causal_lm).values())
    quantized = linear - of_images - {output_layer(causal_lm).weight}
    return sum(map(torch.numel, quantized | {*packable(causal_lm).values()}))


def _unpacked_bytes(config: RunConfig, number: int, causal_lm: Any) -> float:
    """Return the bytes of a layer's packed or adapted experts while it computes, of `number` bytes each."""
    kinds = {config.model.quantization, config.reference.quantization} - {None}
    counts = _counts(causal_lm)
    if not kinds and not counts.is_expert_adapted:
        return 0.0
    # One tensor at a time: in float32, or in the order of the file; an adapter's update and its gradient.
    beside = 4 if Quantization.int8 in kinds else number * (bool(kinds) and _is_mxfp4(causal_lm))
    beside += 2 * number * counts.is_expert_adapted
    return max((number * sum(sizes) + beside * max(sizes) for sizes in counts.packed if sizes), default=0)


def _weight_bytes(quantization: Quantization | None, number: int, causal_lm: Any) -> float:
    """Return the bytes of all weights, of `number` bytes each where they are not quantized."""
    less = 0.0 if quantization is None else number - BYTES_PER_QUANTIZED_WEIGHT[quantization]
    full_bytes = number * _counts(causal_lm).weights - less * _counts(causal_lm).quantized
    if quantization is not Quantization.nf4 or not _is_mxfp4(causal_lm):
        return full_bytes
    return full_bytes + (_BYTES_IN_MXFP4 - BYTES_PER_QUANTIZED_WEIGHT[quantization]) * _packed_weights(
        causal_lm
    )


def _is_mxfp4(causal_lm: Any) -> bool:
    return getattr(causal_lm.config, "stored_as", None) == "mxfp4"


def _packed_weights(causal_lm: Any) -> int:
    return sum(map(torch.numel, packable(causal_lm).values()))


def stored_notes(model: ModelConfig, causal_lm: Any) -> list[str]:
    """Return a line about the bytes of a model whose weight files are quantized."""
    stored = getattr(causal_lm.config, "stored_as", None)
    if stored is None:
        return []
    number = TORCH_DTYPES[model.dtype].itemsize
    if model.quantization is Quantization.nf4 and _is_mxfp4(causal_lm):
        in_files = size(_BYTES_IN_MXFP4 * _packed_weights(causal_lm))
        return [f"the experts stay in the MXFP4 of the weight files, exactly: {in_files}"]
    bits = model.quantization or model.dtype
    in_memory = size(_weight_bytes(model.quantization, number, causal_lm))
    note = f"the weight files are in {stored.upper()}, and the weights {bits} here: {in_memory}"
    if _is_mxfp4(causal_lm) and model.adapter is not None:
        note += "; model.quantization=nf4 keeps the experts in the 4 bits of the files"
    return [note]


def _count_weights(weights: Iterable[torch.Tensor]) -> int:
    return sum(map(torch.numel, weights))


def activation_bytes(causal_lm: Any, checkpointing: str | int, uneven: float = 1.0) -> float | None:
    """Return the bytes per token of a micro-batch in the backward pass; None if not known.

    `uneven`: how many tokens the experts of a rank take in one layer, in shares of the mean over the ranks.

    Counts the tensors that autograd keeps in a forward on the meta device, and those that attention kernels
    keep: queries, keys, values, and sums of scores in float32. The model cannot be used afterwards.
    """
    text = causal_lm.config.get_text_config()
    layers = decoder_layers(causal_lm)
    if recorded_arrangement(text.model_type) is not Arrangement.packed or not layers:
        return None
    traced_bytes = _kept_bytes(causal_lm)
    if traced_bytes is None:
        return None
    number = int(causal_lm.dtype.itemsize)
    hidden = int(text.hidden_size)
    shapes = layer_heads(text)
    attention: float = sum(
        number * (heads.query * heads.dim + KEYS_PER_TOKEN * heads.key * (heads.dim + heads.value_dim))
        + 4 * heads.query
        for heads in shapes
    ) / max(1, len(shapes))
    attention *= attention_layers(text) / len(layers)
    # The trace of all layers less so many times that of one, in bf16: the last norm's input, which is kept in
    # float32, and its result are 3; the rotary angles are the rest, in a shape whose heads are small.
    outside = 3.5 * number * hidden
    layer = (traced_bytes - outside) / len(layers) + attention
    experts = visited_experts(text)
    width = _mlp_width(text)
    # Gradients at the peak, in the backward of a layer's MLP. 4 and 2.5 are how the peak of a Llama in bf16
    # grows with the two widths, on a simulated device; with experts each token is computed by several. In
    # benchmarks/log.md: "Activations traced on the meta device".
    backward = number * (_MLP_GRADIENTS * width * max(1, experts) + (2.5 + 4 * experts) * hidden)
    # The experts of that layer keep three widths and two hidden states of each token.
    backward += (uneven - 1) * number * experts * (7.0 * width + 6.0 * hidden)
    checkpointed = _checkpointed(len(layers), checkpointing)
    if not checkpointed:
        return len(layers) * layer + backward
    return number * hidden * checkpointed + (len(layers) - checkpointed + 1) * layer + backward


def _bytes_in_tile(causal_lm: Any, mlps: Sequence[nn.Module]) -> float:
    """Return the part of `activation_bytes` that is in MLPs: what one keeps, and its gradients."""
    text = causal_lm.config.get_text_config()
    few, many = (sum(_kept_by_mlp(mlp, tokens, causal_lm) for mlp in mlps) for tokens in _TRACED_TOKENS)
    kept: float = (many - few) / (_TRACED_TOKENS[1] - _TRACED_TOKENS[0]) / len(mlps)
    if visited_experts(text):  # the MLPs are dense parts beside experts, whose gradients are the largest
        return kept
    return kept + _MLP_GRADIENTS * int(causal_lm.dtype.itemsize) * _mlp_width(text)


def _kept_by_mlp(mlp: nn.Module, tokens: int, causal_lm: Any) -> int:
    hidden = causal_lm.config.get_text_config().hidden_size
    rows = torch.zeros(tokens, hidden, dtype=causal_lm.dtype, device="meta", requires_grad=True)
    return _kept_in(lambda: mlp(rows), [*mlp.parameters(), rows])


def _mlp_width(text: Any) -> int:
    """Return the width of an MLP, or of an expert of a mixture."""
    names = ("moe_intermediate_size", "intermediate_size")[0 if visited_experts(text) else 1 :]
    widths = (max(filter(None, layer_values(text, name)), default=0) for name in names)
    return int(next(filter(None, widths), 4 * text.hidden_size))


def _checkpointed(layers: int, checkpointing: str | int) -> int:
    """Return how many of so many layers keep their input only."""
    if checkpointing == "none":
        return 0
    return layers if checkpointing == "full" else layers // int(checkpointing)


@lru_cache(maxsize=1)  # `plan` tries several kinds of checkpointing of one model
def _kept_bytes(causal_lm: Any) -> float | None:
    """Return the bytes that autograd keeps per token in a forward of all layers, attention excluded."""
    causal_lm.train().to(causal_lm.dtype)  # peft leaves an adapter in float32 on the meta device
    causal_lm.set_attn_implementation(_TRACED_ATTENTION)
    for layer in decoder_layers(causal_lm):
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    few, many = (_traced_bytes(causal_lm, tokens) for tokens in _TRACED_TOKENS)
    return None if few is None or many is None else (many - few) / (_TRACED_TOKENS[1] - _TRACED_TOKENS[0])


def _traced_bytes(causal_lm: Any, tokens: int) -> int | None:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")

    def compute() -> None:
        causal_lm.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    try:
        return _kept_in(compute, [*causal_lm.parameters(), *causal_lm.buffers()])
    except Exception:  # code of an architecture may read values, which the meta device lacks
        return None


def _kept_in(compute: Callable[[], Any], others: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the tensors that autograd keeps in `compute`, without those of `others`."""
    of_others = {tensor.untyped_storage()._cdata for tensor in others}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in of_others:
            storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(storage.nbytes() for storage in storages.values())


def _attend(_: Any, query: torch.Tensor, *__: Any, **options: Any) -> tuple[torch.Tensor, None]:
    if query.shape[-1] > LARGEST_HEAD or any(options.get(name) is not None for name in ("s_aux", "softcap")):
        raise NotImplementedError("this layer may run on SDPA, which keeps more")
    return query.transpose(1, 2).contiguous(), None


AttentionInterface.register(_TRACED_ATTENTION, _attend)
AttentionMaskInterface.register(_TRACED_ATTENTION, lambda *_, **__: None)


def check_disk_room(run: Run, weights: int, done: int, steps: int) -> None:
    """Check that the disk has room for the checkpoints and the model of a run of `steps`.

    Skips adapters, which are small, and file systems that report no size. `done`: steps before this start.
    """
    config = run.config
    folder = run.folder
    trainer = run.config.trainer
    disk = shutil.disk_usage(folder.path)
    if config.model.adapter is not None or not disk.total:
        return
    states = state_bytes(config.optim, trainer)
    checkpoint, model = map(int, disk_bytes(config, weights, weights, states).values())
    # A new checkpoint is complete before an older one is deleted; the model, which is smaller, comes last.
    existing = len(checkpoint_folders(folder.checkpoints))
    spare = max(1, trainer.keep_last) + bool(trainer.keep_best) - existing
    intervals = trainer.save_every, trainer.eval_every if trainer.keep_best else 0
    saved_steps = sum((steps - 1) // each - done // each for each in intervals if each)
    saves = 1 + saved_steps if done < steps else 0
    at_once = min(saves, max(1, spare + 1))
    needed = at_once * checkpoint + (model if at_once <= spare or not saves else 0)
    if needed > disk.free:
        raise ConfigError(
            "the disk has no room for the checkpoints and the model of this run",
            where="run.dir",
            got=f"{size(disk.free)} free on the file system of {folder}",
            expected=f"{size(needed)}: up to {at_once} more checkpoints of {size(checkpoint)}, a model of "
            f"{size(model)}",
            remedy="make room, set run.dir to another disk, or lower trainer.keep_last",
        )
