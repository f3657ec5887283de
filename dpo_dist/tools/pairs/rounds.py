"""Rounds of sampling, scoring, pairing and training: a loop of the verbs `pairs` and `train`."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from dpo_dist.data import SourceConfig
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import ConfigError, DpoDistError, ExitCode
from dpo_dist.foundation.fields import plain, schema_fields
from dpo_dist.foundation.text import aligned, without_secrets
from dpo_dist.kit import (
    LossKind,
    ReferenceMode,
    RunConfig,
    RunFolder,
    changed_keys,
    model_folder,
    saved_config,
    to_yaml,
    value_at,
    write_command,
)
from dpo_dist.tools.launching import launcher_command, run_command
from dpo_dist.tools.pairs.folder import PairsFolder
from dpo_dist.tools.sampling.judge_rules import count_judges
from dpo_dist.tools.sampling.keys import (
    PairsConfig,
    RoundReference,
    SamplingConfig,
    ServerConfig,
)
from dpo_dist.tools.sampling.rules import SAMPLING_KEYS

_REASONS = (ExitCode.invalid, ExitCode.diverged, ExitCode.preempted)

_Say: TypeAlias = Callable[[str], None]
RunCommand: TypeAlias = Callable[[str], int]
RoundResult: TypeAlias = dict[str, Any]
"""The content of round.json: `number`, `samples` and `training`, each None until the stage is finished."""


def check_settings(config: RunConfig, folder: PairsFolder) -> None:
    """Check that earlier rounds in this folder had the same settings; the first start writes them.

    Until a stage is finished, every start counts as the first, so that settings can be corrected.
    """
    file = folder.rounds_config
    if not file.exists() or not folder.round(1).round_result.exists():
        files.write_text(file, to_yaml(config))
        return
    before = saved_config(file)
    changed = changed_keys(file, config.identity)
    keys = {f"pairs.{name}" for name in schema_fields(PairsConfig)} - {"pairs.rounds"}
    for key in {*keys, *SAMPLING_KEYS}:
        old = plain(value_at(before, key))
        new = without_secrets(plain(value_at(config, key)))  # as the file has it
        if old != new:
            changed[key] = (old, new)
    if changed:
        raise ConfigError(
            "the rounds in this run directory have other settings",
            where=str(file),
            got="; ".join(f"{key}: {old} before, {new} now" for key, (old, new) in sorted(changed.items())),
            remedy="set another run.dir, or delete this file to continue with the new settings",
        )


def run_stage(command: str) -> int:
    """Run the command of a stage and return its exit code; a signal that ended it ends this process, too."""
    code, received = run_command(command)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received and code not in _REASONS:
        raise SystemExit(128 + received[0])  # as shells number it
    return code


def read_samples(policy: str, file: Path) -> dict[str, Any]:
    """Return a samples file's counts, mean score, and largest difference of scores within a prompt."""
    prompts = 0
    unscored = 0
    used = 0
    widest = 0.0
    scores = list[float]()
    for row in files.read_lines(file):
        responses = (*row["responses"], *row["unused"])
        scores_of_prompt = [each["score"] for each in responses if each.get("score") is not None]
        if scores_of_prompt:
            prompts += 1
            widest = max(widest, max(scores_of_prompt) - min(scores_of_prompt))
        unscored += len(responses) - len(scores_of_prompt)
        scores += scores_of_prompt
        used += len(row["responses"])
    return {
        "policy": policy,
        "prompts": prompts,
        "responses": len(scores) or used,  # without a judge there are no scores
        "unscored": unscored,
        "mean_score": sum(scores) / len(scores) if scores else None,
        "largest_difference": widest,
    }


