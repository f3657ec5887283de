"""LoRA adapters on the linear layers of a loaded model (arXiv:2106.09685), by peft."""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.integrations import gather_params_ctx
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from dpo_dist.config.names import suggestion
from dpo_dist.config.schema import AdapterConfig, AdapterVariant, ModelConfig, splits_base
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.foundation.files import staged_folder
from dpo_dist.model.adapter_files import PEFT_PREFIX, check_all_linear, is_repeated, saved_on_disk
from dpo_dist.model.adapter_weights import (
    AdapterWeights,
    find_modules,
    inject_adapter,
    prepare_copies,
    saved_modules,
    write_adapter,
)
from dpo_dist.model.layers import compressors, expert_blocks, indexers, text_part
from dpo_dist.model.packed import PackedCausalLM

# Layers that are one in fused experts; peft fails if it finds only one of two.
_FUSED = ("gate_proj", "up_proj", "w1", "w3")


def check_adaptable(causal_lm: Any, targets: Collection[str]) -> None:
    """Check that peft adapts the layers that are named, and that it will when the adapter is loaded.

    In architectures whose experts were linear layers before transformers 5, peft takes `gate_proj` for a name
    of these, whatever module it is in: it would adapt the fused experts, and not the layer. The kernels of
    state-space models read the weight of `out_proj` past its adapter.

    Args:
        causal_lm: without an adapter; its tensors are not used.
        targets: names of its linear layers.

    Raises:
        ConfigError: it does not.
    """
    if passed := [name for name in targets if _is_refused(causal_lm, name)]:
        raise _not_adapted("peft adapts no such layer of state-space models", passed, targets)
    found = LoraConfig(target_modules={*targets, *_FUSED})
    convert_peft_config_for_transformers(found, causal_lm, None)
    if replaced := set(targets) - set(found.target_modules):
        why = "peft would adapt the experts in place of some layers of this architecture"
        raise _not_adapted(why, replaced, targets)


