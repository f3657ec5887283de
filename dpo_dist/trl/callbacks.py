"""Follows a run for a script: logs its rows as TRL does, and calls callbacks with what transformers gives."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerCallback

from dpo_dist import api
from dpo_dist.api import Moment, When, Wish
from dpo_dist.config.metrics import is_evaluation
from dpo_dist.config.run_folder import best_checkpoint, checkpoint_name
from dpo_dist.distributed.deepspeed_internals import is_sharded
from dpo_dist.foundation.errors import ConfigError, raise_all
from dpo_dist.foundation.process import this_rank
from dpo_dist.model.lora import adapted_layers
from dpo_dist.objective.router import AUX_LOSS
from dpo_dist.tools.convert.arguments import refused
from dpo_dist.trl.command import ScriptCommand
from dpo_dist.trl.unseen import bit_sum, changed_arguments

_NEVER = ("on_pre_optimizer_step", "on_optimizer_step", "on_substep_end", "on_prediction_step")
"""Events inside a step or an evaluation, which here are one piece."""
_COUNTED = ("max_steps", "logging_steps", "eval_steps", "save_steps", "num_train_epochs")
"""What the loop of transformers reads of `state` at each step."""
_EDITS = (
    "change the model before the trainer is made: "
    "the optimizer keeps its own copy of the weights, and its next step overwrites the change"
)
NOT_HERE = {
    **dict.fromkeys(
        ("optimizer", "lr_scheduler"),
        "set it by the arguments; the learning rate is in the rows of state.log_history",
    ),
    "train_dataloader": "iterate over the trainer's train_dataset",
    "eval_dataloader": "iterate over the trainer's eval_dataset",
}


class AbsentError(ConfigError, AttributeError):
    """An attribute of TRL's trainer that is not here; `hasattr` finds that it is not."""


