"""What a script of TRL changes in Python where dpo_dist would not see it: each is an error that names it."""

import contextlib
import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import FunctionType
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import first_few
from dpo_dist.tools.convert.arguments import TrainerArguments, refused
from dpo_dist.trl.structure import difference, is_library

_LOSS = (
    "write the loss as a function of log-probs, and pass words=['loss=custom', 'loss.function=MODULE:NAME']: "
    "docs/python.md#a-loss-of-your-own"
)
_OPTIMIZER = "set the optimizer and the schedule by the arguments, or by words=['optim.KEY=VALUE']"
_DATA = "change the records before they are passed as train_dataset; their order is that of `seed`"
_ELSEWHERE = "train this class with TRL: here another loop trains"
# Methods of TRL's trainers, also of former versions, and what to do in place of an override. For any other
# method of transformers' `Trainer` that dpo_dist does not call it is `_ELSEWHERE`.
_METHODS = {
    _LOSS: "compute_loss _compute_loss _compute_loss_liger dpo_loss kto_loss get_batch_loss_metrics forward "
    "get_batch_logps get_batch_samples compute_loss_context_manager concatenated_forward concatenated_inputs "
    "compute_ref_log_probs compute_reference_log_probs _precompute_ref_logps _compute_logps "
    "_compute_kl_logps null_ref_context training_step prediction_step",
    _OPTIMIZER: "create_optimizer create_scheduler create_optimizer_and_scheduler get_decay_parameter_names "
    "get_optimizer_cls_and_kwargs",
    _DATA: "get_train_dataloader get_eval_dataloader get_test_dataloader _get_dataloader _get_train_sampler "
    "_get_eval_sampler _prepare_dataset _prepare_inputs _prepare_input tokenize_row process_row "
    "tokenize_batch build_tokenized_answer _set_signature_columns_if_needed",
    "give it another name, and call it in the script: a run writes a card of its own": "create_model_card",
    "use a callback's on_evaluate, or set eval_strategy='no' and call it in the script": "evaluate",
    "use a callback's on_save, or set save_strategy='no' and call it in the script": "save_model",
}
REMEDIES = {name: remedy for remedy, names in _METHODS.items() for name in names.split()}
_ADAPTER_PARTS = (".lora_", ".modules_to_save.", ".trainable_tokens_")
# From these packages a run loads tokenizers and processors.
_TOKENIZERS = ("mistral_common", "transformers", "transformers_modules")
# TRL's SFTTrainer puts this forward on a model in memory: without a flag of its own it is that of the class.
_FUSED_HEAD = "trl.trainer.utils"
# Attributes that TRL's trainers copy from their arguments, or make, and read at each step.
_LIVE = (
    *("compute_metrics", "preprocess_logits_for_metrics"),
    *("beta", "loss_type", "loss_types", "loss_weights", "label_smoothing", "ld_alpha", "use_weighting"),
    *("f_divergence_type", "f_alpha_divergence_coef", "desirable_weight", "undesirable_weight"),
    *("optimizer", "lr_scheduler", "data_collator", "compute_loss_func", "label_smoother"),
)


_ARGUMENTS = TrainerArguments.__module__


def overrides(places: Iterable[tuple[str, Iterable[str]]], called: Iterable[str]) -> list[ConfigError]:
    """Return an error for each method that a trainer's class, or the script, replaces and nothing calls.

    `places`: names that each class, or the trainer itself, sets. `called`: the methods that dpo_dist has,
    which stay as they are where the script calls them.
    """
    of_trainers = {name for name in dir(Trainer) if not name.startswith("__")} | REMEDIES.keys()
    unseen = of_trainers - set(called)
    return [
        refused(f"{place}.{name}", "an override that would never be called", REMEDIES.get(name, _ELSEWHERE))
        for place, found in places
        for name in found
        # What is set on the trainer, and not by a class, `changed_attributes` compares.
        if name in unseen or (name in _LIVE and place != "trainer")
    ]


_STOCK = {name: inspect.getattr_static(Trainer, name) for name in dir(Trainer)}


def patches() -> set[str]:
    """Return the methods of transformers' `Trainer` that a script, or a library, has replaced."""
    found = set[str]()
    for name, stock in _STOCK.items():
        now = inspect.getattr_static(Trainer, name, None)
        # Else it was replaced before our import. A method may be a `contextlib.contextmanager`.
        is_own = (
            not inspect.isfunction(now) or is_library(now) or now.__code__.co_filename == contextlib.__file__
        )
        if not name.startswith("__") and (now is not stock or not is_own):
            found.add(name)
    return found


def changed_methods(args: TrainerArguments) -> list[ConfigError]:
    """Return an error for each method or property of the arguments that a script overrides."""
    kinds = [kind for kind in type(args).__mro__ if not is_library(kind) and kind.__module__ != _ARGUMENTS]
    names = {entry.name for entry in fields(args)}
    places = [(kind.__name__, set(vars(kind))) for kind in kinds] + [("args", set(vars(args)))]
    return [
        refused(
            f"{place}.{name}", "an override that would never be called", "set the argument that it is for"
        )
        for place, found in places
        for name in sorted(found)
        if name not in names
        and not name.startswith("__")
        and isinstance(inspect.getattr_static(TrainerArguments, name, None), FunctionType | property)
    ]


