"""MLPs by tiles: the same log-probs and gradients in less memory, where an MLP computes each token alone."""

import gc
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import (
    AdapterConfig,
    AttentionBackend,
    Dtype,
    ImagesConfig,
    ModelConfig,
    TrainedImageParts,
)
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model import tiled_mlp
from dpo_dist.model.files.load import load_packed, without_weights
from dpo_dist.model.layers import checkpoint_layers, decoder_layers, keep_text
from dpo_dist.model.lora import add_adapter
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.model.tiled_mlp import tile_mlps, tiled_mlps
from tests.support.families import FAMILIES, tiny_config
from tests.support.invented_images import READERS, image_examples, image_reader, invented_images
from tests.support.packing import pack_unkeyed, random_pairs
from tests.support.tiny_model import write_model
from tests.unit.model.test_architectures import OTHERS, assert_same, gradients, packed, trained

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
BATCH = pack_unkeyed(random_pairs([(7, 5, 9), (1, 1, 4)]))
TOKENS = len(BATCH.input_ids)
TILE = 4
TILES = -(-TOKENS // TILE)
# MLPs at the end of a layer, with a norm behind them, of one matrix for two, without gates, with biases;
# recurrent layers; mixtures with dense layers or dense parts.
KINDS = (
    "starcoder2 gemma3_text gemma4_text gpt2 granitemoehybrid lfm2 llama olmo2 phi3 qwen3_5_text qwen3_moe"
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", TILE)


def calls_of(model: Any) -> dict[nn.Module, int]:
    """Count from now on how often the MLPs that can be tiled compute their last product, by their layer."""
    counts: Counter[nn.Module] = Counter()
    for layer, mlp in tiled_mlps(model).items():
        last = [child for child in mlp.children() if next(child.parameters(), None) is not None][-1]
        last.register_forward_hook(lambda *_, layer=layer: counts.update([layer]))
    return counts


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", KINDS.split())
def test_log_probs_and_gradients_are_those_without_tiles(name: str, checkpointing: str) -> None:
    model = packed(trained(name)).train()
    checkpoint_layers(model.causal_lm, checkpointing)
    expected = model(BATCH)
    of_weights = gradients(model.causal_lm, expected)
    counts = calls_of(model.causal_lm)
    assert counts.keys() <= set(decoder_layers(model.causal_lm))
    tile_mlps(model.causal_lm)
    ours = model(BATCH)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert_same(gradients(model.causal_lm, ours), of_weights)
    # Only what a checkpointed layer keeps is smaller by tiles; a norm behind an MLP needs what it computes.
    times = {1} if checkpointing == "none" else {2 * TILES, 3 * TILES}
    assert set(counts.values()) <= times
    assert counts
    if name == "llama" and checkpointing == "full":
        assert set(counts.values()) == {2 * TILES}, "not computed anew at the end of a layer"
    counts.clear()
    with torch.no_grad():
        scored = model(BATCH)
    assert set(counts.values()) == {TILES}
    torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-6)


def test_what_a_router_chooses_and_what_layers_share_stays_whole() -> None:
    whole = "gpt_oss mixtral olmoe qwen2_moe zamba2 mamba2"
    assert not any(tiled_mlps(trained(name)) for name in whole.split())
    dense_in_part = trained("qwen3_moe")
    assert 0 < len(tiled_mlps(dense_in_part)) < len(decoder_layers(dense_in_part))
    others = {name for name in FAMILIES if not tiled_mlps(trained(name))}
    assert {"llama", "qwen3", "gemma3_text", "mistral", "phi3", "olmo2", "gpt2"}.isdisjoint(others)


def mlp_gradients(dtype: torch.dtype, tile: int | None) -> dict[str, Tensor]:
    """Gradients of an MLP of 512 tokens."""
    torch.manual_seed(0)
    model = trained("llama", hidden_size=64, intermediate_size=192)
    checkpoint_layers(model, "full")
    layer = decoder_layers(model)[0]
    mlp: Any = tiled_mlps(model)[layer].to(dtype)
    if tile is not None:
        tile_mlps(model)
        tiled_mlp.TILE_ROWS = tile
    hidden = torch.randn(1, 512, 64, dtype=torch.float64).bfloat16().to(dtype).requires_grad_()
    upstream = torch.randn(1, 512, 64, dtype=torch.float64).bfloat16().to(dtype)
    mlp(hidden).backward(upstream)
    return {"hidden": hidden.grad, **{name: each.grad for name, each in mlp.named_parameters()}}


def off(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((ours[name].double() - each).norm() / each.norm()) for name, each in exact.items()}


def test_gradients_in_bf16_are_as_near_to_float64_as_without_tiles() -> None:
    """Of 64 tiles; added in bf16 they would be 1.7 to 2 times as far off."""
    exact = mlp_gradients(torch.float64, None)
    whole = off(mlp_gradients(torch.bfloat16, None), exact)
    tiled = off(mlp_gradients(torch.bfloat16, 8), exact)
    assert max(off(mlp_gradients(torch.float32, 8), exact).values()) < 1e-6
    for name, error in whole.items():
        assert tiled[name] < 1.1 * error, name


def test_an_input_without_a_gradient() -> None:
    """As that of a first layer of which only the MLP is trained."""
    model = trained("llama")
    checkpoint_layers(model, "full")
    mlp: Any = tiled_mlps(model)[decoder_layers(model)[0]]
    hidden = torch.randn(1, TOKENS, 32)
    expected = torch.autograd.grad(mlp(hidden).square().sum(), [*mlp.parameters()])
    tile_mlps(model)
    found = torch.autograd.grad(mlp(hidden).square().sum(), [*mlp.parameters()])
    torch.testing.assert_close(found, expected)


def test_an_adapter_and_frozen_layers_before_it() -> None:
    """The input of the first MLP has no gradient where only MLPs have matrices."""
    for targets in (None, ["down_proj"]):
        adapter = AdapterConfig(r=2, alpha=4.0, target_modules=targets)
        found = []
        for tiles in (False, True):
            model = packed(trained("llama"))
            checkpoint_layers(model.causal_lm, "full")
            if tiles:
                tile_mlps(model.causal_lm)
            add_adapter(model, ModelConfig("m", dtype=Dtype.fp32, adapter=adapter), 0)
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(3))
            found.append(gradients(model.causal_lm, model.train()(BATCH)))
        assert_same(found[1], found[0])