def _is_refused(causal_lm: Any, name: str) -> bool:
    try:
        _check_lora_target_modules_mamba(LoraConfig(), causal_lm, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _not_adapted(why: str, refused: Collection[str], targets: Collection[str]) -> ConfigError:
    kept = ",".join(_last_parts(set(targets) - set(refused)))
    return ConfigError(
        why,
        where="model.adapter.target_modules",
        got=", ".join(_last_parts(refused)),
        expected=f"others, such as {kept}" if kept else "other layers",
        remedy=f"set model.adapter.target_modules=[{kept}]" if kept else "name other layers",
    )


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


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


TRAINED = "default"
"""The name of the trained adapter in a model."""
_START = "start"
_KEY = "model.adapter.path"


def add_adapter(
    model: PackedCausalLM,
    config: ModelConfig,
    seed: int,
    start: Path | None = None,
    initial: Path | None = None,
) -> None:
    """Freeze `model` and add the adapter of `config`, which does not change log-probs before training.

    The adapter has the same values on every rank and for every kind of parallelism. With `start` a frozen
    copy of the adapter in that folder stays in the model, so that `adapter_off` finds the policy's start.

    Args:
        model: from `load_packed`, sharded or not, before it is in an engine.
        config: with an adapter.
        seed: of the adapter's initialization.
        start: folder of the adapter that is continued, or that stays below the new one, or None.
        initial: folder with the initial values that an earlier start took from the weights, or None.

    Raises:
        ConfigError: a target names no linear layer of the model, or its output layer, or one that peft takes
            for experts; a module to train in full is none of the model; `start` is no adapter of the model.
    """
    adapter = config.adapter
    assert adapter is not None
    causal_lm = model.causal_lm
    # Before there are the linear layers of another adapter.
    targets = [] if adapter.target_modules is None else target_layers(causal_lm, adapter)
    saved = find_modules(causal_lm, adapter.modules_to_save or [])
    if start is not None:
        _add_from(causal_lm, start, _START, _KEY)
    if start is not None and adapter.continues:
        check_all_linear(adapter, start, targets)
        lora = _add_from(causal_lm, start, TRAINED, _KEY)
    else:
        lora = _add_new(causal_lm, adapter, targets, saved, seed, initial)
    lora.inference_mode = False
    for layer in adapted_layers(causal_lm):
        layer.set_adapter(TRAINED)
    prepare_copies(causal_lm, TRAINED, _START, start)
    _activate(model, [_START, TRAINED] if adapter.on_top else [TRAINED])
    if model.compiled or model.tiled or expert_blocks(causal_lm) or compressors(causal_lm):
        # ZeRO-3 reduces the gradients of its leaves (`distributed.leaves`) when the gradient of their input
        # exists; without one it would reduce them before they are computed.
        causal_lm.enable_input_require_grads()
    local = Path(config.path).expanduser()
    lora.base_model_name_or_path = str(local.resolve()) if local.is_dir() else config.path
    lora.revision = config.revision
    if not isinstance(lora.target_modules, str):  # a pattern
        lora.target_modules = sorted(lora.target_modules)  # a set: its order would differ between starts
    model.register_state_dict_post_hook(_keep_trained)  # type: ignore[no-untyped-call]


def _add_new(
    causal_lm: Any,
    adapter: AdapterConfig,
    targets: list[str],
    saved: list[str],
    seed: int,
    initial: Path | None,
) -> LoraConfig:
    lora = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.variant is AdapterVariant.rslora,
        use_dora=adapter.variant is AdapterVariant.dora,
        target_modules=targets,
        modules_to_save=saved or None,
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        task_type="CAUSAL_LM",
    )
    check_adaptable(causal_lm, targets)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        inject_adapter(causal_lm, lora, TRAINED)
    if splits_base(adapter.init) and not next(causal_lm.parameters()).is_meta:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            start_from_weights(causal_lm, TRAINED, lora, str(adapter.init), initial)
    return lora


def _add_from(causal_lm: Any, folder: Path, name: str, key: str) -> LoraConfig:
    """Add the adapter of a folder as `name`, frozen or not as peft does it, and return its configuration."""
    try:
        lora = LoraConfig.from_pretrained(folder)
        lora.inference_mode, lora.lora_dropout, lora.init_lora_weights = True, 0.0, True
        if not saved_modules(causal_lm):  # of the same folder
            find_modules(causal_lm, saved_on_disk(folder))
        inject_adapter(causal_lm, lora, name)
        if next(causal_lm.parameters()).is_meta:  # only its shapes are used
            return lora
        read = load_peft_weights(str(folder), device="cpu")
        # Of modules in full, peft looks for the names in a model that it has not wrapped.
        weights = {
            one if ".lora_" in one else one.removeprefix(PEFT_PREFIX): weight
            for one, weight in read.items()
            if not is_repeated(one)
        }
        loaded = set_peft_model_state_dict(causal_lm, weights, adapter_name=name)
    except Exception as error:  # peft can raise anything
        reason = " ".join(str(error).split())[:200]  # the first line of torch's only announces the others
        raise _foreign_adapter(folder, f"{type(error).__name__}: {reason}", key) from error
    if isinstance(causal_lm.get_output_embeddings(), LoraLayer):
        raise _foreign_adapter(folder, "matrices on the output layer", key)
    own = [
        missing
        for missing in loaded.missing_keys
        if (".lora_" in missing or ".modules_to_save." in missing) and f".{name}" in missing
    ]
    if unread := [*loaded.unexpected_keys, *own]:
        raise _foreign_adapter(folder, f"{', '.join(unread[:3])} ({len(unread)} in all)", key)
    return lora


