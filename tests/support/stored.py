"""Model folders that are quantized as published: FP8 by transformers' own quantizer, MXFP4 as gpt-oss."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from dpo_dist.model.files.stored import RowChoice

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_KEPT_IN_FP8 = ("embed_tokens", "lm_head", "norm", "mlp.gate.")


def quantize_fp8(
    folder: Path, blocks: Sequence[int] = (8, 8), scales: torch.dtype = torch.float32, **config: Any
) -> None:
    """Quantize linear layers and experts of a model folder by transformers' own quantizer.

    Sides that no block divides are quantized as DeepSeek does, with a smaller last block.
    """
    settings = FineGrainedFP8Config(weight_block_size=tuple(blocks))
    operation = Fp8Quantize(SimpleNamespace(quantization_config=settings))

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        if weight.dim() != 2 or any(part in name for part in _KEPT_IN_FP8):
            return {name: weight.bfloat16()}
        rows, columns = weight.shape
        padded = torch.zeros(
            [-(-side // block) * block for side, block in zip(weight.shape, blocks, strict=True)]
        )
        padded[:rows, :columns] = weight
        both = operation.convert({name: padded})
        scale = both.pop(f"{name}_scale_inv").to(scales)
        codes = (padded / expand(scale.float(), blocks)).to(torch.float8_e4m3fn)
        return {name: codes[:rows, :columns].contiguous(), f"{name}_scale_inv": scale}

    written = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    _rewrite(folder, quantize, written | {"weight_block_size": [*blocks]} | config)


def expand(scale: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return a number for each weight of the blocks that a scale belongs to."""
    return torch.kron(scale, torch.ones(*blocks))


def quantize_mxfp4(folder: Path) -> None:
    """Quantize the experts of a gpt-oss folder to the nearest numbers of MXFP4, in the layout of the hub."""

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: weight.bfloat16()}
        numbers = weight.mT.float().unflatten(-1, (-1, 32))
        exponents = numbers.abs().amax(-1).log2().floor() - 2
        scaled = numbers / exponents.exp2()[..., None]
        codes = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1) + 8 * (scaled < 0)
        blocks = codes[..., ::2] + 16 * codes[..., 1::2]
        return {f"{name}_blocks": blocks.byte(), f"{name}_scales": (exponents + 127).byte()}

    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _rewrite(folder, quantize, {"quant_method": "mxfp4", "modules_to_not_convert": kept})


def _rewrite(
    folder: Path, quantize: Callable[[str, Tensor], Mapping[str, Tensor]], settings: Mapping[str, Any]
) -> None:
    """Replace the weights of a folder; those of an odd place are in a second file, also from their scales."""
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors |= quantize(name, weight)
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(tensors)}
    for file in set(places.values()):
        own = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(own, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_bytes())
    config |= {"dtype": "bfloat16", "quantization_config": dict(settings)}
    (folder / "config.json").write_text(json.dumps(config))


def spoil(folder: Path, rows: Mapping[str, RowChoice]) -> None:
    """Make all numbers infinite in the tensors that `rows` names, but those of these rows."""

    def spoiled(name: str, tensor: Tensor) -> Tensor:
        own = rows.get(name, ...)
        if own is ...:
            return tensor
        others = torch.full_like(tensor, torch.inf)
        if own is not None:
            others[own] = tensor[own]
        return others

    for file in folder.glob("*.safetensors"):
        tensors = {name: spoiled(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
