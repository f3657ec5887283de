"""Train the points that optuna samples; stop one whose evaluations are worse than the others' median."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ConfigError, ExitCode, RunOutcome, first_line
from dpo_dist.foundation.files import text_digest
from dpo_dist.foundation.text import number, pluralize
from dpo_dist.kit import Direction, RunFolder, RunHistory, best_direction, finite
from dpo_dist.tools.sweep.extension import SweepConfig
from dpo_dist.tools.sweep.folder import SweepFolder
from dpo_dist.tools.sweep.points import SearchSpace, point_settings
from dpo_dist.tools.sweep.pool import Pool, Words, is_finished

_PRUNED = "pruned"
_OUTCOME = "outcome"  # the trial's attribute


class _Sampler(optuna.samplers.TPESampler):  # type: ignore[misc]
    """Samples numbers of four digits, so that a run's word, optuna and all that is shown have the same."""

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        value = super().sample_independent(study, trial, param_name, param_distribution)
        return _rounded(value, param_distribution)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        values = super().sample_relative(study, trial, search_space)
        return {name: _rounded(value, search_space[name]) for name, value in values.items()}


def _rounded(value: Any, distribution: Any) -> Any:
    if not isinstance(distribution, optuna.distributions.FloatDistribution):
        return value
    return min(max(float(f"{value:.4g}"), distribution.low), distribution.high)


