"""The weights of an adapter by the names of peft's files, and several adapters as one.

An update of LoRA is s B A (arXiv:2106.09685, section 4.1), so a sum of updates is the update of the stacked
matrices: sum c_i s_i B_i A_i = s [c_1 s_1/s B_1, ...] [A_1; ...].
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dpo_dist.config.names import suggestion
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.model.adapter_files import ADAPTER_WEIGHTS, PEFT_PREFIX, is_repeated, unreadable, unsupported

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


KEY = "model.adapter.modules_to_save"


def inject_adapter(causal_lm: Any, lora: LoraConfig, name: str) -> None:
    """Add an adapter to a transformers model and make it the one that its low-rank layers train.

    `add_adapter` of transformers fails if another adapter has modules in full that this one has not.
    """
    causal_lm._hf_peft_config_loaded = True
    with warnings.catch_warnings():
        # Of embeddings and output layer that share a weight, which `prepare_copies` sees to.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        inject_adapter_in_model(lora, causal_lm, name)
    for module in causal_lm.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(name)


def saved_modules(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Return the modules of which there are copies, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)
    }


def find_modules(causal_lm: Any, wanted: list[str]) -> list[str]:
    """Return the whole names of the modules that `wanted` names by the last parts of their names.

    Args:
        causal_lm: without an adapter, sharded or not; its tensors are not used.
        wanted: as in `model.adapter.modules_to_save`.

    Raises:
        ConfigError: a name is of no module that can be trained in full, or of one of two that share a weight.
    """
    if not wanted:
        return []
    plain = {name: module for name, module in causal_lm.named_modules() if _has_plain_weights(module)}
    found: set[str] = set()
    for one in wanted:
        matching = {name for name in plain if name == one or name.endswith(f".{one}")}
        if not matching:
            short = sorted({name.rpartition(".")[2] for name in plain})
            raise ConfigError(
                "a module to train in full is not one of this model",
                where=KEY,
                got=one,
                expected=", ".join(short),
                remedy=f"{suggestion(one, short)}name modules that have unquantized weights of their own",
            )
        found |= matching
    if len(shared := _shared_pair(causal_lm)) == 2 and len(found & set(shared)) == 1:
        raise ConfigError(
            "two modules of this model share their weight, and only one of them is to be trained in full",
            where=KEY,
            got=", ".join(wanted),
            expected=" and ".join(shared),
            remedy=f"name both in {KEY}, or neither: they stay one weight",
        )
    return [name for name in plain if name in found]


def _has_plain_weights(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    is_leaf = next(module.children(), None) is None
    return is_leaf and bool(own) and all(weight.is_floating_point() for weight in own)


def _shared_pair(causal_lm: Any) -> tuple[str, ...]:
    """Return the names of embeddings and output layer if they are one weight in the base, else none."""
    pair = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    first, second = (getattr(_original(module), "weight", None) for module in pair)
    if first is None or first is not second:
        return ()
    names = {module: name for name, module in causal_lm.named_modules()}
    return tuple(names[module] for module in pair)


def shared_weights(causal_lm: Any) -> tuple[str, ...]:
    """Return the names of the weights of embeddings and output layer if they are one weight, else none."""
    return tuple(f"{name}.weight" for name in _shared_pair(causal_lm))


def _original(module: Any) -> Any:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


@torch.no_grad()
def prepare_copies(causal_lm: Any, trained: str, start: str, folder: Path | None) -> None:
    """Let the trained copies begin as those of the start, and share what the base shares.

    Args:
        causal_lm: with its adapters, before it is in an engine.
        trained: name of the trained adapter; only its copies require a gradient.
        start: name of the frozen adapter that is the policy's start.
        folder: of that adapter; None: the policy starts as the base.
    """
    wrappers = saved_modules(causal_lm)
    for wrapper in wrappers.values():
        copies = wrapper.modules_to_save
        if trained in copies and start in copies:
            copies[trained].load_state_dict(copies[start].state_dict())
        for name, module in copies.items():
            module.requires_grad_(name == trained)
    shared = _shared_pair(causal_lm) if wrappers else ()
    pair = [wrappers[name].modules_to_save for name in shared if name in wrappers]
    if all(trained in copies for copies in pair) and (folder is None or _are_equal(folder, shared)):
        for copies in pair[1:]:
            copies[trained].weight = pair[0][trained].weight


def _are_equal(folder: Path, modules: tuple[str, ...]) -> bool:
    """Return whether an adapter folder has no two different weights of these modules."""
    saved = AdapterWeights.of_folder(folder)
    tables = [saved.read(name) for module in modules if (name := f"{module}.weight") in saved.names]
    return all(torch.equal(tables[0], other) for other in tables[1:])


def trained_aliases(causal_lm: Any) -> dict[str, str]:
    """Return further names of trained weights that have several, with the first name of each."""
    first: dict[nn.Parameter, str] = {}
    aliases: dict[str, str] = {}
    for name, weight in causal_lm.named_parameters(remove_duplicate=False):
        if weight.requires_grad and first.setdefault(weight, name) != name:
            aliases[name] = first[weight]
    return aliases
