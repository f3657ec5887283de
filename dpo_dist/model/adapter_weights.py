"""The weights of an adapter by the names of peft's files, and several adapters as one.

An update of LoRA is s B A (arXiv:2106.09685, section 4.1), so a sum of updates is the update of the stacked
matrices: sum c_i s_i B_i A_i = s [c_1 s_1/s B_1, ...] [A_1; ...].
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_dist.errors import first_line
from dpo_dist.model.adapter_checks import unreadable, unsupported
from dpo_dist.model.adapter_files import ADAPTER_WEIGHTS, PEFT_PREFIX, is_repeated

_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_NAME_OF_ADAPTER = re.compile(r"(\.modules_to_save)?\.default(?=\.|$)")


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA adapter whose weights are read one by one.

    Attributes:
        config: peft's.
        names: of its weights in a file, without `PEFT_PREFIX`.
        read: returns the weight of a name, in host memory.
    """

    config: LoraConfig
    names: frozenset[str]
    read: Callable[[str], Tensor]

    @classmethod
    def of_folder(cls, folder: Path) -> "AdapterWeights":
        """Return the adapter that peft or a run wrote into `folder`.

        Raises:
            ConfigError: its weights cannot be read, or peft cannot read its configuration.
        """
        file = folder / ADAPTER_WEIGHTS

        def read(name: str) -> Tensor:
            with safe_open(file, "pt") as weights:
                tensor: Tensor = weights.get_tensor(PEFT_PREFIX + name)
                return tensor

        try:
            with safe_open(file, "pt") as weights:
                own = [name for name in weights.keys() if not is_repeated(name)]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error) from error
        names = frozenset(name.removeprefix(PEFT_PREFIX) for name in own)
        try:
            config = LoraConfig.from_pretrained(folder)
        except Exception as error:  # peft can raise anything
            raise unsupported(folder, first_line(error)) from error
        return cls(config, names, read)

    @classmethod
    def of_model(
        cls, config: LoraConfig, names: Iterable[str], read: Callable[[str], Tensor]
    ) -> "AdapterWeights":
        """Return the trained adapter of a model.

        Args:
            config: peft's.
            names: of its weights in the model.
            read: returns the weight of such a name.
        """
        by_name = {name_in_file(name): name for name in names}
        return cls(config, frozenset(by_name), lambda name: read(by_name[name]))

    def in_memory(self) -> "AdapterWeights":
        """Return the same adapter, whose weights are in host memory: its files may change."""
        weights = {name: self.read(name) for name in self.names}
        return replace(self, read=weights.__getitem__)

    @property
    def layers(self) -> list[str]:
        """Return the names of the adapted layers."""
        return sorted(name.removesuffix(_A) for name in self.names if name.endswith(_A))

    def sizes(self, layer: str) -> tuple[int, int]:
        """Return the sizes of the weight that a layer's matrices change: [out, in]."""
        return self.read(layer + _B).shape[0], self.read(layer + _A).shape[1]

    @property
    def saved(self) -> list[str]:
        """Return the names of the weights that the adapter has in full: those of `modules_to_save`."""
        return sorted(name for name in self.names if not name.endswith((_A, _B, _MAGNITUDE)))

    def scaling(self, layer: str, rank: int) -> float:
        """Return the scale of a layer's update: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha = _of_layer(self.config.alpha_pattern, layer, self.config.lora_alpha)
        return float(alpha / (rank**0.5 if self.config.use_rslora else rank))

    def merged(self, layer: str, weight: Tensor) -> Tensor:
        """Return float32, the weight of a layer with its update, [out, in] or as GPT-2 has it [in, out].

        DoRA (arXiv:2402.09353, equation 5) gives every row the length of its magnitude.

        Args:
            layer: one of `layers`.
            weight: [out, in]; of GPT-2's layers, which are Conv1D, [in, out].
        """
        down, up = (self.read(layer + part).float() for part in (_A, _B))
        is_transposed = bool(self.config.fan_in_fan_out)
        own = (weight.T if is_transposed else weight).float()
        moved = own + self.scaling(layer, len(down)) * (up @ down)
        if layer + _MAGNITUDE in self.names:
            magnitude = self.read(layer + _MAGNITUDE).float()
            moved *= (magnitude / moved.norm(dim=1))[:, None]
        return moved.T if is_transposed else moved


def stack(parts: Sequence[tuple[float, AdapterWeights]]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return one adapter, float32, whose low-rank update is the sum of `parts`, each times its coefficient.

    Modules that parts have in full are not in it. Its rank in a layer is the sum of their ranks, its scale is
    one for all layers: vLLM has read one scale of an adapter only. None of the parts may be DoRA, whose
    updates have no such sum.
    """
    weights: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    common = 0.0
    for layer in sorted({layer for _, part in parts for layer in part.layers}):
        downs, ups = [], []
        for coefficient, part in parts:
            if layer + _A in part.names:
                down, up = part.read(layer + _A).float(), part.read(layer + _B).float()
                scale = part.scaling(layer, len(down))
                common = common or scale
                downs.append(down)
                ups.append(up if coefficient * scale == common else up * (coefficient * scale / common))
        weights[layer + _A], weights[layer + _B] = torch.cat(downs), torch.cat(ups, dim=1)
        ranks[layer] = len(weights[layer + _A])
    return _stacked_config(parts[0][1].config, ranks, common), weights


def _stacked_config(config: LoraConfig, ranks: dict[str, int], scale: float) -> LoraConfig:
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


def write_adapter(folder: Path, config: LoraConfig, weights: Mapping[str, Tensor]) -> None:
    """Write an adapter as peft reads it.

    Args:
        folder: that exists.
        config: peft's.
        weights: by name in the file, without `PEFT_PREFIX`.
    """
    written = copy.copy(config)
    written.inference_mode = True
    saved = [name for name in weights if not name.endswith((_A, _B, _MAGNITUDE))]
    written.modules_to_save = sorted({name.rpartition(".")[0] for name in saved}) or None
    written.save_pretrained(folder)
    tensors = {PEFT_PREFIX + name: weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def name_in_file(name: str) -> str:
    """Return the name in peft's files of a weight of a model: without the adapter's name."""
    short = _NAME_OF_ADAPTER.sub("", name)
    return short.removesuffix(".weight") if _MAGNITUDE in short else short


def _of_layer(pattern: Mapping[str, float], layer: str, default: float) -> float:
    """Return the value of a layer by peft's patterns, which match the ends of its name."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return default