class Absent:
    """Stands for an object that callbacks get from TRL's trainer, but not here: its use is an error."""

    def __init__(self, name: str, remedy: str) -> None:
        self._name, self._remedy = name, remedy

    def __getattr__(self, name: str) -> Any:
        """Raise an error that says what to use."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._error(f"{self._name}.{name}")

    def __bool__(self) -> bool:
        """Return true, as the object that this stands for."""
        return True

    def _error(self, where: str) -> AbsentError:
        return AbsentError("callbacks do not get this object here", where=where, remedy=self._remedy)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise self._error(self._name)

    __call__ = __iter__ = __len__ = __getitem__ = _refuse


class Flow(DefaultFlowCallback):  # type: ignore[misc]
    """Decides only the first row: the run's own loop knows when others and checkpoints are due."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for the row of the first step, if the arguments do."""
        control.should_log |= args.logging_first_step and state.global_step == 1

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Leave `control` as it is."""


class Follower:
    """Follows a run on rank 0: keeps the trainer's `state`, calls its callbacks, obeys its `control`."""

    def __init__(self, trainer: Any, command: ScriptCommand) -> None:
        self.trainer, self.command = trainer, command
        self.policy: Any = None
        """The model that trains; None outside of training."""
        self.has_begun = False
        """Whether the callbacks know that training has begun: a complete run has no moments to follow."""
        self._begins_epoch = True
        handler = CallbackHandler([Flow()], None, None, None, None)
        for name, remedy in NOT_HERE.items():
            setattr(handler, name, Absent(name, remedy))
        self.handler = handler

    def add(self, callback: Any) -> None:
        """Add a callback; raise an error for an event that does not happen here."""
        raise_all(self.faults([callback]))
        self.handler.add_callback(callback)

    def faults(self, callbacks: Iterable[Any] | None = None) -> list[ConfigError]:
        """Return an error for each event of callbacks, by default of all, that does not happen here."""
        remedy = "use on_step_begin, on_step_end or on_evaluate: here a step or an evaluation is one piece"
        every = [*(self.handler.callbacks if callbacks is None else callbacks)]
        synced = [
            part for part in every if "SyncRefModelCallback" in [kind.__name__ for kind in type(part).__mro__]
        ]
        faults = [refused("callbacks", type(part).__name__, "set sync_ref_model=True") for part in synced]
        return faults + [
            refused("callbacks", f"{type(callback).__name__}.{name}", remedy)
            for callback in every
            for name in _NEVER
            if name in vars(callback)
            # Progress bars of the libraries count the steps of an evaluation, if there are some.
            or (_overrides(callback, name) and not _is_of_library(callback, name))
        ]

    def call(self, event: str, **values: Any) -> None:
        """Call the callbacks, if this is rank 0."""
        if this_rank() != 0:
            return
        trainer, handler = self.trainer, self.handler
        is_used = any(_overrides(callback, event) for callback in handler.callbacks)
        counted = {name: getattr(trainer.state, name) for name in _COUNTED}
        try:
            with self._model(event) if is_used else contextlib.nullcontext() as handler.model:
                handler.processing_class = trainer.processing_class
                theirs = [type(part).__name__ for part in handler.callbacks if _is_of_script(part, event)]
                # After training a callback may merge an adapter, or give the memory free.
                is_watched = theirs and (self.policy is not None or event == "on_init_end")
                before = _weights(handler.model) if is_watched else {}
                control = getattr(handler, event)(trainer.args, trainer.state, trainer.control, **values)
                trainer.control = control
                if before and (changed := _changed(before, handler.model)):
                    raise refused("callbacks", f"{', '.join(theirs)}.{event} {changed}", _EDITS)
        finally:
            handler.model = None
        faults = changed_arguments(trainer.args, self.command.arguments)
        for name, value in counted.items():
            if (now := getattr(trainer.state, name)) != value:
                remedy = "set control.should_training_stop, should_log, should_evaluate or should_save"
                faults.append(refused("callbacks", f"state.{name} = {now}", remedy))
        raise_all(faults)
        if trainer.control.should_epoch_stop:
            trainer.control.should_epoch_stop = False
            remedy = "set control.should_training_stop: a run here does not skip the rest of an epoch"
            raise refused("callbacks", "control.should_epoch_stop", remedy)

    @contextlib.contextmanager
    def _model(self, event: str) -> Iterator[Any]:
        """Yield the model as it is now: outside of training the trainer's, else that which trains.

        One with an adapter is the trainer's `PeftModel`, with the weights that the adapter has now. At
        `on_save` it may be a later one than the checkpoint's.
        """
        if self.policy is None:
            yield self.trainer.own_model()
        elif event == "on_save":
            folder = self.command.run.checkpoints / checkpoint_name(self.trainer.state.global_step)
            yield Absent("model", f"{folder} is the checkpoint; on_step_end has the model of each step")
        elif any(map(is_sharded, self.policy.causal_lm.parameters())):
            yield Absent(
                "model",
                "its weights are sharded: set control.should_save, or use the trainer's model at the end",
            )
        elif adapted_layers(self.policy.causal_lm):
            given = self.trainer.own_model()
            with torch.no_grad():
                for name, weight in self.policy.causal_lm.named_parameters():
                    if weight.requires_grad:
                        given.get_parameter(f"base_model.model.{name}").copy_(weight)
            yield given
        else:
            with self.policy.model.unpacked() as live:
                yield live

    def on_moment(self, moment: Moment) -> set[Wish]:
        """Call the events of a moment; return what `control` asks of the step at hand."""
        trainer, state = self.trainer, self.trainer.state
        self.policy = moment.policy
        now, state.max_steps = (state.global_step, state.epoch), moment.steps
        state.global_step, state.epoch = moment.step, moment.epoch
        match moment.when:
            case When.start:
                state.num_train_epochs = trainer.args.epochs(self.command.epoch_examples)
                self.take_rows(up_to=moment.step)
                self.has_begun = self._begins_epoch = True
                self.call("on_train_begin")
            case When.before_step:
                if self._begins_epoch:
                    self.call("on_epoch_begin")
                self._begins_epoch = False
                self.call("on_step_begin")
            case When.after_step:
                self.call("on_step_end")
            case When.epoch_end:
                self._begins_epoch = True
                self.call("on_epoch_end")
            case When.saved:
                if best := best_checkpoint(root := self.command.run.checkpoints):
                    state.best_model_checkpoint = str(root / best)
                self.call("on_save")
                state.global_step, state.epoch = now
        return self._wishes()

    def _wishes(self) -> set[Wish]:
        control = self.trainer.control
        if control.should_evaluate and self.trainer.args.eval_strategy == "no":
            control.should_evaluate = False
            remedy = "pass an eval_dataset, and set eval_strategy='steps' and eval_steps"
            raise refused("callbacks", "control.should_evaluate without evaluations", remedy)
        asked = {Wish.log: control.should_log, Wish.evaluate: control.should_evaluate}
        asked |= {Wish.save: control.should_save, Wish.stop: control.should_training_stop}
        return {wish for wish, is_asked in asked.items() if is_asked}

    def on_row(self, row: dict[str, float]) -> None:
        """Log a row, on rank 0, as TRL's trainer does, and note the best evaluation."""
        state, trainer = self.trainer.state, self.trainer
        state.global_step, state.epoch = int(row["step"]), row.get("epoch")
        shown = self._as_logged(row, is_asked=trainer.control.should_log)
        for logs in shown:
            trainer.log(logs)
            if is_evaluation(row):
                self.call("on_evaluate", metrics=logs)
        # transformers compares once the callbacks have seen all sets.
        for logs in shown:
            self._note_best(logs)

    def take_rows(self, up_to: float = math.inf) -> None:
        """Set `state` by the rows of the run in `output_dir`, of steps until `up_to`."""
        every = api.read_metrics(self.command.run.path)
        rows = [logs for row in every if row["step"] <= up_to for logs in self._as_logged(row)]
        self.trainer.state.log_history = rows
        for row in rows:
            self._note_best(row)

    def last_metrics(self, losses: list[dict[str, float]]) -> dict[str, float]:
        """Return the metrics of the steps after the last due row, which TRL logs in the row at the end."""
        if not losses or self._as_logged(losses[-1]):
            return {}
        own = ("loss", "grad_norm", "learning_rate", "step")
        return {key: value for key, value in _with_aux_loss(losses[-1]).items() if key not in own}

    def _as_logged(self, row: dict[str, float], *, is_asked: bool = False) -> list[dict[str, float]]:
        """Return a row as those of TRL: one for each evaluation set, none for what TRL does not log.

        `is_asked`: a callback asked for it.
        """
        args, labels = self.trainer.args, self.command.labels
        if row["step"] == 0 and not args.eval_on_start:
            return []
        if "loss" in row:
            is_due = is_asked or (args.logging_first_step and row["step"] == 1)
            is_due |= args.logging_strategy == "epoch"
            if args.logging_strategy == "steps":
                is_due |= row["step"] % self.command.theirs["logging_steps"] == 0
            is_last = row["step"] == self.trainer.state.max_steps
            # A run has a row for each due step, and one for its last, which TRL logs only if it is due.
            return [_with_aux_loss(row)] if is_due or not is_last else []
        if not labels:
            return [row]
        shown = list[dict[str, float]]()
        for label in labels:
            end = f"/{label}" if len(labels) > 1 else ""  # the only set has no name in a row
            # A set may be called like the end of a metric, `chosen`: its own are there without it, too.
            own = [key for key in row if key.startswith("eval_") and key.endswith(end)]
            own = [key for key in own if key.removesuffix(end) in row]
            named = {f"eval_{label}_{key.removeprefix('eval_').removesuffix(end)}": row[key] for key in own}
            shown.append({**{key: row[key] for key in ("step", "epoch") if key in row}, **named})
        return shown

    def _note_best(self, row: dict[str, float]) -> None:
        """Keep the value and the step of a row of an evaluation, if it is the best so far."""
        state, value = self.trainer.state, row.get(f"eval_{self.command.best_metric}")
        best, sign = state.best_metric, 1 if self.trainer.args.greater_is_better else -1
        if value is not None and (best is None or sign * value > sign * best):
            state.best_metric, state.best_global_step = value, int(row["step"])


