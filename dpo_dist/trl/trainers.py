"""TRL's trainers with our forward and our store: everything else is TRL's."""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import trl

from dpo_dist.data import SCORERS
from dpo_dist.trl.forward import REFERENCE_ADAPTER, Fallback, PackedForward, why_padded
from dpo_dist.trl.older_names import check_prompts, trainer_arguments
from dpo_dist.trl.reference import KeptReference

_one_at_a_time = threading.RLock()
"""While a trainer is made, a function of TRL's module is another one, for the thread that makes it."""


@contextlib.contextmanager
def _after_each_head(place: Callable[[Any], None], kind: type) -> Iterator[None]:
    """Inside the block, call `place` with each model on which the trainer that TRL makes puts its head."""
    base = next(base for base in kind.__mro__ if base in (trl.DPOTrainer, trl.KTOTrainer))
    module = sys.modules[base.__module__]
    thread = threading.get_ident()
    with _one_at_a_time:
        own = vars(module)["add_fused_lm_head"]

        def add(model: Any, *arguments: Any, **options: Any) -> None:
            own(model, *arguments, **options)
            if threading.get_ident() == thread:
                place(model)

        vars(module)["add_fused_lm_head"] = add
        try:
            yield
        finally:
            vars(module)["add_fused_lm_head"] = own


class _Guest:
    """What both trainers have beside TRL's."""

    reference_store: ClassVar[str | Path] = "output/reference"
    """The folder of the reference's log-probs, below the working directory as that of our own runs."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._fallback: Fallback | None = None
        self._references: list[KeptReference] = []
        self._uses = 0
        self._has_counted_prompts = False
        with _after_each_head(self._place, type(self)):
            super().__init__(*arguments, **trainer_arguments(type(self), options))
        trainer: Any = self
        if not self._has_counted_prompts:  # of pictures, which TRL prepares as they come
            check_prompts(trainer.args, None)
        assert self._fallback is not None, "TRL has put no head on the model"

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        refused = sorted({f"{scorer}_prompt" for scorer in SCORERS}.intersection(dataset.column_names or ()))
        if refused:
            raise ValueError(f"TRL's trainers read no {refused[0]}; dpo-dist train does: remove the column")
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)  # type: ignore[misc]
        check_prompts(args, prepared)
        self._has_counted_prompts = True
        return prepared

    def _place(self, model: Any) -> None:
        """Put our forward on a model that has TRL's head: on the policy, then on the reference.

        Engines wrap both later, and the reference may be asked before TRL's `__init__` ends.
        """
        trainer: Any = self
        is_live = trainer.args.sync_ref_model
        if self._fallback is not None:
            kept = None if is_live else self._kept(model, frozenset())
            PackedForward(model, self._fallback, kept, is_reference=True)
            return
        adapters = getattr(trainer.model, "peft_config", None) or {}
        models = [model, *([] if trainer.ref_model is None else [trainer.ref_model])]
        fallback = self._fallback = Fallback(why_padded(models, adapters.values(), trainer))
        if not fallback.reason:
            where = "computed in each step" if is_live else f"kept in {self.reference_store}"
            fallback.say(f"rows are packed; the reference's log-probs are {where}")
        others = frozenset(adapters) - {REFERENCE_ADAPTER}
        kept = self._kept(model, others) if trainer.ref_model is None else None
        self._policy = PackedForward(model, fallback, kept)

    def _kept(self, model: Any, other_adapters: frozenset[str]) -> KeptReference:
        label = str(model.config.name_or_path or model.config.model_type)
        assert self._fallback is not None
        kept = KeptReference(Path(self.reference_store), label, other_adapters, self._fallback.say)
        self._references.append(kept)
        return kept

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        """Write at the end of the outermost block what the store lacks."""
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            if not self._uses:
                for reference in self._references:
                    reference.flush()

    def _precompute_ref_logps(self, *arguments: Any, **options: Any) -> Any:
        with self._in_use():
            return super()._precompute_ref_logps(*arguments, **options)  # type: ignore[misc]

    def compute_ref_log_probs(self, *arguments: Any, **options: Any) -> Any:
        """Return the log-probs of the reference, which may be the policy before training."""
        trainer: Any = self
        was = self._policy.is_reference
        self._policy.is_reference = trainer.ref_model is None
        try:
            return super().compute_ref_log_probs(*arguments, **options)  # type: ignore[misc]
        finally:
            self._policy.is_reference = was

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train, as in TRL."""
        with self._in_use():
            return super().train(*arguments, **options)  # type: ignore[misc]

    def evaluate(self, *arguments: Any, **options: Any) -> Any:
        """Evaluate, as in TRL."""
        with self._in_use():
            return super().evaluate(*arguments, **options)  # type: ignore[misc]

    def predict(self, *arguments: Any, **options: Any) -> Any:
        """Predict, as in TRL."""
        with self._in_use():
            return super().predict(*arguments, **options)  # type: ignore[misc]


class DPOTrainer(_Guest, trl.DPOTrainer):  # type: ignore[misc]
    """TRL's `DPOTrainer`: its loop, losses and files; packed rows, and the reference's log-probs once."""

    __init__ = functools.wraps(trl.DPOTrainer.__init__)(_Guest.__init__)


class KTOTrainer(_Guest, trl.KTOTrainer):  # type: ignore[misc]
    """TRL's `KTOTrainer`: its loop, losses and files; packed rows, and the reference's log-probs once."""

    __init__ = functools.wraps(trl.KTOTrainer.__init__)(_Guest.__init__)