def frozen_weights(model: Any, name: str) -> list[ConfigError]:
    """Return errors for weights of a model in memory that are frozen, or trained, other than here."""
    weights = {} if isinstance(model, str) else dict(model.named_parameters())
    frozen = [key for key, weight in weights.items() if not weight.requires_grad]
    if isinstance(model, PeftModel):
        # Here all parts of an adapter are trained, and none of its base.
        adapter = {key for key in weights if any(part in key for part in _ADAPTER_PARTS)}
        if extra := [key for key in weights if key not in adapter and weights[key].requires_grad]:
            wanted = "name these modules in modules_to_save of the LoraConfig"
            return [refused(name, f"a PeftModel that also trains {first_few(extra)}", wanted)]
        frozen = [key for key in frozen if key in adapter and ".default" in key]
        remedy = "load the adapter with is_trainable=True: here all its parts are trained"
    else:
        if frozen:
            # Some classes freeze weights of their own, as the bias of a router that no gradient reaches.
            with torch.device("meta"):
                by_class = dict(type(model)(copy.deepcopy(model.config)).named_parameters())
            frozen = [key for key in frozen if key not in by_class or by_class[key].requires_grad]
        remedy = (
            "unfreeze them (words=['model.images.train=none'] leaves an image tower and its projector out), "
            "or train an adapter by peft_config: here all weights are trained"
        )
    return [refused(name, f"a model with frozen weights: {first_few(frozen)}", remedy)] if frozen else []


def hooks(model: Any, name: str) -> list[ConfigError]:
    """Return an error for each hook, `forward` or class of the script in a model in memory."""
    remedy = "remove it: the model is saved, and loaded again by its class"
    found = list[str]()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(model, str | None) and not is_library(type(base)) and is_library(type(base.config)):
        found.append(f"a class of its own, {type(base).__name__}")  # AutoModel loads that of the config
    for part, module in getattr(model, "named_modules", tuple)():
        groups = [module._forward_hooks, module._forward_pre_hooks]
        groups += [module._backward_hooks, module._backward_pre_hooks]
        for weight in module.parameters(recurse=False):
            groups += [weight._backward_hooks, weight._post_accumulate_grad_hooks]
        if not all(is_library(hook) for group in groups for hook in (group or {}).values()):
            found.append(f"a hook on {part or 'the model'}")
        is_replaced = "forward" in vars(module) and not getattr(model, "use_kernels", False)
        is_fused = getattr(module.forward, "__globals__", {}).get("__name__") == _FUSED_HEAD
        if is_replaced and not (is_fused or is_library(module.forward)):
            found.append(f"another forward of {part or 'the model'}")
    if found or isinstance(model, str | None):
        return [refused(name, got, remedy) for got in found]
    remedy = (
        "set it in the config from which the model is made, or leave it: only weights and config are saved"
    )
    return [refused(name, got, remedy) for got in filter(None, [difference(base)])]


def bit_sum(weight: torch.Tensor) -> int:
    """Return the sum of a tensor's bits, read as integers."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().view(integer).sum(dtype=torch.int64))


def weight_sums(model: Any) -> dict[str, int]:
    """Return the sums of a model's weights by name, without those into which an adapter may be merged."""
    weights = model.named_parameters() if isinstance(model, torch.nn.Module) else ()
    return {name: bit_sum(weight) for name, weight in weights if ".base_layer." not in name}


def changed_weights(name: str, model: Any, before: Mapping[str, int]) -> list[ConfigError]:
    """Return an error if a script changed weights of a model whose sums were `before`."""
    now = weight_sums(model)
    changed = [key for key in before if now.get(key, before[key]) != before[key]]
    remedy = "change them before the trainer is made, or make a new trainer with this model"
    return [refused(f"trainer.{name}", f"other weights: {first_few(changed)}", remedy)] if changed else []


def own_tokenizer(tokenizer: Any, name: str) -> list[ConfigError]:
    """Return an error for each class or method of the script in a tokenizer or a processor."""
    parts = (tokenizer, *(getattr(tokenizer, part, None) for part in ("tokenizer", "image_processor")))
    found = list[str]()
    for part in filter(lambda part: part is not None, parts):
        kind = type(part)
        if kind.__module__.split(".")[0] not in _TOKENIZERS:
            found.append(f"a class of its own, {kind.__name__}")
        replaced = [key for key, value in vars(part).items() if callable(value) and hasattr(kind, key)]
        found += [f"another {key} of a {kind.__name__}" for key in replaced]
    remedy = "change the texts of the records, or set its chat_template: it is saved, and loaded by its class"
    return [refused(name, got, remedy) for got in found]


def changed_arguments(args: TrainerArguments, before: dict[str, Any]) -> list[ConfigError]:
    """Return an error for each argument that was changed after the trainer was made."""
    remedy = f"set it in {type(args).__name__}(...), before the trainer is made"
    # Others are notes of the script.
    names = [entry.name for entry in fields(args)]
    changed = [name for name in names if before[name] != getattr(args, name)]
    return [refused(f"args.{name}", str(getattr(args, name)), remedy) for name in changed]


def changed_attributes(trainer: Any, given: Mapping[str, Any]) -> list[ConfigError]:
    """Return an error for each attribute of a trainer that was set after it was made, and that TRL reads."""
    remedy, found = "pass it, or set it by the arguments, when the trainer is made", vars(trainer)
    changed = [name for name, value in given.items() if found[name] is not value]
    changed += [
        name
        for name in _LIVE
        if found.get(name) is not None and found[name] != getattr(trainer.args, name, None)
    ]
    return [refused(f"trainer.{name}", type(found[name]).__name__, remedy) for name in changed]
