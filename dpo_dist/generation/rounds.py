"""Rounds: sample, score, pair, train; the trained policy gives the next round's samples. Resumable anywhere.

Each stage is a command of its own, `pairs` or `train`, which itself continues from its last finished part or
checkpoint; a finished stage is recorded and never repeated.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from dpo_dist.atomic import write_text
from dpo_dist.config.data_schema import SourceConfig
from dpo_dist.config.identity import differing_keys, plain
from dpo_dist.config.load import from_yaml, to_yaml
from dpo_dist.config.pairs_schema import PairsConfig, PairsMethod, RoundReference
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import NO_MODEL, ReferenceMode, RunConfig
from dpo_dist.errors import ConfigError, DpoDistError, ExitCode, Outcome
from dpo_dist.generation.lock import locked
from dpo_dist.generation.round_commands import command_of, run_command
from dpo_dist.generation.round_results import (
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
Run: TypeAlias = Callable[[list[str]], int]

# Keys of `pairs` that another start may change: the length, the hardware, and methods that rounds do not use.
_FREE = ("rounds", "launcher", "batch_tokens", "part_prompts", "people")


def run_rounds(config: RunConfig, say: Say, run: Run = run_command) -> int:
    """Do `config.pairs.rounds` rounds, and score the last policy; return the exit code.

    Args:
        config: of the first round; its `data.train` are the prompts.
        say: prints a line.
        run: runs a command and returns its exit code.

    Raises:
        DpoDistError: the rounds cannot start, or a stage has failed.
    """
    _check(config)
    folder = RunFolder.of(config)
    remedy = "wait until it ends, or set another run.dir"
    with locked(folder.rounds / folder.lock.name, "does the rounds of this run directory", remedy):
        _check_settings(config, folder)
        rounds = _Rounds(config, folder, say, run)
        results = []
        for number in range(1, config.pairs.rounds + 2):
            results.append(rounds.sampled(number))
            if results[-1].training is None and number <= config.pairs.rounds:
                if results[-1].samples is not None and results[-1].samples.pairs is None:
                    break
                results[-1], code = rounds.trained(results[-1])
                if code != ExitCode.completed:
                    return code
            write_results(folder.rounds_summary, results)
        say(results_table(results))
        for hint in hints(results):
            say(f"hint: {hint}")
        write_results(folder.rounds_summary, results)
        trained = [one.number for one in results if one.training is not None]
        if trained:
            say(f"the last policy: {folder.round(trained[-1]).training.model}")
    return ExitCode.completed


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
        code = self.run(command_of("pairs", config, folder.path / "sampling"))
        if code == ExitCode.completed:
            pairs: int | None = _lines(folder.pairs_file)
        elif (
            code == ExitCode.invalid and not folder.pairs_file.exists() and is_exhausted(folder.pairs_samples)
        ):
            pairs = None
        else:
            raise _failed(f"sampling of round {number}", code, folder.rank_log(0))
        samples = samples_of(config.model.path, folder.pairs_samples, pairs)
        result = RoundResult(number, samples)
        write_result(folder.round_result, result)
        mean = samples.mean_score
        self.say(
            f"round {number}: {samples.responses:,} responses"
            + ("" if mean is None else f", mean score {mean:.4f}")
        )
        return result

    def trained(self, result: RoundResult) -> tuple[RoundResult, int]:
        """Return the round with its training, and the exit code: completed or preempted.

        Raises:
            DpoDistError: the training has failed.
        """
        folder = self.folder.round(result.number)
        config = training_config(self.config, result.number)
        self.say(f"round {result.number}: training of {config.model.path}")
        code = self.run(command_of("train", config, folder.path / "training"))
        if code != ExitCode.completed:
            # A launcher of several processes replaces their exit codes by its own.
            outcome = _outcome(folder.training)
            if outcome == Outcome.preempted:
                self.say(
                    f"round {result.number}: the training stopped with a checkpoint; "
                    "the same command continues"
                )
                return result, ExitCode.preempted
            code = ExitCode.diverged if outcome == Outcome.diverged else code
            raise _failed(f"training of round {result.number}", code, folder.training.rank_log(0))
        summary = json.loads(folder.training.summary.read_text(encoding="utf-8"))
        result = replace(result, training=read_training(summary))
        write_result(folder.round_result, result)
        return result, code


def sampling_config(config: RunConfig, number: int) -> RunConfig:
    """Return the configuration of `pairs` in a round: samples of the policy so far, in its own folder."""
    pairs = replace(
        config.pairs,
        rounds=0,
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
        pairs=replace(PairsConfig(), launcher=config.pairs.launcher),
        tracking=replace(config.tracking, group=config.tracking.group or config.run.name),
    )


def _round(config: RunConfig, number: int) -> RunFolder:
    return RunFolder.of(config).round(number)


def _run(config: RunConfig, folder: Path) -> Any:
    return replace(config.run, dir=str(folder))


def _with_policy(config: RunConfig, number: int) -> RunConfig:
    """Return the configuration with the policy that round `number` starts from, and its reference model."""
    if number == 1:
        return config
    policy = str(_round(config, number - 1).training.model)
    model = replace(config.model, path=policy, revision=None)
    reference = config.reference
    if config.pairs.reference is RoundReference.previous:
        reference = replace(reference, path=None, revision=None)
    elif reference.path is None and reference.mode in (ReferenceMode.cached, ReferenceMode.live):
        reference = replace(reference, path=config.model.path, revision=config.model.revision)
    return replace(config, model=model, reference=reference)


def _lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _outcome(folder: RunFolder) -> str | None:
    try:
        return str(json.loads(folder.state.read_text(encoding="utf-8"))["outcome"])
    except (OSError, ValueError, KeyError):
        return None


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


def _check(config: RunConfig) -> None:
    """Check that rounds can be done with this configuration, by one process.

    Raises:
        ConfigError: they cannot.
    """
    pairs = config.pairs
    for is_broken, message, where, got, remedy in (
        (
            int(os.environ.get("WORLD_SIZE", "1")) > 1,
            "rounds start their own processes",
            "pairs.rounds",
            "a launcher of several processes",
            "run python -m dpo_dist.pairs, and set pairs.launcher='accelerate launch ...'",
        ),
        (
            pairs.method is not PairsMethod.samples,
            "rounds need samples of the policy",
            "pairs.method",
            str(pairs.method),
            "set pairs.method=samples, or remove pairs.rounds",
        ),
        (
            bool(pairs.models),
            "rounds take their samples from the policy",
            "pairs.models",
            ", ".join(pairs.models),
            "set model.path to the policy of the first round, and remove pairs.models",
        ),
        (
            config.model.path == NO_MODEL,
            "rounds need a policy",
            "model.path",
            "nothing",
            "set model.path=FOLDER",
        ),
        (
            pairs.output is not None,
            "every round writes pairs of its own",
            "pairs.output",
            str(pairs.output),
            "remove it: the pairs are in <run.dir>/rounds",
        ),
        (
            config.model.adapter is not None or config.model.quantization is not None,
            "rounds train all weights: the next round cannot start from an adapter",
            "model.adapter",
            "an adapter",
            "remove model.adapter, or do each round by a command of its own",
        ),
    ):
        if is_broken:
            raise ConfigError(message, where=where, got=got, remedy=remedy)


def _check_settings(config: RunConfig, folder: RunFolder) -> None:
    """Check that earlier rounds in this folder had the same settings, and write them at the first start.

    Raises:
        ConfigError: they had others.
    """
    file = folder.rounds_config
    if not file.exists():
        write_text(file, to_yaml(config))
        return
    before = from_yaml(file.read_text(encoding="utf-8"))
    changed = differing_keys(before, config)
    for field in fields(PairsConfig):
        old, new = plain(getattr(before.pairs, field.name)), plain(getattr(config.pairs, field.name))
        if field.name not in _FREE and old != new:
            changed[f"pairs.{field.name}"] = (old, new)
    if changed:
        shown = "; ".join(f"{key}: {old} before, {new} now" for key, (old, new) in changed.items())
        raise ConfigError(
            "the rounds in this run directory have other settings",
            where=str(file),
            got=shown,
            remedy="set another run.dir; or, to do further rounds with the new settings, delete this file",
        )
