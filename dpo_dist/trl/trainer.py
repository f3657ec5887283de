"""`DPOTrainer` and `KTOTrainer`: the surface of TRL's trainers, and the runs below it."""

import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import Trainer
from transformers.trainer_callback import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from dpo_dist import api
from dpo_dist.config.metrics import results_name
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import SourceConfig
from dpo_dist.foundation.errors import ConfigError, ExitCode, RunOutcome, StoppedError, raise_all
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.process import this_rank
from dpo_dist.foundation.signals import BY_CALLBACK
from dpo_dist.tools.convert.arguments import DPOConfig, KTOConfig, TrainerArguments, not_offered, refused
from dpo_dist.trl.callbacks import AbsentError, Follower
from dpo_dist.trl.command import ScriptCommand, dtype_in_memory
from dpo_dist.trl.data import sources, with_token_ids
from dpo_dist.trl.models import ScriptModels, changed_models, uncompiled
from dpo_dist.trl.processes import Processes
from dpo_dist.trl.surface import (
    ARGUMENT_OF,
    INSTEAD,
    NO_IGNORED_KEYS,
    fixed,
    names_in_use,
    offer_only_own,
    taken_names,
    uncalled_overrides,
)
from dpo_dist.trl.unseen import changed_arguments, changed_attributes, own_tokenizer
from dpo_dist.verbs import evaluate


