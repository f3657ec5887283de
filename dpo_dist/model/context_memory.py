"""Memory and FLOPs of full training on long sequences, by formulas: what docs/long_context.md plans with.

Bytes are of bf16 weights and activations under ZeRO-3 with `model.gradient_checkpointing=full`, for decoder
layers with RMS norms and a gated MLP, and pairs whose tokens are mostly a shared prompt.
"""

from dataclasses import dataclass

_STATES_OF_A_WEIGHT = 18
"""bf16 weight, float32 gradient, master weight and two moments."""
_FIXED = 8_400_000_000
"""Gathered weights, logits of a chunk, CUDA and NCCL (docs/scaling.md)."""
_FORWARDS = 4
"""Forward, recomputation, and twice as much for gradients of inputs and weights."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        layers: number of decoder layers.
        hidden: width of the hidden state.
        heads: query heads of a layer.
        kv_heads: key heads of a layer.
        head_dim: width of a head.
        intermediate: width of the MLP.
        vocabulary: tokens.
        is_tied: whether embedding and output layer are one matrix.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of all layers."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return self.layer_weights + (1 if self.is_tied else 2) * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Placement:
    """Processes and options of a training.

    Attributes:
        processes: number of GPUs.
        sequence_parallel: processes that share the tokens of a micro-batch.
        tile_tokens: of `model.mlp_tile_tokens`.
        offloads: whether layer inputs are in host memory.
    """

    processes: int
    sequence_parallel: int = 1
    tile_tokens: int | None = None
    offloads: bool = False


def layer_input_bytes(shape: ModelShape, placement: Placement, tokens: int) -> int:
    """Return the bytes of the inputs of all layers that one process keeps of a micro-batch of `tokens`."""
    return 2 * shape.layers * shape.hidden * _own(tokens, placement)


def layer_bytes(shape: ModelShape, placement: Placement, tokens: int) -> int:
    """Return the peak bytes of one layer's activations and their gradients on one process.

    Norms compute in float32. Keys and values exist twice, for two responses after one prompt. The largest sum
    is in the backward of the MLP, or of attention if the MLP is in tiles. The coefficients were measured
    (`tests/unit/model/test_context_memory.py`); heads together are as wide as the hidden state.

    Args:
        shape: of the model.
        placement: of the training.
        tokens: of the micro-batch, over all processes that share it.
    """
    hidden, wide = shape.hidden, 12 * shape.intermediate
    key_heads = max(shape.kv_heads, placement.sequence_parallel)  # repeated, if there are fewer
    attention = 6 * shape.heads * shape.head_dim + 8 * key_heads * shape.head_dim
    in_mlp = 19.5 * hidden + (0 if placement.tile_tokens else wide)
    own = _own(tokens, placement)
    tile = wide * min(placement.tile_tokens or 0, own)
    return round(own * (attention + max(in_mlp, 35.5 * hidden))) + tile


def device_bytes(shape: ModelShape, placement: Placement, tokens: int) -> int:
    """Return the bytes of one GPU that a step with micro-batches of `tokens` takes."""
    kept = 0 if placement.offloads else layer_input_bytes(shape, placement, tokens)
    states = _STATES_OF_A_WEIGHT * shape.parameters // placement.processes
    return states + _FIXED + kept + layer_bytes(shape, placement, tokens)


def micro_batch_flops(shape: ModelShape, tokens: int) -> tuple[float, float]:
    """Return the FLOPs of a micro-batch with one long sequence: in the layers' matrices, and in attention.

    A token attends to half of the sequence on average; the output layer is not counted.
    """
    matrices = 2.0 * shape.layer_weights * tokens
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim * tokens**2
    return _FORWARDS * matrices, _FORWARDS * attention


def _own(tokens: int, placement: Placement) -> int:
    return -(-tokens // placement.sequence_parallel)
