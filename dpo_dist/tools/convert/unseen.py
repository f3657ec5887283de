"""What a script of TRL changes in Python where dpo_dist would not see it: each is an error that names it."""

from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from transformers import Trainer

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.convert.arguments import TrainerArguments, refused

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
    "compute_ref_log_probs compute_reference_log_probs _compute_logps _compute_kl_logps null_ref_context "
    "training_step prediction_step",
    _OPTIMIZER: "create_optimizer create_scheduler create_optimizer_and_scheduler get_decay_parameter_names "
    "get_optimizer_cls_and_kwargs",
    _DATA: "get_train_dataloader get_eval_dataloader get_test_dataloader _get_dataloader _get_train_sampler "
    "_get_eval_sampler _prepare_dataset _prepare_inputs _prepare_input tokenize_row process_row "
    "tokenize_batch build_tokenized_answer _set_signature_columns_if_needed",
}
_REMEDIES = {name: remedy for remedy, names in _METHODS.items() for name in names.split()}
_ADAPTER_PARTS = (".lora_", ".modules_to_save.", ".trainable_tokens_")
# Hooks of these packages belong to how a model is loaded, as that of `enable_input_require_grads`.
_LIBRARIES = ("accelerate", "peft", "torch", "transformers")


def overrides(trainer: Any, ours: Iterable[str]) -> list[ConfigError]:
    """Return an error for each method that the trainer's class, or the script, replaces and nothing calls.

    `ours`: the methods that dpo_dist has, which stay as they are where the script calls them.
    """
    theirs = {name for name in dir(Trainer) if not name.startswith("__")} | _REMEDIES.keys()
    unseen = theirs - set(ours)
    kinds = (kind for kind in type(trainer).__mro__ if kind.__module__ != "dpo_dist.trl")
    places = [(kind.__name__, vars(kind)) for kind in kinds]
    return [
        refused(f"{place}.{name}", "an override that would never be called", _REMEDIES.get(name, _ELSEWHERE))
        for place, found in [*places, ("trainer", vars(trainer))]
        for name, value in found.items()
        if name in unseen and callable(value)
    ]


def frozen_weights(model: Any, name: str) -> list[ConfigError]:
    """Return errors for weights of a model in memory that are frozen, or trained, other than here."""
    weights = {} if isinstance(model, str) else dict(model.named_parameters())
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    remedy = "unfreeze them, or train an adapter by peft_config: here all weights are trained"
    if isinstance(model, PeftModel):
        # Here all parts of an adapter are trained, and none of its base.
        adapter = {key for key in weights if any(part in key for part in _ADAPTER_PARTS)}
        if extra := [key for key in weights if key not in adapter and weights[key].requires_grad]:
            remedy = "name these modules in modules_to_save of the LoraConfig"
            return [refused(name, f"a PeftModel that also trains {_shown(extra)}", remedy)]
        frozen = [key for key in frozen if key in adapter and ".default" in key]
        remedy = "load the adapter with is_trainable=True: here all its parts are trained"
    return [refused(name, f"a model with frozen weights: {_shown(frozen)}", remedy)] if frozen else []


def hooks(model: Any, name: str) -> list[ConfigError]:
    """Return an error for each module of a model in memory with a hook of the script."""
    remedy = "remove the hooks: the model is saved and loaded again by its class"
    return [
        refused(name, f"a hook on {module_name or 'the model'}", remedy)
        for module_name, module in getattr(model, "named_modules", tuple)()
        for found in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        if any(
            str(getattr(hook, "__module__", "")).split(".")[0] not in _LIBRARIES for hook in found.values()
        )
    ]


def changed_arguments(args: TrainerArguments, before: dict[str, Any]) -> list[ConfigError]:
    """Return an error for each argument that was changed after the trainer was made."""
    remedy = f"set it in {type(args).__name__}(...), before the trainer is made"
    changed = [key for key, value in vars(args).items() if key not in before or before[key] != value]
    return [refused(f"args.{key}", str(getattr(args, key)), remedy) for key in changed]


def _shown(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
