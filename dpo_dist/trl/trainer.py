"""`DPOTrainer` and `KTOTrainer`: the surface of TRL's trainers, and the runs below it."""

import contextlib
import copy
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, Trainer
from transformers.trainer_callback import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from dpo_dist import api
from dpo_dist.config.load import from_yaml, load_run_config
from dpo_dist.config.metrics import is_evaluation, results_name
from dpo_dist.config.rules import best_direction
from dpo_dist.config.run_folder import RunFolder, best_checkpoint, checkpoint_folders
from dpo_dist.config.schema import DataConfig, Direction, FinalModel, SourceConfig
from dpo_dist.distributed.checkpoint.saver import SavedSlices
from dpo_dist.foundation.errors import (
    ConfigError,
    DpoDistError,
    ExitCode,
    RunOutcome,
    StoppedError,
    raise_all,
)
from dpo_dist.foundation.files import locked, write_text
from dpo_dist.foundation.process import this_rank
from dpo_dist.foundation.signals import BY_CALLBACK
from dpo_dist.model.architectures import auto_class
from dpo_dist.model.files.folder import is_adapter, model_folder
from dpo_dist.model.lora import find_modules, tied_pair
from dpo_dist.objective.router import AUX_LOSS
from dpo_dist.tools.convert.arguments import (
    DPOConfig,
    KTOConfig,
    TrainerArguments,
    adapter_keys,
    not_offered,
    refused,
)
from dpo_dist.tools.convert.reading import ForeignRun
from dpo_dist.tools.convert.translate import Translation, translate_run
from dpo_dist.training.start.resume import has_other_length, read_state
from dpo_dist.trl.callbacks import NOT_HERE, AbsentError, Follower
from dpo_dist.trl.data import examples, longest_tokens, sources, with_token_ids
from dpo_dist.trl.launcher import launcher_keys
from dpo_dist.trl.models import base_of, saved, tokenization, uncompiled, unseen
from dpo_dist.trl.processes import Processes
from dpo_dist.trl.unseen import (
    REMEDIES,
    changed_arguments,
    changed_attributes,
    changed_methods,
    changed_weights,
    overrides,
    own_tokenizer,
    patches,
    weight_sums,
)
from dpo_dist.verbs import evaluate, export

_BITS = ("load_in_", "bnb_4bit_quant_type")
_HUB = ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")
_INHERITED = {"init_hf_repo", "is_local_process_zero"}
_INHERITED |= {
    "get_num_trainable_parameters",
    "is_world_process_zero",
    "log_metrics",
    "metrics_format",
    "save_metrics",
    "save_state",
}
"""The methods of transformers' `Trainer` that are used as they are; its others are not here."""
_OF_ARGUMENTS = {name: name for name in ("beta", "loss_type", "loss_weights", "ld_alpha", "label_smoothing")}
_OF_ARGUMENTS |= {name: name for name in ("f_divergence_type", "f_alpha_divergence_coef", "use_weighting")}
_OF_ARGUMENTS |= {name: name for name in ("desirable_weight", "undesirable_weight", "padding_free")}
_OF_ARGUMENTS |= {"loss_types": "loss_type", "precompute_ref_logps": "precompute_ref_log_probs"}
"""Attributes of TRL's trainers that are arguments."""
_LEAVE_OUT = "leave it out: what a model returns is not gathered"
_LOOK = "evaluate(dataset, metric_key_prefix='test') has the metrics, and OUTPUT_DIR/run/evaluation each pair"
_ELSEWHERE = {
    **REMEDIES,
    **{name: NOT_HERE[name] for name in ("optimizer", "lr_scheduler")},
    **dict.fromkeys(("predict", "prediction_step", "evaluation_loop"), _LOOK),
    **dict.fromkeys(
        ("get_train_dataloader", "get_eval_dataloader", "get_test_dataloader", "data_collator"),
        "iterate over train_dataset or eval_dataset, which have token ids: batches are packed inside the run",
    ),
    "hyperparameter_search": "use dpo-dist sweep with the file dpo_dist.yaml in output_dir",
}
"""What to use in place of what is not here."""
_LIBRARIES = ("builtins", "dpo_dist", "transformers")
_OF_TRL = {"_tag_names"}
"""Names of ours that a script's class may have, as below TRL's trainers."""


class _Missing:
    """A method of transformers' `Trainer` that is not here: `__getattr__` of the trainer says so."""

    def __get__(self, trainer: Any, kind: Any = None) -> Any:
        raise AttributeError


def _fixed(read: Callable[[Any], Any]) -> Any:
    """Return a property that a script cannot set."""

    def refuse(_: Any, value: Any) -> None:
        remedy = "pass it, or set it by the arguments, when the trainer is made"
        raise refused(f"trainer.{read.__name__}", type(value).__name__, remedy)

    return property(read, refuse)


