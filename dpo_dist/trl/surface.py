"""Which names of TRL's trainers are here, what to use in place of the others, and what a script may name."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import Trainer

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.convert.arguments import TrainerArguments, refused
from dpo_dist.trl.callbacks import NOT_HERE
from dpo_dist.trl.unseen import REMEDIES, changed_methods, overrides, patches

_INHERITED = {
    *("init_hf_repo", "is_local_process_zero", "is_world_process_zero", "get_num_trainable_parameters"),
    *("log_metrics", "metrics_format", "save_metrics", "save_state"),
}
"""The methods of transformers' `Trainer` that are used as they are; its others are not here."""
_SAME_NAME = (
    *("beta", "loss_type", "loss_weights", "ld_alpha", "label_smoothing", "padding_free", "use_weighting"),
    *("f_divergence_type", "f_alpha_divergence_coef", "desirable_weight", "undesirable_weight"),
)
ARGUMENT_OF = {name: name for name in _SAME_NAME}
ARGUMENT_OF |= {"loss_types": "loss_type", "precompute_ref_logps": "precompute_ref_log_probs"}
"""Attributes that TRL's trainers copy from their arguments, with the argument's name."""
NO_IGNORED_KEYS = (
    "leave it out: an evaluation here keeps no outputs of the model, so there are none to ignore"
)
INSTEAD = {
    **REMEDIES,
    **{name: NOT_HERE[name] for name in ("optimizer", "lr_scheduler")},
    **dict.fromkeys(
        ("predict", "prediction_step", "evaluation_loop"),
        "call evaluate(dataset, metric_key_prefix='test'): it returns the metrics, and writes the numbers of "
        "each pair below OUTPUT_DIR/run/evaluation",
    ),
    **dict.fromkeys(
        ("get_train_dataloader", "get_eval_dataloader", "get_test_dataloader", "data_collator"),
        "iterate over train_dataset or eval_dataset, which have token ids: batches are packed inside the run",
    ),
    "hyperparameter_search": "use dpo-dist sweep with the file dpo_dist.yaml in output_dir",
}
"""What to use in place of a method or attribute that is not here."""
_LIBRARIES = ("builtins", "dpo_dist", "transformers")
_MAY_BE_SET = {"_tag_names"}
"""Names of a trainer here that a script's class may have, as below TRL's trainers."""


class NotOffered:
    """A method of transformers' `Trainer` that is not here: `__getattr__` of the trainer says so."""

    def __get__(self, trainer: Any, kind: Any = None) -> Any:
        raise AttributeError


def offer_only_own(trainer: type) -> frozenset[str]:
    """Hide all names of transformers' `Trainer` that a class below it does not have; return those of both."""
    offered = frozenset(vars(trainer)) | _INHERITED
    for name in dir(Trainer):
        if name not in offered and not name.startswith("__"):
            setattr(trainer, name, NotOffered())
    return offered


def fixed(read: Callable[[Any], Any]) -> Any:
    """Return a property that a script cannot set."""

    def refuse(_: Any, value: Any) -> None:
        remedy = "pass it, or set it by the arguments, when the trainer is made"
        raise refused(f"trainer.{read.__name__}", type(value).__name__, remedy)

    return property(read, refuse)


def taken_names(trainer: type, kind: type, attributes: Iterable[str]) -> list[ConfigError]:
    """Return an error for each name of a script's own that `trainer`, the class here, uses itself.

    These are what `trainer` defines or, for attributes that `__init__` sets, annotates. `kind`: the script's
    class; `attributes`: what it has set before it calls `__init__`.
    """
    used = {*vars(trainer), *trainer.__annotations__} - {*dir(Trainer)} - _MAY_BE_SET
    places = [*map(vars, _of_script(kind)), attributes]
    return names_in_use(name for place in places for name in place if name in used)


def names_in_use(names: Iterable[str]) -> list[ConfigError]:
    """Return an error for each of these names."""
    remedy = "give it another name: dpo_dist's trainer uses this one"
    return [refused(f"trainer.{name}", "a name of the script's own", remedy) for name in names]


def uncalled_overrides(
    trainer: Any,
    args: TrainerArguments,
    offered: Iterable[str],
    as_defined: Mapping[Any, Mapping[str, Any]],
) -> list[ConfigError]:
    """Return errors for methods of a subclass, or that a script has set, which nothing calls.

    A script calls `evaluate` and `save_model`; the loop of dpo_dist, other than TRL's, does not.
    `as_defined`: the classes here with what they had when they were imported.
    """
    by_loop = {"evaluate": args.eval_strategy, "save_model": args.save_strategy}
    by_script = {name for name in offered if by_loop.get(name, "no") == "no"} - {"create_model_card"}
    places = [(kind.__name__, set(vars(kind))) for kind in _of_script(type(trainer))]
    places += [
        (kind.__name__, {name for name in vars(kind) if vars(kind)[name] is not before.get(name)})
        for kind, before in as_defined.items()
    ]
    places += [("Trainer", patches()), ("trainer", set(vars(trainer)))]
    return overrides(places, by_script) + changed_methods(args)


def _of_script(kind: type) -> list[type]:
    return [each for each in kind.__mro__ if each.__module__.split(".")[0] not in _LIBRARIES]