@dataclass(frozen=True)
class _Rounds:
    """The loop, in `folder`; `run` starts a command and returns its exit code."""

    config: RunConfig
    folder: PairsFolder
    say: _Say
    run: RunCommand

    def do(self) -> int:
        """Do the rounds, and score the last policy; return the exit code.

        They end early if a training is preempted, or if samples give no pair.
        """
        config = self.config
        folder = self.folder
        results = list[RoundResult]()
        pairs = config.section_of(PairsConfig)
        count = pairs.rounds
        last_stage = count + 1 if count_judges(pairs) else count  # the last policy is sampled for its score
        with files.locked(folder.rounds / folder.lock.name, "does the rounds of this run directory"):
            check_settings(config, folder)
            os.environ.setdefault("WANDB_RUN_GROUP", config.run.name)  # groups the rounds' trainings
            for number in range(1, last_stage + 1):
                file = folder.round(number).round_result
                code = int(ExitCode.completed)
                if file.exists():
                    result = json.loads(file.read_text(encoding="utf-8"))
                else:
                    result = {"number": number, "samples": self._sample(number), "training": None}
                    files.write_json(file, result)
                has_pairs = result["samples"]["pairs"] is not None
                if number <= count and has_pairs and result["training"] is None:
                    code, result["training"] = self._train(number, result["samples"]["pairs"])
                    files.write_json(file, result)
                results.append(result)
                files.write_json(folder.rounds_summary, {"rounds": results})
                if code != ExitCode.completed:
                    return code
                if not has_pairs:
                    self.say(f"round {number}: no two responses to a prompt differ by more than pairs.margin")
                    break
        rows = [["policy", "mean score", "pairs", "accuracy"]]  # of each policy, also the first
        for result in results:
            samples = result["samples"]
            accuracy = (result["training"] or {}).get("accuracy")
            policy = f"after round {result['number'] - 1}" if result["number"] > 1 else "at the start"
            forms = {"{:.4f}": samples["mean_score"], "{:,}": samples["pairs"], "{:.3f}": accuracy}
            cells = ("-" if value is None else form.format(value) for form, value in forms.items())
            rows.append([policy, *cells])
        for line in aligned(rows, numbers=(1, 2, 3)):
            self.say(line)
        last = max(result["number"] for result in results if result["training"] is not None)
        self.say(f"the last policy: {self._policy(last)}")
        return ExitCode.completed

    def _sample(self, number: int) -> dict[str, Any]:
        """Sample, score and pair in round `number`; return `samples` for the round's result."""
        folder = self.folder.round(number)
        pairs = self.config.section_of(PairsConfig)
        part, parts = pairs.share
        stage = replace(
            self._with_policy(number),
            run=replace(self.config.run, dir=str(folder.path)),
            trainer=replace(self.config.trainer, seed=self.config.trainer.seed + number - 1),
        ).with_sections(
            replace(
                pairs,
                rounds=0,
                reference=PairsConfig.reference,
                part=f"{(part + number - 1) % parts + 1}/{parts}",
            )
        )
        stage_name = f"round {number}" if number <= pairs.rounds else f"after round {number - 1}"
        self.say(f"{stage_name}: samples of {stage.model.path}")
        below = folder.path / "sampling"
        folder.pairs_samples.unlink(missing_ok=True)  # an earlier start wrote it
        code = self.run(write_command("pairs", stage, below, launcher_command()))
        if code not in (ExitCode.completed, ExitCode.invalid) or not folder.pairs_samples.exists():
            raise _stage_error(f"sampling of round {number}", code, folder)
        samples = read_samples(stage.model.path, folder.pairs_samples)
        # From round 2 on, ties everywhere mean that nothing is left to learn. The exit code alone cannot say
        # that: a full disk has the same one.
        has_scores = samples["mean_score"] is not None
        is_learned = number > 1 and has_scores and samples["largest_difference"] <= pairs.margin
        if code != ExitCode.completed and not is_learned:
            raise _stage_error(f"sampling of round {number}", code, folder)
        pair_count = None
        if code == ExitCode.completed:
            with folder.pairs_file.open("rb") as lines:
                pair_count = sum(1 for _ in lines)
        mean = samples["mean_score"]
        score = "" if mean is None else f", mean score {mean:.4f}"
        self.say(f"{stage_name}: {samples['responses']:,} responses, {pair_count or 0:,} pairs{score}")
        return {**samples, "pairs": pair_count}

    def _train(self, number: int, pairs: int) -> tuple[int, dict[str, Any] | None]:
        """Train in round `number`; return the exit code and `training` for the result, None if preempted."""
        folder = self.folder.round(number)
        trainer = self.config.trainer
        # A round may have few pairs, and a step more than the data is an error. Some may be dropped.
        most = max(1, int(pairs * (1 - self.config.data.max_bad_share)))
        if trainer.global_batch_pairs > most:
            self.say(f"round {number}: steps of {most:,} of its {pairs:,} pairs")
            trainer = replace(trainer, global_batch_pairs=most)
        sampling = self.config.section_of(SamplingConfig)
        if self.config.data.eval_sources and sampling.prompts != 0:
            # Evaluations sample from the weights in training, which no server has.
            sampling = replace(sampling, endpoint=ServerConfig())
        else:
            sampling = SamplingConfig(prompts=sampling.prompts)
        stage = replace(
            self._with_policy(number),
            run=replace(self.config.run, dir=str(folder.training.path)),
            data=replace(self.config.data, train=[SourceConfig(path=str(folder.pairs_file))]),
            trainer=trainer,
        ).with_sections(sampling, PairsConfig())
        self.say(f"round {number}: training of {stage.model.path}")
        below = folder.path / "training"
        code = self.run(write_command("train", stage, below, launcher_command()))
        if code == ExitCode.preempted:
            self.say(f"round {number}: the training stopped with a checkpoint; the same command continues")
            return code, None
        if code != ExitCode.completed:
            raise _stage_error(f"training of round {number}", code, folder.training)
        if self.config.model.adapter is not None and not folder.policy.exists():
            self.say(f"round {number}: merging the adapter into {stage.model.path}")
            store = Path(stage.reference.store)
            from dpo_dist.kit import merge_adapter  # noqa: PLC0415  (slow)

            merge_adapter(folder.training.model, folder.policy, stage.model, stage.data, store)
        summary = json.loads(folder.training.summary.read_text(encoding="utf-8"))
        facts = {
            "steps": summary["steps"],
            "accuracy": summary["final"].get("rewards/accuracies"),
            "seconds": summary.get("train_seconds"),
        }
        return code, facts

    def _policy(self, number: int) -> Path:
        """Return the folder of the model that round `number` trained."""
        folder = self.folder.round(number)
        return folder.training.model if self.config.model.adapter is None else folder.policy

    def _with_policy(self, number: int) -> RunConfig:
        """Return the configuration with the policy and the reference with which round `number` starts."""
        if number == 1:
            return self.config
        config = self.config
        first = config.model
        reference = config.reference
        mode = config.reference.mode
        is_teacher = LossKind.reverse_kl in config.loss.kinds
        if config.section_of(PairsConfig).reference is RoundReference.previous and not is_teacher:
            reference = replace(reference, path=None)
        elif reference.path is None and mode is not ReferenceMode.none:
            # A hub name without its revision might name another model than the first policy.
            path = first.path if first.revision is None else str(model_folder(first.path, first.revision))
            reference = replace(reference, path=path)
            if mode is ReferenceMode.adapter:  # the base of a later adapter is not the first model
                reference = replace(reference, mode=ReferenceMode.cached, quantization=first.quantization)
        policy = str(self._policy(number - 1))
        return replace(config, model=replace(first, path=policy, revision=None), reference=reference)


def run_rounds(config: RunConfig, say: _Say, run: RunCommand = run_stage) -> int:
    """Do `config.pairs.rounds` rounds, and score the last policy; return the exit code."""
    return _Rounds(config, PairsFolder(config.run.path), say, run).do()


def _stage_error(stage: str, code: int, folder: RunFolder) -> DpoDistError:
    """Return the error for a stage whose command ended with `code` and has printed its own error."""
    error = ConfigError(
        f"the {stage} failed",
        where=str(folder.rank_log(0)),
        got=f"exit code {code}" if code >= 0 else f"signal {-code}",
        remedy="see its error above; the same command continues there, without repeating finished stages",
    )
    error.exit_code = code if code in set(ExitCode) else ExitCode.failed
    return error
