"""The formulas that long_context.md plans with agree with the tensors of a step, and the page with them."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.model.attention import PACKED
from dpo_dist.model.context_memory import (
    ModelShape,
    Placement,
    layer_bytes,
    layer_input_bytes,
    micro_batch_flops,
)
from dpo_dist.model.flops import count_flops
from dpo_dist.model.layers import checkpoint_layers
from dpo_dist.model.memory import Elsewhere, offload_inputs, tile_mlps
from dpo_dist.model.packed import PackedCausalLM
from scripts.write_long_context import MODELS, PAGE, cell, page
from tests.support.packing import pack_unkeyed, random_pairs

HIDDEN, HEADS = 128, 4


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that exist."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


class Away(Elsewhere):
    """Memory that `Live` does not count."""

    def put(self, tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
        return tensor.dtype, tensor.shape, tensor.detach().view(torch.uint8).numpy().tobytes()

    def get(self, copy: tuple[torch.dtype, torch.Size, bytes]) -> Tensor:
        dtype, shape, content = copy
        return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


class Echo:
    """An exchange with ranks that send what this one sends."""

    rank = 1

    def __init__(self, ranks: int):
        self.ranks = ranks

    def all_to_all(self, parts: Tensor) -> Tensor:
        return parts.clone()

    def all_gather(self, part: Tensor) -> Tensor:
        return torch.stack([part] * self.ranks)


def shape_of(intermediate: int, kv_heads: int, layers: int = 2) -> ModelShape:
    return ModelShape(layers, HIDDEN, HEADS, kv_heads, HIDDEN // HEADS, intermediate, 512)


def measured(shape: ModelShape, placement: Placement, tokens: int) -> tuple[int, int]:
    """Return the bytes after forward, and at the peak of a forward and backward on a CPU."""
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
    )
    config._attn_implementation = PACKED
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    checkpoint_layers(causal_lm, "full")
    if placement.offloads:
        offload_inputs(causal_lm, Away())
    if placement.tile_tokens is not None:
        tile_mlps(causal_lm, placement.tile_tokens, torch.device("cpu"), torch.bfloat16)
    ranks = placement.sequence_parallel
    sequence = Echo(ranks) if ranks > 1 else None
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, sequence=sequence).train()
    batch = pack_unkeyed(random_pairs([(tokens - 2, 2, 2)]))
    with Live() as live:
        logps = model(batch)
        kept = live.now
        logps.sum().backward()
    return kept, live.peak


def added_by_tokens(shape: ModelShape, placement: Placement) -> tuple[float, float]:
    """Return the bytes kept after forward and those of the peak, for one more token of a process."""
    few, more = 1024, 2048  # with fewer, gradients of weights are the most
    ranks = placement.sequence_parallel
    first, second = (measured(shape, placement, count * ranks) for count in (few, more))
    kept, peak = ((b - a) / (more - few) for a, b in zip(first, second, strict=True))
    return kept, peak


@pytest.mark.parametrize(
    ("shape", "placement"),
    [
        (shape_of(512, 2), Placement(1)),
        (shape_of(1024, 4), Placement(1)),
        (shape_of(512, 2), Placement(1, tile_tokens=16)),
        (shape_of(512, 4), Placement(2, sequence_parallel=2)),
        (shape_of(512, 2), Placement(4, sequence_parallel=4)),
        (shape_of(512, 1), Placement(2, sequence_parallel=2, tile_tokens=16)),
    ],
)
def test_the_activations_of_a_layer_take_what_the_formula_says(
    shape: ModelShape, placement: Placement
) -> None:
    """With the layers' inputs elsewhere, so that only a layer's activations grow with the tokens."""
    away = Placement(placement.processes, placement.sequence_parallel, placement.tile_tokens, offloads=True)
    _, peak = added_by_tokens(shape, away)
    tokens = 1024 * placement.sequence_parallel
    half = layer_bytes(shape, placement, tokens // 2)
    assert peak == pytest.approx((layer_bytes(shape, placement, tokens) - half) / 512, rel=0.03)


def test_each_checkpointed_layer_keeps_its_input_unless_it_is_elsewhere() -> None:
    kept = [added_by_tokens(shape_of(512, 2, layers), Placement(1))[0] for layers in (1, 3)]
    inputs = [layer_input_bytes(shape_of(512, 2, layers), Placement(1), 1) for layers in (1, 3)]
    assert kept[1] - kept[0] == pytest.approx(inputs[1] - inputs[0], rel=0.02)
    away = [added_by_tokens(shape_of(512, 2, layers), Placement(1, offloads=True))[0] for layers in (1, 3)]
    assert away[1] - away[0] == pytest.approx(0, abs=1)


def test_flops_are_those_of_a_step_with_recomputation() -> None:
    """`model.flops` counts three forwards of useful work; checkpointing makes one more."""
    shape = shape_of(512, 2, layers=3)
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
    )
    useful, tokens = count_flops(config, None), 100
    matrices, attention = micro_batch_flops(shape, tokens)
    assert matrices * 3 / 4 == pytest.approx(useful.per_token * tokens)
    assert attention * 3 / 4 == pytest.approx(useful.per_attended * tokens**2 / 2)


def test_the_page_has_the_tables_that_the_formulas_give() -> None:
    assert PAGE.read_text() == page(), "run scripts/write_long_context.py"
    assert cell(MODELS["70B (Llama 3)"], 32, 2**17).startswith("8 t o")
    assert cell(MODELS["70B (Llama 3)"], 16, 2**15) == "-"