class DPOTrainer(Trainer):  # type: ignore[misc]
    """TRL's `DPOTrainer`: its arguments, methods and `state`; trains with dpo_dist."""

    config: type[TrainerArguments] = DPOConfig
    _tag_names = ("trl", "dpo")

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: TrainerArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Iterable[TrainerCallback] | None = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        """Write models and data in memory, and the translation, below `output_dir`; name what is refused."""
        before = dict(vars(self))
        others |= {"data_collator": data_collator, "compute_metrics": compute_metrics}
        raise_all(_collisions(type(self), before))
        raise_all(not_offered(self.config, args, others | {"optimizers": optimizers}))
        model, ref_model = uncompiled(model), uncompiled(ref_model)
        raise_all(self._overrides(args) + unseen(model, ref_model, has_adapter=peft_config is not None))
        name = Path(model if isinstance(model, str) else model.config.name_or_path).name
        self.args = args or self.config(output_dir=f"{name}-{self.config.__name__[:3]}")
        self.folder = Path(self.args.output_dir)
        self.run = RunFolder(self.folder / "run")
        self.processing_class = processing_class
        self.state, self.control = TrainerState(), TrainerControl()
        self.arguments: dict[str, Any] = {}  # as they were when the trainer was made
        self.accelerator, self._follower = Processes(self.args), Follower(self)
        self.callback_handler = self._follower.handler
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()
        # The run's command comes from TRL's arguments, and from keys of ours for what is no argument there:
        # both become a file and words.
        self._keys = self.args.keys(_weights(model))
        self._own: dict[str, Any] = {"run.dir": str(self.run), "run.root": str(self.folder)}
        self._words, self._has_trained, self._is_complete = list[str](), False, False
        # What the script passed, for the attributes that it may read: a model in memory is trained in place.
        self._given: Any = None if isinstance(model, str) or peft_config is not None else model
        self._given_data, self._given_reference = (train_dataset, eval_dataset), ref_model
        for callback in callbacks or ():
            self.add_callback(callback)
        has_adapter = peft_config is not None or hasattr(model, "peft_config")
        self._place_data(train_dataset, eval_dataset, has_adapter=has_adapter)
        given = quantization_config or self._keys["model_init_kwargs"].pop("quantization_config", None)
        given = given or getattr(getattr(model, "config", None), "quantization_config", None)
        if given is not None:
            given = BitsAndBytesConfig.from_dict(given) if isinstance(given, Mapping) else given
            self._keys |= {key: value for key, value in given.to_dict().items() if key.startswith(_BITS)}
            if not isinstance(model, str) and not hasattr(model, "peft_config"):
                model = model.config.name_or_path  # whose weights are quantized again
        self._place_models(model, ref_model, peft_config)
        self._place_hub()
        if self.args.max_length is None:
            self._own["data.max_length"] = self._longest()
        self._check()
        # Models in memory are written once nothing is left to refuse.
        for place, key, unsaved, tokenizer in self._unsaved:
            place[key] = saved(unsaved, tokenizer, self.folder / "models")
        self._start = self._keys.get("adapter_name_or_path", self._own["model.path"])
        self._translate()
        self.state.max_steps = self.args.max_steps
        raise_all(_named_as_ours([name for name in before if vars(self)[name] is not before[name]]))
        # A run reads files: what a script changes after this would have no effect: it is refused.
        self.arguments = copy.deepcopy(dict(vars(self.args)))
        fixed = ("processing_class", "folder", "run", "_start", "_own", "_keys", "_eval", "_facts")
        self._given_once = {name: vars(self)[name] for name in fixed}
        self._tokenization = _tokenization(self.processing_class)
        self._sums = {"model": weight_sums(self._given), "ref_model": weight_sums(ref_model)}
        self._follower.call("on_init_end")

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or one of a class; its events happen on rank 0."""
        callback = callback() if isinstance(callback, type) else callback
        if type(callback) is EarlyStoppingCallback and not callback.early_stopping_threshold:
            # As a key it also holds for a run that is resumed.
            self._keys["early_stopping_patience"] = callback.early_stopping_patience
            if self._words:  # else the trainer is still being made
                self._translate()
        else:
            self._follower.add(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or one of a class, and return it."""
        kind = callback if isinstance(callback, type) else type(callback)
        if kind is EarlyStoppingCallback and "early_stopping_patience" in self._keys:
            patience = self._keys.pop("early_stopping_patience")
            self._translate()
            return EarlyStoppingCallback(patience)
        return self.callback_handler.pop_callback(callback)

    remove_callback = pop_callback

    def train(
        self,
        resume_from_checkpoint: bool | str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> TrainOutput:
        """Train; return what TRL's trainer returns.

        `resume_from_checkpoint`: true: from the last checkpoint, which must be there; a path: it must be the
        last one. Without it a run of the same arguments that was stopped goes on, and any other run that is
        in `output_dir` is moved aside.
        """
        raise_all(self._changes(trial, ignore_keys_for_eval))
        self._find_start(resume_from_checkpoint)
        follower, start = self._follower, time.time()
        follower.has_begun = False
        try:
            with self._own_words():
                summary = api.train(self._words, on_row=self._on_row, on_moment=follower.on_moment)
        except StoppedError as stop:  # before the first step
            self.accelerator.print(stop)
            raise SystemExit(ExitCode.preempted) from stop
        finally:
            follower.policy = None
        if summary["exit"] == RunOutcome.preempted and BY_CALLBACK not in summary["stopped_by"].split(", "):
            raise SystemExit(ExitCode.preempted)  # the script would take these weights for the trained model
        self._has_trained, self._is_complete = True, summary["exit"] == RunOutcome.completed
        steps, seconds = summary["steps"], summary["train_seconds"]
        self.state.global_step, self.state.max_steps = steps, max(steps, self.state.max_steps)
        if not follower.has_begun:
            follower.call("on_train_begin")  # the run was complete, or this is not rank 0
            self.take_rows()
        self.__dict__.pop("_reference", None)  # it may have followed the policy
        if isinstance(self._given, PeftModel):
            self._given.load_adapter(str(self._result()), "default", is_trainable=True)
        elif self._given is not None:
            self._given.load_state_dict(self._loaded().state_dict())
        self._sums["model"] = weight_sums(self._given)
        raw = [row for row in api.read_metrics(self.run.path) if "loss" in row]
        self.state.epoch = raw[-1].get("epoch") if raw else self.state.epoch
        ends = [row["step"] for row in raw]
        mean = (
            float(np.average([row["loss"] for row in raw], weights=np.diff(ends, prepend=0))) if raw else 0.0
        )
        metrics = {"train_runtime": seconds or time.time() - start, "train_loss": mean}
        if seconds:
            metrics |= {"train_samples_per_second": summary["pairs_per_second"]}
            metrics |= {"train_steps_per_second": steps / seconds}
        self.log({**self._rest(raw), **metrics, "step": steps})
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            self.push_to_hub()
        follower.call("on_train_end")
        return TrainOutput(steps, mean, metrics)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the trained model, before training the one that was given; return the metrics."""
        self._check_outside("evaluate", "set control.should_evaluate: the metrics come to on_evaluate")
        if ignore_keys is not None:
            raise refused("evaluate", f"ignore_keys={ignore_keys!r}", _LEAVE_OUT)
        if isinstance(eval_dataset, str):
            given = [source for source in self._eval if source.get("label") == eval_dataset]
        elif eval_dataset is None:
            given = self._eval
        else:
            folder, is_stored = self.folder / "encoded" / "records", self.args.precompute_ref_log_probs
            given = sources(eval_dataset, "eval_dataset", folder, is_stored=is_stored)
        if not given:
            raise refused("evaluate", "no eval_dataset", "pass one to evaluate, or to the trainer")
        config = load_run_config(self._words)
        data = [SourceConfig(**source) for source in given]
        evaluation = replace(config.evaluation, model=self._result() or self._start, data=data)
        with self._own_words(), api.as_guest():
            evaluate.main(replace(config, evaluation=evaluation))
        results, metrics = json.loads(self.run.evaluation.results.read_text()), dict[str, float]()
        for label in [source["label"] for source in given if "label" in source] or [""]:
            found = results[results_name(label) if label else "all"]
            names = {key: f"{metric_key_prefix}_{label}_".replace("__", "_") for key in found}
            row = {names[key] + key.removeprefix("eval_"): found[key] for key in found if key != "intervals"}
            metrics |= row
            self.log({**row, "step": self.state.global_step})
            self._follower.call("on_evaluate", metrics=row)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002
        """Keep a row of the run, and tell the callbacks: an override is called for each row."""
        if self.state.epoch is not None:
            logs = {"epoch": self.state.epoch, **logs}
        self.state.log_history.append({**logs, "step": logs.get("step", self.state.global_step)})
        self._follower.call("on_log", logs=logs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Copy the trained model, or the one that was given, with its tokenizer, to a folder."""
        remedy = "set control.should_save for a checkpoint, or save kwargs['model'] of on_step_end"
        self._check_outside("save_model", remedy)
        options, folder = self._keys["model_init_kwargs"], Path(output_dir or self.folder)
        source = self._result() or model_folder(self._start, options.get("revision"), accepts_adapter=True)
        if this_rank() == 0:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            if hasattr(self.processing_class, "image_processor"):
                self.processing_class.save_pretrained(folder)
            if (
                self._given is not None
                and not isinstance(self._given, PeftModel)
                and self._given.can_generate()
            ):
                self._given.generation_config.save_pretrained(folder)
            if "data.chat_template" in self._own:
                write_text(folder / "chat_template.jinja", self.processing_class.chat_template)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,  # noqa: ARG002  (it always waits: the files are temporary)
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **_: Any,
    ) -> Any:
        """Upload what `save_model` writes to `args.hub_model_id`, or one with `output_dir`'s name."""
        self._check_outside("push_to_hub", "push kwargs['model'] of on_step_end")
        self._follower.call("on_push_begin")
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder, _internal_call=True)
            if not self.is_world_process_zero():
                return None
            return HfApi(token=token or self.args.hub_token).upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=folder,
                commit_message=commit_message,
                revision=revision or self.args.hub_revision,
            )

    def end(self, *_: Any, **__: Any) -> None:
        """Do nothing: trackers and processes have ended with the run, and its model has a card."""

    create_model_card = end

    @_fixed
    def model(self) -> Any:
        """The model that was given, or loaded once; after `train` with the trained weights.

        To a callback it is the one that trains.
        """
        if self._follower.policy is not None:
            if self._follower.handler.model is None:
                raise refused("trainer.model", "while it trains", "use kwargs['model'] of a callback")
            return self._follower.handler.model
        return self.own_model()

    model_wrapped = model

    def own_model(self) -> Any:
        """Return the model that was given, or loaded once."""
        if self._given is None:
            self._given = self._loaded()
            self._sums["model"] = weight_sums(self._given)
        if not getattr(self._given, "model_tags", None):
            self._given.add_model_tags([*self._tag_names])
        return self._given

    @_fixed
    def ref_model(self) -> Any:
        """The reference that was given, or a copy of the model before training; None with an adapter."""
        return self._reference

    @cached_property
    def _reference(self) -> Any:
        if self._given_reference is not None and not isinstance(self._given_reference, str):
            return self._given_reference
        if self._given_reference is None and (self._has_adapter or self.args.precompute_ref_log_probs):
            return None
        source = self._own.get("reference.path", self._own["model.path"])
        reference = self._from_files(source).requires_grad_(False)
        folders = checkpoint_folders(self.run.checkpoints) if self._has_trained else []
        if self.args.sync_ref_model and folders:
            written = SavedSlices.find(folders[0], "reference")
            for name, weight in reference.named_parameters():
                weight.data.copy_(written.whole(name))
        return reference

    @_fixed
    def train_dataset(self) -> Any:
        """The records of `train_dataset` that are trained, with their token ids."""
        return self._encoded[0]

    @_fixed
    def eval_dataset(self) -> Any:
        """The records of `eval_dataset` that are scored, with their token ids."""
        return self._encoded[1]

    @cached_property
    def _encoded(self) -> list[Any]:
        limits = load_run_config(self._words).data
        places = zip(self._given_data, (self._own["data.train"], self._eval), strict=True)
        return [with_token_ids(given, at, self.processing_class, limits) for given, at in places]

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the loss of a mixture of experts has the term that balances them."""
        return bool(self._keys["router_aux_loss_coef"])

    @property
    def is_fsdp_enabled(self) -> bool:
        """False: weights are sharded by ZeRO."""
        return False

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that TRL's trainer copies from its arguments.

        For others an error says what to use.
        """
        if name in _OF_ARGUMENTS and "args" in self.__dict__:
            return getattr(self.args, _OF_ARGUMENTS[name])
        if name.startswith("__") or "args" not in self.__dict__:
            raise AttributeError(name)
        public = ", ".join(sorted(entry for entry in _OFFERED if entry[0] != "_"))
        remedy = _ELSEWHERE.get(
            name, f"a trainer has its arguments as `args`, its rows as `state`, and {public}"
        )
        raise AbsentError("dpo_dist's trainer does not have this", where=f"trainer.{name}", remedy=remedy)

    def _check_outside(self, method: str, remedy: str) -> None:
        """Refuse a method whose model is the one before training while a run trains."""
        if self._follower.policy is not None:
            raise refused(f"trainer.{method}", "a call while it trains", remedy)
        raise_all(self._changed_weights())

    def _changed_weights(self) -> list[ConfigError]:
        """Return errors for weights that a script changed since the run, or its start, knows them."""
        models = {"model": self._given, "ref_model": self._given_reference}
        return [
            error for name, sums in self._sums.items() for error in changed_weights(name, models[name], sums)
        ]

    def take_rows(self, up_to: float = math.inf) -> None:
        """Set `state` by the rows of the run in `output_dir`, as TRL's trainer logs them."""
        every = api.read_metrics(self.run.path)
        rows = [shown for row in every if row["step"] <= up_to for shown in self._shown(row)]
        self.state.log_history = rows
        for row in rows:
            self._note_best(row)

    def _shown(self, row: dict[str, float], *, is_asked: bool = False) -> list[dict[str, float]]:
        """Return a row as those of TRL: one for each evaluation set, none for what TRL does not log.

        `is_asked`: a callback asked for it.
        """
        if row["step"] == 0 and not self.args.eval_on_start:
            return []
        if "loss" in row:
            # TRL logs the steps after the last due row in the row at the end.
            every, step = self._keys.get("logging_steps", 0), row["step"]
            is_due = self.args.logging_strategy == "epoch" or (
                self.args.logging_strategy == "steps" and step % every == 0
            )
            is_due |= is_asked or (self.args.logging_first_step and step == 1)
            if step == self.state.max_steps and not is_due:
                return []
            return [_as_trl_names(row)]
        if not (labels := [source["label"] for source in self._eval if "label" in source]):
            return [row]
        shown = list[dict[str, float]]()
        for label in labels:
            end = f"/{label}" if len(labels) > 1 else ""  # the only set has no name in a row
            own = [key for key in row if key.startswith("eval_") and key.endswith(end)]
            named = {f"eval_{label}_{key.removeprefix('eval_').removesuffix(end)}": row[key] for key in own}
            shown.append({**{key: row[key] for key in ("step", "epoch") if key in row}, **named})
        return shown

    def _rest(self, losses: list[dict[str, float]]) -> dict[str, float]:
        """Return the metrics of the last steps, if TRL logs them at the end only."""
        if not losses or self._shown(losses[-1]):
            return {}
        own = ("loss", "grad_norm", "learning_rate", "step")
        return {key: value for key, value in _as_trl_names(losses[-1]).items() if key not in own}

    def _on_row(self, row: dict[str, float]) -> None:
        """Log a row, on rank 0, as TRL's trainer does, and note the best evaluation."""
        self.state.global_step, self.state.epoch = int(row["step"]), row.get("epoch")
        shown = self._shown(row, is_asked=self.control.should_log)
        for logs in shown:
            self.log(logs)
            if is_evaluation(row):
                self._follower.call("on_evaluate", metrics=logs)
        for logs in shown:
            self._note_best(logs)

    def _note_best(self, row: dict[str, float]) -> None:
        """Keep the value and the step of a row of an evaluation, if it is the best so far."""
        value = row.get(f"eval_{self._best_metric}")
        best, sign = self.state.best_metric, 1 if self._is_greater_better else -1
        if value is not None and (best is None or sign * value > sign * best):
            self.state.best_metric, self.state.best_global_step = value, int(row["step"])

    def _overrides(self, args: TrainerArguments | None) -> list[ConfigError]:
        """Return errors for the methods of a subclass that nothing calls.

        A script calls `evaluate` and `save_model`; the loop of dpo_dist, other than TRL's, does not.
        """
        args = args or self.config()
        strategies = {"evaluate": args.eval_strategy, "save_model": args.save_strategy}
        by_script = {name for name in _OFFERED if strategies.get(name, "no") == "no"} - {"create_model_card"}
        kinds = [kind for kind in type(self).__mro__ if kind.__module__.split(".")[0] not in _LIBRARIES]
        places = [(kind.__name__, set(vars(kind))) for kind in kinds]
        for kind, given in _OURS.items():  # a method may have been set on the class
            places.append(
                (kind.__name__, {name for name in vars(kind) if vars(kind)[name] is not given.get(name)})
            )
        places += [("Trainer", patches()), ("trainer", set(vars(self)))]
        return overrides(places, by_script) + changed_methods(args)

    def _changes(self, trial: Any, ignore_keys: Any) -> list[ConfigError]:
        """Return errors for what a script changed after the trainer was made, and for options of `train`."""
        changed = changed_arguments(self.args, self.arguments) + changed_attributes(self, self._given_once)
        changed += self._follower.faults()
        model = self._start if self._given is None else self._given
        if trial is not None:
            changed.append(refused("train", "trial", _ELSEWHERE["hyperparameter_search"]))
        if ignore_keys is not None:
            changed.append(refused("train", "ignore_keys_for_eval", _LEAVE_OUT))
        changed += unseen(model, self._given_reference, has_adapter=self._has_adapter)
        if self._tokenization != (now := _tokenization(self.processing_class)):
            got = "another chat_template" if self._tokenization[0] == now[0] else "other tokens"
            remedy = "change it before the trainer is made: records are encoded as it was then"
            changed.append(refused("trainer.processing_class", got, remedy))
        changed += own_tokenizer(self.processing_class, "trainer.processing_class")
        if not self._has_trained:  # else the checkpoint has the weights
            changed += self._changed_weights()
        return self._overrides(self.args) + changed

    def _find_start(self, wanted: bool | str | None) -> None:
        """Check `resume_from_checkpoint`, or move a run aside that TRL would replace."""
        if wanted:
            self._check_resume(str(wanted))
        elif self._has_trained:
            remedy = (
                "pass resume_from_checkpoint=True to go on from its last checkpoint, or make a new trainer"
            )
            remedy += ": with model=trainer.model it trains on, and ref_model is the reference"
            raise refused("train", "a second call on the same trainer", remedy)
        elif this_rank() != 0:
            self._wait_for_rank_0("moved the former run aside", lambda: not self._is_replaced())
        elif self._is_replaced():
            numbers = (number for number in range(1, 10**6) if not Path(f"{self.run}-{number}").exists())
            aside = Path(f"{self.run}-{next(numbers)}")
            with locked(self.run.lock, "trains in this output_dir", "wait for it, or set another output_dir"):
                self.run.path.rename(aside)
            self.accelerator.print(f"{self.folder} has another run, kept as {aside}; training starts anew")

    def _wait_for_rank_0(self, work: str, is_done: Callable[[], bool]) -> None:
        """Wait until rank 0 has done what this rank needs; if that fails, a launcher ends this process."""
        seconds = load_run_config(self._words).parallelism.timeout_seconds
        end = time.monotonic() + seconds
        while not is_done():
            if time.monotonic() > end:
                remedy = "see the error of rank 0; words=['parallelism.timeout_seconds=3600'] waits longer"
                raise DpoDistError(f"rank 0 has not {work} in {seconds} s", remedy=remedy)
            time.sleep(0.1)

    def _is_replaced(self) -> bool:
        """Return whether the run in `output_dir` is complete, or one of other arguments, models or data."""
        state, identity = read_state(self.run), load_run_config(self._words).identity
        return state is not None and (
            state.is_finished or state.identity.get("run_digest") != identity.digest
        )

    def _check_resume(self, wanted: str) -> None:
        """Check that there is a checkpoint of these arguments, and that it is `wanted` if this is a path."""
        last = next(iter(checkpoint_folders(self.run.checkpoints)), None)
        if last is None:
            remedy = "there is no checkpoint yet: leave it out, and train() continues one if there is one"
            raise refused("resume_from_checkpoint", wanted, remedy)
        if wanted != "True" and last.resolve() != Path(wanted).resolve():
            raise refused("resume_from_checkpoint", wanted, f"pass True or {last}")
        state, identity = read_state(self.run), load_run_config(self._words).identity
        if state is None or has_other_length(state.identity, identity):
            return
        if state.identity.get("run_digest") != identity.digest:
            remedy = "leave it out to train from the start (what is there is kept), or restore the arguments"
            raise refused("resume_from_checkpoint", f"{last}, of other arguments or data", remedy)

    @contextlib.contextmanager
    def _own_words(self) -> Iterator[None]:
        """Say in the words of a script what to do about an error of a run."""
        try:
            yield
        except DpoDistError as error:
            text = error.advice.text.replace("run.dir", "output_dir").replace("model.adapter", "peft_config")
            error.where = error.where.replace("model.adapter", "peft_config")
            if words := error.advice.write:
                text += f"; a script passes it as {self.config.__name__}(words={[*words]})"
            error.advice = replace(error.advice, text=text)
            raise

    def _from_files(self, source: str) -> Any:
        options = {"use_safetensors": True, "trust_remote_code": self.args.trust_remote_code}
        options |= {"dtype": "float32"} | self._keys["model_init_kwargs"]
        return auto_class(self._facts, self.args.trust_remote_code).from_pretrained(source, **options)

    def _loaded(self) -> Any:
        """Load the trained model, else the one that was named; with an adapter as a `PeftModel`."""
        trained = self._result()
        adapter = trained if trained and is_adapter(Path(trained)) else None
        model = self._from_files(self._own["model.path"] if adapter or not trained else trained)
        if adapter:
            return PeftModel.from_pretrained(model, adapter, is_trainable=True)
        return model if trained or self._peft is None else get_peft_model(model, self._peft)

    def _result(self) -> str | None:
        """Return the folder of the trained model; of a run that a callback stopped, write it first."""
        if not self._has_trained:
            return None
        if self._is_complete:  # else a model that is there is of an earlier, shorter run
            return str(self.run.model)
        if not (folders := checkpoint_folders(self.run.checkpoints)):
            return None
        config = from_yaml(self.run.config.read_text())
        best = best_checkpoint(self.run.checkpoints) if config.trainer.final is FinalModel.best else None
        exported = self.run.exported / (best or folders[0].name)
        if this_rank() == 0 and not exported.is_dir():
            with api.as_guest():
                export.main(config)
        self._wait_for_rank_0(f"written {exported}", exported.is_dir)
        return str(exported)

    def _place_data(self, train_dataset: Any, eval_dataset: Any, *, has_adapter: bool) -> None:
        """Set the keys of the records, and write them."""
        folder, is_stored = self.folder / "encoded" / "records", self.args.precompute_ref_log_probs
        self._own["samples.prompts"] = 0
        train = self._own["data.train"] = sources(train_dataset, "train_dataset", folder, is_stored=is_stored)
        self._eval, self.evaluates = list[dict[str, Any]](), self.args.eval_strategy != "no"
        if eval_dataset is not None:
            self._eval = sources(eval_dataset, "eval_dataset", folder, is_stored=is_stored)
        columns = train[0].get("columns", {})
        self._own["data.unpair"] = self.config is KTOConfig and "chosen" in columns
        if "images" in columns:
            trained = "none" if has_adapter else "tower"
            self._own |= {"model.images.train": trained, "data.images": str(Path.cwd())}
        if self.evaluates:
            self._own["data.eval"] = self._eval

    def _launched(self) -> dict[str, Any]:
        """Return the keys that a file of DeepSpeed or of the launcher means; that of the arguments wins."""
        given = self.args.deepspeed
        if isinstance(given, Mapping) or (given and Path(given).is_file()):
            del self._keys["deepspeed"]
        elif given or self.args.fsdp:
            return {}
        is_quantized = any(key.startswith(_BITS) for key in self._keys | self._keys["model_init_kwargs"])
        is_half = bool(self._keys.get("bf16", True) or self.args.fp16)
        keys, said = launcher_keys(os.environ, self.args, is_quantized=is_quantized, is_half=is_half)
        for line in said:
            self.accelerator.print(line)
        return keys

    def _place_models(self, model: Any, ref_model: Any, peft_config: Any) -> None:
        """Set the keys of the models; those in memory are saved when nothing is left to refuse."""
        own, tokenizer, options = self._own, self.processing_class, self._keys["model_init_kwargs"]
        raise_all(own_tokenizer(tokenizer, "processing_class"))
        named = {"revision": options.get("revision"), "trust_remote_code": self.args.trust_remote_code}
        self._unsaved = list[tuple[dict[str, Any], str, Any, Any]]()
        own |= self._launched()
        self._has_adapter = peft_config is not None or hasattr(model, "peft_config")
        if hasattr(model, "peft_config"):
            if peft_config is not None:
                raise refused("peft_config", "with a PeftModel", "merge_and_unload its adapter first")
            self._keys["use_peft"] = True
            self._place(self._keys, "adapter_name_or_path", model, None)
            model = base_of(model, options.get("revision"))
        source = model if isinstance(model, str) else model.config.name_or_path
        if tokenizer is None:
            tokenizer = self.processing_class = AutoTokenizer.from_pretrained(source, **named)
        elif isinstance(model, str):
            kept = AutoTokenizer.from_pretrained(source, **named)
            if tokenization(kept) != tokenization(tokenizer):
                kind = auto_class(AutoConfig.from_pretrained(source, **named), self.args.trust_remote_code)
                model = kind.from_pretrained(source, use_safetensors=True, **options | named)
            elif tokenizer.chat_template and tokenizer.chat_template != kept.chat_template:
                own["data.chat_template"] = str(self.folder / "chat_template.jinja")
                write_text(self.folder / "chat_template.jinja", tokenizer.chat_template)
        self._place(own, "model.path", model, tokenizer)
        self._peft = peft_config
        if ref_model is not None:
            self._place(own, "reference.path", ref_model, tokenizer)
        self._facts = AutoConfig.from_pretrained(model, **named) if isinstance(model, str) else model.config
        if peft_config is not None:
            self._keys |= adapter_keys(peft_config, self._facts.model_type)
            kind = auto_class(self._facts, self.args.trust_remote_code)
            with torch.device("meta"):
                whole = kind.from_config(copy.deepcopy(self._facts)) if isinstance(model, str) else model
            wanted, shared = list(peft_config.modules_to_save or ()), tied_pair(whole)
            tied = [one for one in wanted if any(f".{name}".endswith(f".{one}") for name in shared)]
            if tied and (len(tied) == 1 or not peft_config.ensure_weight_tying):
                every = [*dict.fromkeys([*wanted, *(name.rpartition(".")[2] for name in shared)])]
                remedy = f"write LoraConfig(modules_to_save={every}, ensure_weight_tying=True)"
                got = f"{', '.join(tied)}, which shares its weight"
                raise refused("peft_config.modules_to_save", got, remedy)
            with self._own_words():
                find_modules(whole, wanted)
        experts = getattr(self._facts.get_text_config(), "router_aux_loss_coef", None)
        given = self.args.router_aux_loss_coef
        if given and experts is None:
            remedy = f"leave it out: {self._facts.model_type} is no mixture of experts"
            raise refused("router_aux_loss_coef", str(given), remedy)
        self._keys["router_aux_loss_coef"] = (experts and "model" if given is None else given) or None

    def _place(self, keys: dict[str, Any], key: str, model: Any, tokenizer: Any) -> None:
        """Set a key to the name of a model, or note one in memory, whose folder its content will name."""
        keys[key] = model if isinstance(model, str) else str(self.folder / "models" / key)
        if not isinstance(model, str):
            self._unsaved.append((keys, key, model, tokenizer))

    def _place_hub(self) -> None:
        """Take the arguments of the hub, to which the trained model is pushed at the end."""
        self.hub_model_id = self.args.hub_model_id
        if "checkpoint" in str(getattr(self.args.hub_strategy, "value", self.args.hub_strategy)):
            remedy = "leave it out: the model is pushed at the end, and by save_model"
            raise refused("hub_strategy", str(self.args.hub_strategy), remedy)
        for key in _HUB:
            self._keys.pop(key, None)
        if self.args.push_to_hub:
            self.init_hf_repo()

    def _longest(self) -> int:
        """Return the tokens of the longest record, where none is cut."""
        every, template = [*self._own["data.train"], *self._eval], self._own.get("data.chat_template")
        if any("images" in source.get("columns", {}) for source in every):
            raise refused(
                "max_length", "None, with images", "set it to a number of tokens that fits all records"
            )
        self._keys.pop("max_length", None)
        limits = DataConfig(chat_template=template, unpair=self._own["data.unpair"], max_length=2**30)
        return longest_tokens(every, self.processing_class, limits)

    @property
    def _best_metric(self) -> str:
        return (self.args.metric_for_best_model or "").removeprefix("eval_")

    @property
    def _is_greater_better(self) -> bool:
        return bool(self.args.greater_is_better)

    def _name_best(self) -> list[ConfigError]:
        """Name the metric of one evaluation set as here: `eval_easy_loss` is `loss/easy`; return faults."""
        name = metric = self._best_metric
        labels = [source["label"] for source in self._eval if "label" in source]
        label = max((label for label in labels if name.startswith(f"{label}_")), key=len, default=None)
        if label is not None:
            metric = name.removeprefix(f"{label}_")
            self._keys["metric_for_best_model"] = f"{metric}/{label}" if len(labels) > 1 else metric
        elif name and len(labels) > 1:
            remedy = f"name the set: eval_{labels[0]}_{name}"
            return [refused("metric_for_best_model", f"{name}, of several sets", remedy)]
        best = best_direction(f"eval_{metric}")
        if best is None or self._is_greater_better == (best is Direction.highest):
            return []
        remedy = f"set it to {best is Direction.highest}: here the {best} value of {metric} is the best"
        return [refused("greater_is_better", str(self._is_greater_better), remedy)]

    def _translation(self) -> Translation:
        """Translate the arguments; raise if one with an effect has no translation."""
        name = self.config.__name__
        translation = translate_run(ForeignRun("TRL", self._keys, name), self._own)
        given = self._keys | self._keys["model_init_kwargs"] | self._keys.get("lr_scheduler_kwargs", {})
        faults = [
            refused(key, str(given.get(key)), f"{why}; keys of dpo_dist go into {name}(words=[...])")
            for key, why in translation.reasons.items()
            if key not in translation.unneeded and key not in translation.unused
        ]
        raise_all(faults)
        return translation

    def _check(self) -> None:
        """Raise the errors of the arguments and of `words`, before a model is written; set the intervals."""
        own = self._own
        lines = sum(len(Path(source["path"]).read_bytes().splitlines()) for source in own["data.train"])
        count = lines * (2 if own["data.unpair"] else 1)
        self._keys |= self.args.intervals(count)
        stops_early = "early_stopping_patience" in self._keys
        faults = self.args.faults(count, has_evaluation=bool(self._eval), stops_early=stops_early)
        raise_all([*faults, *self._name_best()])
        for note in self.args.notes(count):
            warnings.warn(note, stacklevel=3)
        with tempfile.TemporaryDirectory() as folder, self._own_words():
            file = Path(folder, "dpo_dist.yaml")
            write_text(file, self._translation().as_file())
            limits = load_run_config([str(file), *self.args.words]).data
        if self.args.counts_records and "data.images" not in own:  # without those that cannot be used
            count = examples(own["data.train"], self.processing_class, limits)
            self._keys |= self.args.intervals(count)
        self._follower.epochs = self.args.epochs(count)

    def _translate(self) -> None:
        """Write the file of the run."""
        translation = self._translation()
        for key, why in translation.unused.items():
            warnings.warn(f"{key}: {why}", stacklevel=4)
        file = self.folder / "dpo_dist.yaml"
        write_text(file, translation.as_file())
        self._words = [str(file), *self.args.words]