def load_adapter(model: PackedCausalLM, folder: Path, key: str = "evaluation.model") -> None:
    """Add the LoRA adapter that training or peft wrote into `folder`, to be scored.

    Args:
        model: its base, from `load_packed`, sharded or not, before it is in an engine.
        folder: with adapter_config.json and the adapter's weights.
        key: the configuration key to name in an error.

    Raises:
        ConfigError: the adapter cannot be read, is not LoRA, or belongs to another model.
    """
    _add_from(model.causal_lm, folder, TRAINED, key)


def _foreign_adapter(folder: Path, got: str, key: str) -> ConfigError:
    return ConfigError(
        "the adapter cannot be added to the model",
        where=key,
        got=f"{folder}: {got}",
        expected="a LoRA adapter of this model, with adapter_config.json and adapter_model.safetensors",
        remedy="name the model that the adapter was trained on as its base",
    )


def adapted_layers(model: nn.Module) -> list[LoraLayer]:
    """Return the layers that have an adapter."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def active_adapters(layers: Iterable[LoraLayer]) -> frozenset[str]:
    """Return the names of the adapters that a forward uses in `layers`, from `adapted_layers`."""
    return frozenset(name for layer in layers if not layer.disable_adapters for name in layer.active_adapters)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Make `model` compute the log-probs of its start inside the block.

    That is its base, with the adapter that it started from if there was one.
    """
    former = [(layer, layer._active_adapter, layer._disable_adapters) for layer, _ in _switched(model)]
    _activate(model, [_START])
    try:
        yield
    finally:
        for layer, names, disabled in former:
            layer._active_adapter, layer._disable_adapters = names, disabled


def _activate(model: nn.Module, names: list[str]) -> None:
    """Make every layer use those of `names` that it has.

    peft's own switches also change requires_grad, which breaks DeepSpeed's hooks.
    """
    for layer, adapters in _switched(model):
        own = [name for name in names if name in adapters]
        layer._disable_adapters = not own
        if own:  # a module uses one copy: that of the adapter on top
            layer._active_adapter = own if isinstance(layer, LoraLayer) else own[-1:]


def _switched(model: nn.Module) -> list[tuple[Any, list[str]]]:
    """Return the modules that compute with adapters or without, each with the names of its adapters."""
    switched: list[tuple[Any, list[str]]] = [(layer, list(layer.lora_A)) for layer in adapted_layers(model)]
    return switched + [(wrapper, list(wrapper.modules_to_save)) for wrapper in saved_modules(model).values()]


def target_layers(causal_lm: Any, adapter: AdapterConfig) -> list[str]:
    """Return the names of the layers that get `adapter`.

    As in peft, a target is the last part of a layer's name or several parts: `q_proj`, `self_attn.q_proj`.

    Raises:
        ConfigError: a target names no linear layer of the model's body.
    """
    head, trained = causal_lm.get_output_embeddings(), set(text_part(causal_lm).modules())
    trained -= {module for indexer in indexers(causal_lm) for module in indexer.modules()}
    saved = find_modules(causal_lm, adapter.modules_to_save or [])
    layers = [
        name
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
        if module in trained and name not in saved
    ]
    if not isinstance(adapter.target_modules, list):
        return layers
    targets = adapter.target_modules
    for target in targets:
        if not any(_matches(name, target) for name in layers):
            short = sorted({name.rpartition(".")[2] for name in layers})
            existing = f"{suggestion(target, short)}name existing layers"
            raise ConfigError(
                "an adapter's target is not a linear layer of this model",
                where="model.adapter.path" if adapter.continues else "model.adapter.target_modules",
                got=target,
                expected=f"all-linear, or a list of {', '.join(short)}",
                remedy="set model.path to the base that the adapter was trained on"
                if adapter.continues
                else f"{existing}; model.adapter.modules_to_save trains embeddings and output layer in full",
            )
    return [name for name in layers if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _keep_trained(model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Remove frozen weights from a state dict: those of the base are in its own files."""
    trained = {prefix + name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in [name for name in state if name not in trained]:
        del state[name]