class Search(Pool):
    """Trains the points of a study that is kept in the sweep's folder.

    A trial is recorded before its point starts. If the point fails or is stopped, the trial stays open, and
    the next start of the search continues it.
    """

    def __init__(self, space: SearchSpace, folder: SweepFolder, console: Console) -> None:
        first = next(iter(space.values()))
        super().__init__({}, folder, console, first.section_of(SweepConfig))
        self._space = space
        self._by = first.section_of(SweepConfig).by or ""
        self._seed = first.trainer.seed
        self._is_low = best_direction(self._by) is Direction.lowest
        journal = folder.study.resolve()
        defining = (space.dimensions, self._by, first.identity.digest)
        # What a killed start may leave, and optuna cannot read: its lock, and a part of a line.
        Path(f"{journal}.lock").unlink(missing_ok=True)
        lines = journal.read_bytes() if journal.exists() else b"\n"
        if not lines.endswith(b"\n"):
            os.truncate(journal, lines.rfind(b"\n") + 1)
        try:
            self._storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        except ValueError as fault:
            raise ConfigError(
                "the search's journal is damaged",
                where=str(journal),
                got=first_line(fault),
                remedy="delete the file: points that are finished and chosen again are not trained again",
            ) from None
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=f"{folder.path.name}-{text_digest(repr(defining))[:8]}",
            pruner=optuna.pruners.MedianPruner(),
            direction="minimize" if self._is_low else "maximize",
            load_if_exists=True,
        )
        self._open = dict[Words, list[Trial]]()
        self._hopeless = set[Words]()
        for trial in self._trials():
            outcome = trial.user_attrs.get(_OUTCOME)
            if outcome:
                words = self._words(trial)
                self.points[words] = space.load(words)
                self.ends[words] = (outcome, "")
        console.say(f"search: {pluralize(self._count, 'trial')} by {self._by}, {len(self.ends):,} finished")

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._study.get_trials(deepcopy=False, states=states or None)
        return trials

    def _words(self, trial: Trial | FrozenTrial) -> Words:
        """Return the values of a trial as overrides; those that it lacks are sampled.

        Each has a seed of its own: after a kill they are what they would have been.
        """
        words = list[str]()
        for one in self._space.dimensions:
            seed = int(text_digest(f"{self._seed} {trial.number} {one.key}")[:8], 16)
            self._study.sampler = _Sampler(seed=seed)
            if one.ends is None:
                words.append(f"{one.key}={trial.suggest_categorical(one.key, one.texts)}")
                continue
            suggest = trial.suggest_int if isinstance(one.ends[0], int) else trial.suggest_float
            words.append(f"{one.key}={suggest(one.key, *one.ends, log=one.is_log)!r}")
        return tuple(words)

    def waiting(self) -> Iterator[Words]:
        """Yield the points of open trials, then of new ones, without those whose results are known."""
        study = self._study.study_name
        find_id = self._storage.get_trial_id_from_study_id_trial_number
        study_id = self._storage.get_study_id_from_name(study)
        open_ids = [find_id(study_id, trial.number) for trial in self._trials(TrialState.RUNNING)]
        while open_ids or len(self._trials()) < self._count:
            trial = Trial(self._study, open_ids.pop(0)) if open_ids else self._study.ask()
            words = self._words(trial)
            same = self._open.setdefault(words, [])
            same.append(trial)
            if len(same) > 1:  # the point is in training
                continue
            self.points.setdefault(words, self._space.load(words))
            if is_finished(self.points[words]) or self.is_hopeless(words):
                self.ended(words)
            else:
                yield words

    def _report(self, words: Words) -> dict[int, float]:
        """Report new evaluations of a point; return all values of the metric by step, from step 1 on."""
        rows = RunHistory(RunFolder(self.points[words].run.path)).rows()
        values = dict[int, float]()
        for row in rows:
            value = finite(row, self._by)
            if row["step"] > 0 and value is not None:
                values[int(row["step"])] = value
        trial = self._open[words][0]
        reports = self._trials()[trial.number].intermediate_values
        for step in values.keys() - reports.keys():
            trial.report(values[step], step)
        return values

    def is_hopeless(self, words: Words) -> bool:
        """Return whether a point's evaluations are bad, at the first time that they are."""
        trial = self._open[words][0]
        values = self._report(words)
        if words in self._hopeless or not trial.should_prune():
            return False
        self._hopeless.add(words)
        step = max(values)
        what = f"{self._by} {number(values[step])} at step {step} is worse than the median of other trials"
        self._console.say(f"{' '.join(words)}: stops, {what}")
        return True

    def ended(self, words: Words) -> None:
        """Tell optuna how a point has ended, if it is done."""
        values = self._report(words)
        outcome = _PRUNED
        state = TrialState.PRUNED
        value = None
        if is_finished(self.points[words]):
            outcome = RunOutcome.completed
            state = TrialState.COMPLETE
            if not values:
                raise ConfigError(
                    "the evaluations of these runs do not have this metric",
                    where="sweep.by",
                    got=self._by,
                    remedy=f"set it to a metric of {RunFolder(self.points[words].run.path).metrics_table}",
                )
            value = values[max(values)]
        elif self.codes.get(words) == ExitCode.diverged:
            outcome = RunOutcome.diverged
        elif words not in self._hopeless:
            return
        if outcome != RunOutcome.diverged:
            self.codes[words] = ExitCode.completed
            self.ends[words] = (outcome, "")
        for trial in self._open.pop(words):
            trial.set_user_attr(_OUTCOME, str(outcome))
            self._study.tell(trial, value, state)

    def facts(self) -> dict[str, Any]:
        """Return what sweep.json has about the search: also the value of each completed trial."""
        outcomes = Counter[str]()
        values = {}
        for trial in self._trials():
            outcome = trial.user_attrs.get(_OUTCOME)
            if trial.state is TrialState.COMPLETE:
                values[trial.number + 1] = trial.value
                outcome = outcome or str(RunOutcome.completed)  # of a trial that somebody else has added
            outcomes[outcome or "open"] += 1
        best = None
        if values:
            words = self._words(self._study.best_trial)
            settings = point_settings(words, self._space.load(words))
            best = {"settings": settings, "value": self._study.best_value}
        return {
            "study": self._study.study_name,
            "by": self._by,
            "is_lowest_best": self._is_low,
            "trials": dict(sorted(outcomes.items())),
            "values": values,
            "best": best,
        }
