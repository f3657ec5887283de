"""Initializations of an adapter from the singular vectors or the QR factors of the weights, by peft.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) start from A_0, B_0 that are parts of the weight W, and
train A and B on the residual W - s B_0 A_0. Here the weight stays as it is, and a layer computes
W x + s (B A x - B_0 A_0 x) with frozen A_0 and B_0: the same function with the same gradients, and no
residual is rounded. At the start the difference is exactly 0, without the adapter the base is exactly itself.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.utils.integrations import gather_params_ctx
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import pad

from dpo_dist.atomic import staged_folder
from dpo_dist.errors import ConfigError, first_line
from dpo_dist.model.adapter_weights import AdapterWeights, write_adapter
from dpo_dist.model.saved_modules import inject_adapter

_INITIAL = "initial"


def start_from_weights(causal_lm: Any, name: str, lora: LoraConfig, init: str, folder: Path | None) -> None:
    """Give the adapter `name` its initial values and every layer a frozen copy of them to subtract.

    Args:
        causal_lm: with the adapter, sharded or not.
        name: of the adapter.
        lora: its configuration.
        init: for which `splits_base` is true.
        folder: with the initial values of an earlier start; None: compute them from the weights. Under ZeRO-3
            the weights of one layer are whole at a time, and every rank computes the same.

    Raises:
        ConfigError: those of an earlier start are damaged.
    """
    if folder is not None:
        _read_initial(causal_lm, name, folder)
    adapted = [module for module in causal_lm.modules() if isinstance(module, LoraLayer)]
    layers = [layer for layer in adapted if name in layer.lora_A]
    if folder is None:
        for layer in layers:
            _factor(layer, name, init)
    frozen = copy.copy(lora)
    frozen.inference_mode, frozen.modules_to_save = True, None
    inject_adapter(causal_lm, frozen, _INITIAL)
    with torch.no_grad():
        for layer in layers:
            for matrices in (layer.lora_A, layer.lora_B):
                matrices[_INITIAL].weight.copy_(matrices[name].weight)
            layer.lora_variant[name] = _FromInitial()


def _read_initial(causal_lm: Any, name: str, folder: Path) -> None:
    """Set the matrices of an adapter to those of `folder`.

    peft's own function looks for modules in full too, which `folder` does not have.

    Raises:
        ConfigError: it has not all of them, or other ones.
    """
    try:
        initial = AdapterWeights.of_folder(folder)
        for layer_name, layer in causal_lm.named_modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                for part, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                    _set(matrices[name].weight, initial.read(f"{layer_name}.{part}.weight"))
    except (ConfigError, OSError, SafetensorError, ValueError) as error:
        raise ConfigError(
            "the initial values of the adapter are damaged",
            where="model.adapter.init",
            got=f"{folder}: {first_line(error)}",
            expected="the folder that the first start of the run wrote",
            remedy="restore it, or train a new run",
        ) from error


@torch.no_grad()
def _set(matrix: Tensor, value: Tensor) -> None:
    if matrix.shape != value.shape:
        raise ValueError(f"a matrix of {list(value.shape)} in place of {list(matrix.shape)}")
    matrix.copy_(value)


def _factor(layer: LoraLayer, name: str, init: str) -> None:
    """Let peft compute A and B, and restore the weight from which it subtracts their product.

    A weight has no more factors than its smaller side; the rest of a higher rank is 0, and stays 0.
    """
    weight, rank = layer.get_base_layer().weight, layer.r[name]
    matrices = [layer.lora_A[name].weight, layer.lora_B[name].weight]
    dtypes = [matrix.dtype for matrix in matrices]
    with torch.no_grad(), gather_params_ctx([weight], modifier_rank=None):
        kept = weight.data
        weight.data = kept.clone()
        layer.r[name] = min(rank, *kept.shape)
        if init == "olora":
            layer.olora_init(name)
        else:
            layer.pissa_init(name, init)
        missing, layer.r[name] = rank - layer.r[name], rank
        weight.data = kept
    sides = (0, 0, 0, missing), (0, missing)
    for matrix, dtype, side in zip(matrices, dtypes, sides, strict=True):
        matrix.data = pad(matrix.data, side).to(dtype).contiguous()


class _FromInitial(LoraVariant):  # type: ignore[misc]
    """Update of a layer as the difference from its initial values."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Return `result` with s (B A x - B_0 A_0 x) added."""
        trained = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        initial = module.lora_B[_INITIAL](module.lora_A[_INITIAL](x))
        updated: Tensor = result + module.scaling[active_adapter] * (trained - initial)
        return updated


def write_initial(
    causal_lm: Any, name: str, folder: Path, finish: Callable[[Path], None] = lambda _: None
) -> None:
    """Write the initial values of an adapter that `start_from_weights` made, before it is in an engine.

    Args:
        causal_lm: with the adapter.
        name: of the adapter.
        folder: to write, which appears when it is complete.
        finish: called with the folder of the written files before.
    """
    weights = {
        key: weight.detach().cpu()
        for key, weight in causal_lm.named_parameters()
        if ".lora_" in key and f".{name}." in key
    }
    found = AdapterWeights.of_model(causal_lm.peft_config[name], weights, weights.__getitem__)
    with staged_folder(folder) as temporary:
        write_adapter(temporary, found.config, {key: found.read(key) for key in sorted(found.names)})
        finish(temporary)