def _collisions(kind: type, given: Mapping[str, Any]) -> list[ConfigError]:
    """Return errors for names of a script's class, or set before the trainer is made, that are used here."""
    ours = {name for name in vars(DPOTrainer) if name not in dir(Trainer)} - _OF_TRL
    own = [each for each in kind.__mro__ if each.__module__.split(".")[0] not in _LIBRARIES]
    return _named_as_ours([name for each in (*map(vars, own), given) for name in each if name in ours])


def _named_as_ours(names: Iterable[str]) -> list[ConfigError]:
    remedy = "give it another name: dpo_dist's trainer uses this one"
    return [refused(f"trainer.{name}", "a name of the script's own", remedy) for name in names]


def _weights(model: Any) -> torch.dtype | None:
    """Return the type in which a model in memory is trained; None: by the arguments."""
    is_named = isinstance(model, str) or hasattr(model, "quantization_method")
    return None if is_named else getattr(model, "dtype", None)


def _tokenization(processing_class: Any) -> tuple[Any, Any]:
    return tokenization(processing_class), copy.copy(processing_class.chat_template)


def _as_trl_names(row: dict[str, float]) -> dict[str, float]:
    return {**row, "aux_loss": row[AUX_LOSS]} if AUX_LOSS in row else row


class KTOTrainer(DPOTrainer):
    """TRL's `KTOTrainer`: as `DPOTrainer`, on labelled responses, or on pairs that are taken apart."""

    config = KTOConfig
    _tag_names = ("trl", "kto")


_OFFERED = frozenset(vars(DPOTrainer)) | _INHERITED
for _name in dir(Trainer):
    if _name not in _OFFERED and not _name.startswith("__"):
        setattr(DPOTrainer, _name, _Missing())
_OURS = {kind: dict(vars(kind)) for kind in (DPOTrainer, KTOTrainer)}