class DPOTrainer(Trainer):  # type: ignore[misc]
    """TRL's `DPOTrainer`: its arguments, methods and `state`; trains with dpo_dist."""

    config: type[TrainerArguments] = DPOConfig
    _tag_names = ("trl", "dpo")

    # What a trainer has beside the attributes of TRL's, all set by `__init__`. A script that has one of these
    # names, or a method's, is refused (`taken_names`).
    folder: Path
    """`output_dir`."""
    run: RunFolder
    """The folder of the run, below `folder`."""
    _command: ScriptCommand
    """What the run is asked to do: the arguments as keys, their file, and the words of `api.train`."""
    _models: ScriptModels
    """The policy and the reference, and whether this trainer has trained."""
    _follower: Follower
    """Keeps `state` and calls the callbacks while a run trains."""
    _given_data: tuple[Any, Any]
    """`train_dataset` and `eval_dataset` as the script passed them."""
    _as_made: dict[str, Any]
    """Attributes as they were when the trainer was made: `train` refuses others."""

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
        # What nothing here would use is refused before anything is read or written.
        of_script = dict(vars(self))
        raise_all(taken_names(DPOTrainer, type(self), of_script))
        others |= {"data_collator": data_collator, "compute_metrics": compute_metrics}
        raise_all(not_offered(self.config, args, others | {"optimizers": optimizers}))
        model, ref_model = uncompiled(model), uncompiled(ref_model)
        found = uncalled_overrides(self, args or self.config(), _OFFERED, _AS_DEFINED)
        raise_all(found + changed_models(model, ref_model, has_adapter=peft_config is not None))

        # The command and what follows its run; callbacks add to both.
        name = Path(model if isinstance(model, str) else model.config.name_or_path).name
        self.args = args or self.config(output_dir=f"{name}-{self.config.__name__[:3]}")
        command = self._command = ScriptCommand(self.args, self.config, dtype_in_memory(model))
        self.folder, self.run = command.folder, command.run
        self.accelerator, self._follower = Processes(self.args), Follower(self, command)
        self.callback_handler = self._follower.handler
        self.hub_model_id = self.args.hub_model_id
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()
        for callback in callbacks or ():
            self.add_callback(callback)

        # Records are written now: their columns and their number decide about the rest. A file of records is
        # named by its content, so that one of a script that is refused below does no harm.
        has_adapter = peft_config is not None or hasattr(model, "peft_config")
        self._given_data = train_dataset, eval_dataset
        command.add_records(train_dataset, eval_dataset, has_adapter=has_adapter)

        # Models get their keys; the weights of those in memory are written when nothing is left to refuse.
        # Whether a base is quantized comes first: if so, it is not sharded.
        is_quantized = command.add_quantization(quantization_config, model)
        raise_all(own_tokenizer(processing_class, "processing_class"))
        for line in command.add_sharding():
            self.accelerator.print(line)
        models = self._models = ScriptModels(
            command,
            model,
            ref_model,
            peft_config,
            processing_class,
            has_adapter=has_adapter,
            is_quantized=is_quantized,
        )
        command.theirs |= models.theirs
        command.ours |= models.ours
        self.processing_class = models.tokenizer

        # The whole command is checked, as `train` would. Intervals by epoch need the number of pairs, and
        # that needs the tokenizer where records can be too long.
        if self.args.max_length is None:
            command.set_longest(self.processing_class)
        command.set_intervals()
        command.set_best_metric()
        raise_all(command.faults())
        for note in self.args.notes(command.epoch_examples):
            warnings.warn(note, stacklevel=2)
        command.check(self.processing_class)
        self.state.max_steps = self.args.max_steps
        # `taken_names` knew the names of this class. These are TRL's, which the stages above have set, too.
        raise_all(names_in_use(name for name in of_script if vars(self)[name] is not of_script[name]))

        # Nothing is left to refuse: the hub, the models, and the file that names them.
        if self.args.push_to_hub:
            self.init_hf_repo()
        models.save()
        command.ours |= models.ours
        for key, why in command.write().unused.items():
            warnings.warn(f"{key}: {why}", stacklevel=2)

        # The run reads files: what a script changes after this would have no effect, and is refused.
        watched = ("processing_class", *DPOTrainer.__annotations__)
        self._as_made = {name: value for name, value in vars(self).items() if name in watched}
        self._follower.call("on_init_end")

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or one of a class; its events happen on rank 0."""
        callback = callback() if isinstance(callback, type) else callback
        if type(callback) is EarlyStoppingCallback and not callback.early_stopping_threshold:
            # As a key it also holds for a run that is resumed.
            self._command.set_patience(callback.early_stopping_patience)
        else:
            self._follower.add(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or one of a class, and return it."""
        kind = callback if isinstance(callback, type) else type(callback)
        patience = self._command.theirs.get("early_stopping_patience")
        if kind is EarlyStoppingCallback and patience is not None:
            self._command.set_patience(None)
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
        command, models, follower = self._command, self._models, self._follower
        raise_all(self._changes(trial, ignore_keys_for_eval))
        if resume_from_checkpoint:
            command.check_resume(str(resume_from_checkpoint))
        elif models.summary is not None:
            remedy = (
                "pass resume_from_checkpoint=True to go on from its last checkpoint, or make a new trainer"
            )
            remedy += ": with model=trainer.model it trains on, and ref_model is the reference"
            raise refused("train", "a second call on the same trainer", remedy)
        elif aside := command.move_former_run():
            self.accelerator.print(f"{self.folder} has another run, kept as {aside}; training starts anew")

        follower.has_begun, start = False, time.time()
        try:
            with command.in_words_of_the_script():
                summary = api.train(command.words, on_row=follower.on_row, on_moment=follower.on_moment)
        except StoppedError as stop:  # before the first step
            self.accelerator.print(stop)
            raise SystemExit(ExitCode.preempted) from stop
        finally:
            follower.policy = None
        if summary["exit"] == RunOutcome.preempted and BY_CALLBACK not in summary["stopped_by"].split(", "):
            raise SystemExit(ExitCode.preempted)  # the script would take these weights for the trained model

        # The run has ended: `state`, the model in memory and the row at the end become what TRL's are.
        models.summary = summary
        steps, seconds = summary["steps"], summary["train_seconds"]
        self.state.global_step, self.state.max_steps = steps, max(steps, self.state.max_steps)
        if not follower.has_begun:
            follower.call("on_train_begin")  # the run was complete, or this is not rank 0
            follower.take_rows()
        models.take_trained()
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
        self.log({**follower.last_metrics(raw), **metrics, "step": steps})
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            self.push_to_hub()
        follower.call("on_train_end")
        return TrainOutput(steps, mean, metrics)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the trained model; before `train`, the one that was given. Return the metrics."""
        self._check_outside("evaluate", "set control.should_evaluate: the metrics come to on_evaluate")
        if ignore_keys is not None:
            raise refused("evaluate", f"ignore_keys={ignore_keys!r}", NO_IGNORED_KEYS)
        if isinstance(eval_dataset, str):
            given = [source for source in self._command.evaluation if source.get("label") == eval_dataset]
        elif eval_dataset is None:
            given = self._command.evaluation
        else:
            given = sources(eval_dataset, "eval_dataset", self.args)
        if not given:
            raise refused("evaluate", "no eval_dataset", "pass one to evaluate, or to the trainer")
        config, model = self._command.configuration(), self._models.trained() or self._models.start
        data = [SourceConfig(**source) for source in given]
        evaluation = replace(config.evaluation, model=model, data=data)
        with self._command.in_words_of_the_script(), api.as_guest():
            evaluate.main(replace(config, evaluation=evaluation))
        results, metrics = json.loads(self.run.evaluation.results.read_text()), dict[str, float]()
        for label in [source["label"] for source in given if "label" in source] or [""]:
            found = results[results_name(label) if label else "all"]
            start = f"{metric_key_prefix}_{label}_" if label else f"{metric_key_prefix}_"
            row = {start + key.removeprefix("eval_"): found[key] for key in found if key != "intervals"}
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
        source, folder = self._models.folder(), Path(output_dir or self.folder)
        if this_rank() == 0:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            if hasattr(self.processing_class, "image_processor"):
                self.processing_class.save_pretrained(folder)
            # A script may set how its model generates, which training neither reads nor keeps.
            policy = self._models.policy
            if policy is not None and not isinstance(policy, PeftModel) and policy.can_generate():
                policy.generation_config.save_pretrained(folder)
            if "data.chat_template" in self._command.ours:
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

    @fixed
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
        model = self._models.in_memory()
        if not getattr(model, "model_tags", None):
            model.add_model_tags([*self._tag_names])
        return model

    @fixed
    def ref_model(self) -> Any:
        """The reference that was given, or a copy of the model before training.

        As in TRL, there is no copy with an adapter or with `precompute_ref_log_probs`: None.
        """
        return self._models.reference()

    @fixed
    def train_dataset(self) -> Any:
        """The records of `train_dataset` that are trained, with their token ids."""
        return self._encoded[0]

    @fixed
    def eval_dataset(self) -> Any:
        """The records of `eval_dataset` that are scored, with their token ids."""
        return self._encoded[1]

    @cached_property
    def _encoded(self) -> list[Any]:
        limits = self._command.configuration().data
        written = self._command.ours["data.train"], self._command.evaluation
        places = zip(self._given_data, written, strict=True)
        return [with_token_ids(given, at, self.processing_class, limits) for given, at in places]

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the loss of a mixture of experts has the term that balances them."""
        return bool(self._command.theirs["router_aux_loss_coef"])

    @property
    def is_fsdp_enabled(self) -> bool:
        """False: weights are sharded by ZeRO."""
        return False

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that TRL's trainer copies from its arguments.

        For others an error says what to use.
        """
        if name in ARGUMENT_OF and "args" in self.__dict__:
            return getattr(self.args, ARGUMENT_OF[name])
        if name.startswith("__") or "args" not in self.__dict__:
            raise AttributeError(name)
        public = ", ".join(sorted(entry for entry in _OFFERED if entry[0] != "_"))
        remedy = INSTEAD.get(
            name, f"a trainer has its arguments as `args`, its rows as `state`, and {public}"
        )
        raise AbsentError("dpo_dist's trainer does not have this", where=f"trainer.{name}", remedy=remedy)

    def _check_outside(self, method: str, remedy: str) -> None:
        """Refuse a method whose model is the one before training while a run trains."""
        if self._follower.policy is not None:
            raise refused(f"trainer.{method}", "a call while it trains", remedy)
        raise_all(self._models.changed_weights())

    def _changes(self, trial: Any, ignore_keys: Any) -> list[ConfigError]:
        """Return errors for what a script changed after the trainer was made, and for options of `train`."""
        found = uncalled_overrides(self, self.args, _OFFERED, _AS_DEFINED)
        found += changed_arguments(self.args, self._command.arguments)
        found += changed_attributes(self, self._as_made)
        found += self._follower.faults()
        if trial is not None:
            found.append(refused("train", "trial", INSTEAD["hyperparameter_search"]))
        if ignore_keys is not None:
            found.append(refused("train", "ignore_keys_for_eval", NO_IGNORED_KEYS))
        return found + self._models.changes()


class KTOTrainer(DPOTrainer):
    """TRL's `KTOTrainer`: as `DPOTrainer`, on labelled responses, or on pairs that are taken apart."""

    config = KTOConfig
    _tag_names = ("trl", "kto")


_OFFERED = offer_only_own(DPOTrainer)
"""The names of a trainer here: its own, and those of transformers' `Trainer` that it has."""
_AS_DEFINED = {kind: dict(vars(kind)) for kind in (DPOTrainer, KTOTrainer)}
"""What the classes have now: a script may set other methods on them later."""