def _with_aux_loss(row: dict[str, float]) -> dict[str, float]:
    """Return a row that has the loss of routers also by TRL's name."""
    return {**row, "aux_loss": row[AUX_LOSS]} if AUX_LOSS in row else row


def _overrides(callback: Any, event: str) -> bool:
    is_own = getattr(type(callback), event, None) is not getattr(TrainerCallback, event)
    return is_own or event in vars(callback)


def _is_of_script(callback: Any, event: str) -> bool:
    return _overrides(callback, event) and type(callback).__module__.split(".")[0] != "transformers"


def _is_of_library(callback: Any, event: str) -> bool:
    return str(getattr(type(callback), event).__module__).startswith(("transformers.", "trl."))


def _weights(model: Any) -> dict[str, tuple[bool, int]]:
    """Return by name whether a weight is trained, and if so a sum of its bits."""
    named = {} if isinstance(model, Absent) else dict(model.named_parameters())
    return {
        name: (weight.requires_grad, bit_sum(weight) if weight.requires_grad else 0)
        for name, weight in named.items()
    }


def _changed(before: dict[str, tuple[bool, int]], model: Any) -> str | None:
    """Return what a callback has changed in weights; those that it froze are trained again, to be saved."""
    now = _weights(model)
    if frozen := [name for name in before if name not in now or now[name][0] != before[name][0]]:
        for name in now.keys() & set(frozen):
            model.get_parameter(name).requires_grad_(before[name][0])
        return f"that freezes or unfreezes {frozen[0]}"
    return next((f"that changes {name}" for name in before if now[name] != before[name]), None)
