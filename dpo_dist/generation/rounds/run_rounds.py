"""Rounds: sample, score, pair, train; the trained policy gives the next round's samples. Resumable anywhere.

Each stage is a command of its own, `pairs` or `train`, which itself continues from its last finished part or
checkpoint; a finished stage is recorded and never repeated.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from dpo_dist.config.data_schema import SourceConfig
from dpo_dist.config.pairs_schema import PairsConfig, RoundReference, Verdicts
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ReferenceMode, RunConfig
from dpo_dist.errors import ConfigError, DpoDistError, ExitCode
from dpo_dist.generation.lock import locked
from dpo_dist.generation.rounds.checks import check_rounds, check_settings
from dpo_dist.generation.rounds.commands import command_of, launcher, run_command
from dpo_dist.generation.rounds.merge import merge_adapter
from dpo_dist.generation.rounds.results import (
    RoundResult,
    hints,
    is_exhausted,
    read_result,
    read_training,
    results_table,
    samples_of,
    write_result,
    write_results,
)

Say: TypeAlias = Callable[[str], None]
Run: TypeAlias = Callable[[list[str], Path], int]


def run_rounds(config: RunConfig, say: Say, run: Run = run_command) -> int:
    """Do `config.pairs.rounds` rounds, and score the last policy; return the exit code.

    Args:
        config: of the first round; its `data.train` are the prompts.
        say: prints a line.
        run: `run_command`.

    Raises:
        DpoDistError: the rounds cannot start, or a stage has failed.
    """
    check_rounds(config)
    folder = RunFolder.of(config)
    remedy = "wait until it ends, or set another run.dir"
    with locked(folder.rounds / folder.lock.name, "does the rounds of this run directory", remedy):
        check_settings(config, folder)
        try:
            results, code = _do_rounds(_Rounds(config, folder, say, run))
        except KeyboardInterrupt:
            say("interrupted: the same command continues")
            return ExitCode.interrupted
        except SystemExit:
            say("stopped: the same command continues")
            raise
        if code == ExitCode.completed:
            _report(results, config, say)
    return code


def _do_rounds(rounds: "_Rounds") -> tuple[list[RoundResult], int]:
    """Return the results of all rounds, up to a preempted training, and the exit code."""
    count, results = rounds.config.pairs.rounds, list[RoundResult]()
    for number in range(1, count + 2):
        result, code = rounds.sampled(number), int(ExitCode.completed)
        has_pairs = result.samples is not None and result.samples.pairs is not None
        if number <= count and has_pairs and result.training is None:
            result, code = rounds.trained(result)
        results.append(result)
        write_results(rounds.folder.rounds_summary, results)
        if code != ExitCode.completed or not has_pairs:
            return results, code
    return results, ExitCode.completed


def _report(results: list[RoundResult], config: RunConfig, say: Say) -> None:
    say(f"results of the rounds:\n{results_table(results)}")
    for hint in hints(results):
        say(f"hint: {hint}")
    trained = [one.number for one in results if one.training is not None]
    if trained:
        say(f"the last policy: {_policy(config, trained[-1])}")


@dataclass(frozen=True)
class _Rounds:
    config: RunConfig
    folder: RunFolder
    say: Say
    run: Run

    def sampled(self, number: int) -> RoundResult:
        """Return the round with its samples, which are made if they are not there."""
        folder = self.folder.round(number)
        result = read_result(folder.round_result, number)
        if result.samples is not None:
            mean = result.samples.mean_score
            self.say(f"round {number}: samples found" + ("" if mean is None else f", mean score {mean:.4f}"))
            return result
        config = sampling_config(self.config, number)
        self.say(f"round {number}: samples of {config.model.path}")
        code = self._run("pairs", config, folder.path / "sampling")
        pairs: int | None = None
        if code == ExitCode.completed:
            pairs = _lines(folder.pairs_file)
        elif not (code == ExitCode.invalid and number > 1 and self._is_learned(folder)):
            raise _failed(f"sampling of round {number}", code, folder.rank_log(0))
        endpoint = config.pairs.endpoint
        is_relative = endpoint.url is not None and endpoint.verdicts is Verdicts.compare
        samples = samples_of(config.model.path, folder.pairs_samples, pairs, is_relative)
        result = RoundResult(number, samples)
        write_result(folder.round_result, result)
        mean = samples.mean_score
        self.say(
            f"round {number}: {samples.responses:,} responses"
            + ("" if mean is None else f", mean score {mean:.4f}")
        )
        return result

    def _is_learned(self, folder: RunFolder) -> bool:
        """Return whether a round has no pair because all its samples are equally good."""
        return not folder.pairs_file.exists() and is_exhausted(folder.pairs_samples, self.config.pairs.margin)

    def _run(self, verb: str, config: RunConfig, folder: Path) -> int:
        command = command_of(verb, config, folder, launcher(self.config.pairs.launcher))
        return self.run(command, folder / "exit_codes")

    def trained(self, result: RoundResult) -> tuple[RoundResult, int]:
        """Return the round with its training, and the exit code: completed or preempted.

        Raises:
            DpoDistError: the training has failed.
        """
        folder = self.folder.round(result.number)
        config = training_config(self.config, result.number)
        self.say(f"round {result.number}: training of {config.model.path}")
        code = self._run("train", config, folder.path / "training")
        if code == ExitCode.preempted:
            self.say(
                f"round {result.number}: the training stopped with a checkpoint; the same command continues"
            )
            return result, code
        if code != ExitCode.completed:
            raise _failed(f"training of round {result.number}", code, folder.training.rank_log(0))
        if config.model.adapter is not None and not folder.policy.exists():
            self.say(f"round {result.number}: the adapter is merged into {config.model.path}")
            merge_adapter(folder.training.model, folder.policy, config)
        summary = json.loads(folder.training.summary.read_text(encoding="utf-8"))
        result = replace(result, training=read_training(summary))
        write_result(folder.round_result, result)
        return result, code


def sampling_config(config: RunConfig, number: int) -> RunConfig:
    """Return the configuration of `pairs` in a round: samples of the policy so far, in its own folder."""
    pairs = replace(
        config.pairs,
        rounds=0,
        launcher=None,
        reference=PairsConfig.reference,
        seed=config.pairs.seed + number - 1,
        prompt_part=(config.pairs.prompt_part + number - 1) % config.pairs.prompt_parts,
        output=None,
    )
    return replace(_with_policy(config, number), run=_run(config, _round(config, number).path), pairs=pairs)


def training_config(config: RunConfig, number: int) -> RunConfig:
    """Return the configuration of `train` in a round: the policy so far, on the pairs of its samples."""
    folder = _round(config, number)
    data = replace(config.data, train=[SourceConfig(path=str(folder.pairs_file))])
    return replace(
        _with_policy(config, number),
        run=_run(config, folder.training.path),
        data=data,
        pairs=PairsConfig(),
        tracking=replace(config.tracking, group=config.tracking.group or config.run.name),
    )


def _round(config: RunConfig, number: int) -> RunFolder:
    return RunFolder.of(config).round(number)


def _run(config: RunConfig, folder: Path) -> Any:
    return replace(config.run, dir=str(folder))


def _policy(config: RunConfig, number: int) -> Path:
    """Return the folder of the model that round `number` has trained."""
    folder = _round(config, number)
    return folder.training.model if config.model.adapter is None else folder.policy


def _with_policy(config: RunConfig, number: int) -> RunConfig:
    """Return the configuration with the policy that round `number` starts from, and its reference model."""
    if number == 1:
        return config
    model = replace(config.model, path=str(_policy(config, number - 1)), revision=None)
    reference, mode = config.reference, config.reference.mode
    if config.pairs.reference is RoundReference.previous:
        reference = replace(reference, path=None, revision=None)
    elif reference.path is None and mode is not ReferenceMode.none:
        reference = replace(reference, path=config.model.path, revision=config.model.revision)
        if mode is ReferenceMode.adapter:  # the base of a later adapter is not the first model
            quantization = config.model.quantization
            reference = replace(reference, mode=ReferenceMode.cached, quantization=quantization)
    return replace(config, model=model, reference=reference)


def _lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _failed(stage: str, code: int, log: Path) -> DpoDistError:
    """Return the error of a stage whose command ended with `code`; its own words are already printed."""
    words = {
        ExitCode.invalid: "cannot start or continue",
        ExitCode.diverged: "diverged",
        ExitCode.preempted: "was stopped",
    }
    error = ConfigError(
        f"the {stage} {words.get(ExitCode(code), 'failed') if code in set(ExitCode) else 'failed'}",
        where=str(log),
        got=f"exit code {code}" if code >= 0 else f"signal {-code}",
        remedy="see its message above; the same command continues there, and repeats no finished stage",
    )
    error.exit_code = code if code in set(ExitCode) else ExitCode.failed
    return error