def test_a_model_is_loaded_with_tiles_if_they_are_asked_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    for asked, tiles in ((True, TILES), (False, 1)):
        model = load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32, tiled_mlp=asked), 64, CPU)
        counts = calls_of(model.causal_lm)
        with torch.no_grad():
            model(BATCH)
        assert set(counts.values()) == {tiles}


def test_a_model_without_such_mlps_is_refused() -> None:
    config = ModelConfig("m", tiled_mlp=True, gradient_checkpointing="full")
    assert without_weights(tiny_config("llama"), config) is not None
    with pytest.raises(ConfigError, match="no layer has an MLP") as raised:
        without_weights(tiny_config("mixtral"), config)
    assert raised.value.where == "model.tiled_mlp"


def test_text_behind_images(monkeypatch: pytest.MonkeyPatch) -> None:
    small = READERS["gemma3"]
    monkeypatch.setitem(READERS, "gemma3", replace(small, text=small.text | {"intermediate_size": 1024}))
    examples = 16 * image_examples(invented_images("gemma3"))
    causal_lm = image_reader("gemma3")
    keep_text(causal_lm, ImagesConfig(TrainedImageParts.projector))
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, reads_images=True).train()
    model.arrange_as_recorded(Arrangement.packed, 256)
    checkpoint_layers(causal_lm, "full")
    batch = pack_unkeyed(examples)
    tokens = len(batch.input_ids)
    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", -(-tokens // 16))
    with Peak() as whole:
        of_weights = gradients(causal_lm, model(batch))
    counts = calls_of(causal_lm)
    tile_mlps(causal_lm)
    gc.collect()
    with Peak() as tiled:
        of_tiles = gradients(causal_lm, model(batch))
    assert_same(of_tiles, of_weights)
    assert min(counts.values()) > 2
    assert whole.peak - tiled.peak > 0.6 * 15 / 16 * tokens * 6 * 1024 * 4  # measured: 0.72
    assert any("projector" in name for name in of_weights)


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that live at a time, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def _release(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._release, key)
        self.peak = max(self.peak, self.now)
        return out


# Families, with options that make an MLP the largest part of a layer.
PEAKS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {}),
    "hybrid": ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}),
    "mixture with dense layers": ("qwen3_moe", {"mlp_only_layers": [0, 1]}),
    "dense part beside experts": ("gemma4_text", OTHERS["gemma4_text"]),
}


def peak_of(name: str, *, tiles: bool) -> int:
    """Bytes at the peak of a forward and a backward, of 16 tiles of tokens."""
    family, own = PEAKS[name]
    causal_lm = trained(family, intermediate_size=1024, **own)
    model = packed(causal_lm).train()
    checkpoint_layers(causal_lm, "full")
    if tiles:
        tile_mlps(causal_lm)
    batch = pack_unkeyed(random_pairs([(40, 44, 44)] * 8))
    gc.collect()
    with Peak() as peak:
        model(batch).sum().backward()
    return peak.peak


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_has_the_inside_of_one_tile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 8 * 128
    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", tokens // 16)
    saved = peak_of(name, tiles=False) - peak_of(name, tiles=True)
    # Of a gated MLP 4 widths are kept, and at least 2 more live in its backward; weights' sums are little.
    assert saved > 0.8 * 15 / 16 * tokens * 6 * 1024 * 4
