"""The weights of a LoRA adapter by the names of peft's files, and two adapters as one."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_dist.foundation.errors import first_line
from dpo_dist.model.adapter_files import PEFT_PREFIX, is_repeated, unreadable, unsupported
from dpo_dist.model.folder import ADAPTER_WEIGHTS

_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_NAME_OF_ADAPTER = re.compile(r"(\.modules_to_save)?\.default(?=\.|$)")


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA adapter in host memory: its weights by name in a file, without `PEFT_PREFIX`."""

    config: LoraConfig
    weights: Mapping[str, Tensor]

    @property
    def saved(self) -> dict[str, Tensor]:
        """Return the weights that the adapter has in full: those of `modules_to_save`."""
        low_rank = (_A, _B, _MAGNITUDE)
        return {name: weight for name, weight in self.weights.items() if not name.endswith(low_rank)}

    def scaling(self, layer: str, rank: int) -> float:
        """Return the scale of a layer's update: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        pattern = self.config.alpha_pattern
        alpha = pattern.get(get_pattern_key(list(pattern), layer), self.config.lora_alpha)
        return float(alpha / (rank**0.5 if self.config.use_rslora else rank))


def read_adapter(folder: Path) -> AdapterWeights:
    """Return the adapter that peft or a run wrote into `folder`."""
    file = folder / ADAPTER_WEIGHTS
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise unreadable(file, error) from error
    try:
        config = LoraConfig.from_pretrained(folder)
    except Exception as error:  # peft can raise anything
        raise unsupported(folder, first_line(error)) from error
    own = {name: weight for name, weight in weights.items() if not is_repeated(name)}
    return AdapterWeights(config, {name.removeprefix(PEFT_PREFIX): weight for name, weight in own.items()})


def stack(above: AdapterWeights, below: AdapterWeights) -> AdapterWeights:
    """Return one adapter, float32, whose low-rank update is the sum of both, with `above`'s modules in full.

    s1 B1 A1 + s2 B2 A2 = s1 [B1, s2/s1 B2] [A1; A2]. The scale is one for all layers: vLLM has read one scale
    of an adapter only. Neither may be DoRA, whose updates have no such sum.
    """
    parts = above, below
    layers = {name.removesuffix(_A) for part in parts for name in part.weights if name.endswith(_A)}
    weights: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    common = 0.0
    for layer in sorted(layers):
        downs, ups = [], []
        for part in parts:
            if layer + _A in part.weights:
                down, up = (part.weights[layer + name].float() for name in (_A, _B))
                scale = part.scaling(layer, len(down))
                common = common or scale
                downs.append(down)
                ups.append(up if scale == common else up * (scale / common))
        weights[layer + _A], weights[layer + _B] = torch.cat(downs), torch.cat(ups, dim=1)
        ranks[layer] = len(weights[layer + _A])
    return AdapterWeights(_stacked(above.config, ranks, common), weights | below.saved | above.saved)


def _stacked(config: LoraConfig, ranks: dict[str, int], scale: float) -> LoraConfig:
    """Return the configuration of an adapter with these ranks by layer, and one scale."""
    stacked = copy.deepcopy(config)
    stacked.target_modules, stacked.modules_to_save = sorted(ranks), None
    stacked.use_rslora, stacked.init_lora_weights = False, True
    stacked.layers_to_transform = stacked.layers_pattern = stacked.exclude_modules = None
    stacked.r = max(ranks.values())
    stacked.lora_alpha = scale * stacked.r
    stacked.rank_pattern = {layer: rank for layer, rank in ranks.items() if rank != stacked.r}
    stacked.alpha_pattern = {layer: scale * rank for layer, rank in stacked.rank_pattern.items()}
    return stacked


def write_adapter(folder: Path, adapter: AdapterWeights, dtype: torch.dtype) -> None:
    """Write an adapter in this precision into `folder`, which exists, as peft reads it."""
    written = copy.copy(adapter.config)
    written.inference_mode = True
    written.modules_to_save = sorted({name.rpartition(".")[0] for name in adapter.saved}) or None
    written.save_pretrained(folder)
    tensors = {PEFT_PREFIX + name: weight.to(dtype).contiguous() for name, weight in adapter.weights.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def name_in_file(name: str) -> str:
    """Return the name in peft's files of a weight of a model: without the adapter's name."""
    short = _NAME_OF_ADAPTER.sub("", name)
    return short.removesuffix(".weight") if _MAGNITUDE in short else short
