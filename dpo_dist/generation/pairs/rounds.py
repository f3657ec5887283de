"""Run a verb as a command of its own: configuration file, launcher, signals, exit code."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeAlias

from rich import box
from rich.table import Table

from dpo_dist.config.data import SourceConfig
from dpo_dist.config.load import to_yaml
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ReferenceMode, RunConfig
from dpo_dist.config.verb_options import PairsConfig, RoundReference, Verdicts
from dpo_dist.data.render import THOUGHT_FIELDS
from dpo_dist.foundation.errors import ConfigError, DataError, DpoDistError, ExitCode
from dpo_dist.foundation.files import collect_abandoned, locked, plain, staged_folder, write_text
from dpo_dist.foundation.process import EXIT_CODES, exit_codes, stop_signals
from dpo_dist.foundation.streams import output_descriptor
from dpo_dist.generation.pairs.files import table_text
from dpo_dist.generation.pairs.round_settings import check_rounds, check_settings

_EXPERIMENT = "round"
_BY_SIGNAL = 128
_REASONS = (ExitCode.invalid, ExitCode.diverged, ExitCode.preempted)


def command_of(verb: str, config: RunConfig, folder: Path, start: Sequence[str]) -> list[str]:
    """Write `config` as an experiment below `folder`; return the command that runs the verb with it.

    The command is complete: it does the same when it is typed by hand. The file has no secrets.

    Args:
        verb: `pairs` or `train`.
        config: of the verb.
        folder: for `experiment/round.yaml`.
        start: from `launcher`.
    """
    write_text(folder / "experiment" / f"{_EXPERIMENT}.yaml", to_yaml(config))
    options = ["--config-dir", str(folder), f"+experiment={_EXPERIMENT}"]
    return [*start, "-m", f"dpo_dist.{verb}", *options]


def launcher(written: str | None) -> list[str]:
    """Return the start of a command: as written, by default `dpo_dist.launch` if there are several GPUs.

    Raises:
        ConfigError: it is not one command.
    """
    if written is not None:
        try:
            return shlex.split(written)
        except ValueError as fault:
            raise ConfigError(
                "the launcher is not a command",
                where="pairs.launcher",
                got=f"{written}: {fault}",
                remedy="correct its quotes",
            ) from None
    import torch  # noqa: PLC0415  (slow, and only needed here)

    several = torch.cuda.device_count() > 1
    return [sys.executable, *(("-m", "dpo_dist.launch") if several else ())]


def run_command(command: list[str], codes: Path) -> int:
    """Run a command to its end and return its exit code; signals to stop are passed on to its processes.

    They end with this process, even if that is killed.

    Args:
        command: from `command_of`.
        codes: path for the exit codes of its processes: a launcher replaces them by its own, usually 1.

    Raises:
        ConfigError: the launcher does not exist.
        KeyboardInterrupt: the command has ended after SIGINT.
        SystemExit: it has ended after another signal, without a reason of its own.
    """
    exit_codes(codes)  # of a former start
    with _PassedOn() as signals:
        process = _started(command, codes)
        with _ended_together(process.pid):
            signals.pass_to(process.pid)
            code = process.wait()
    code = _own_code(codes, code)
    if signal.SIGINT in signals.received:
        raise KeyboardInterrupt
    if signals.received and code not in _REASONS:
        raise SystemExit(128 + signals.received[0])
    return code


def _started(command: list[str], codes: Path) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603  (the user's own launcher)
            command,
            env={**os.environ, EXIT_CODES: str(codes.resolve())},
            stdout=output_descriptor(),
            # Ctrl-C reaches this process alone, which passes it on once.
            start_new_session=True,
        )
    except OSError as fault:
        raise ConfigError(
            "the launcher cannot be started",
            where="pairs.launcher",
            got=f"{command[0]}: {fault.strerror}",
            remedy="correct it: the words before -m dpo_dist.train, such as 'accelerate launch'",
        ) from None


def _own_code(codes: Path, code: int) -> int:
    """Return the exit code of the processes that has a reason, or `code` of their launcher.

    A launcher ends the others by SIGTERM when one has ended: 143 is no reason.
    """
    written = exit_codes(codes)
    reasons = [one for one in written if one in _REASONS] or [one for one in written if one < _BY_SIGNAL]
    return max(reasons or written, default=0) or code


@contextlib.contextmanager
def _ended_together(group: int) -> Iterator[None]:
    """Send SIGTERM to what is left of a process group when the block ends, or this process is killed."""
    # The shell's read ends when the pipe closes, which no other process has open.
    reader, writer = os.pipe()
    words = ["/bin/sh", "-c", 'read -r _; kill -s TERM -- "-$0" 2> /dev/null', str(group)]
    watcher = subprocess.Popen(words, stdin=reader, start_new_session=True)  # noqa: S603
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        watcher.wait()


class _PassedOn:
    """Signals to stop that are received within the block, each passed on once to a process group.

    The block begins before the group is started: a signal that comes earlier waits for `pass_to`.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._waiting: list[int] = []
        self._group: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in stop_signals()}
        return self

    def __exit__(self, *_fault: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_to(self, group: int) -> None:
        self._group = group
        self._send()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
        self._waiting.append(number)
        self._send()

    def _send(self) -> None:
        while self._group is not None and self._waiting:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, self._waiting.pop(0))


def merge_adapter(adapter: Path, folder: Path, config: RunConfig) -> None:
    """Write the base of an adapter with the adapter's update added to its weights, in `config.model.dtype`.

    A quantized base is merged without its quantization.

    Args:
        adapter: folder of the adapter, which names its base.
        folder: for the model; written whole or not at all.
        config: of the training.

    Raises:
        CheckpointError: `folder` cannot be written.
        ConfigError: base or adapter cannot be read.
    """
    collect_abandoned(folder.parent)  # a whole model, if an earlier start was killed while it wrote one
    # Slow to import.
    from dpo_dist.generation.sampling.respond import find_model  # noqa: PLC0415
    from dpo_dist.model.load import TORCH_DTYPES  # noqa: PLC0415
    from dpo_dist.model.merge import write_merged  # noqa: PLC0415
    from dpo_dist.model.save import read_tokenizer, write_files, writing_errors  # noqa: PLC0415

    source = find_model(str(adapter), config)
    dtype, code = TORCH_DTYPES[config.model.dtype], config.model.trust_remote_code
    with writing_errors(folder), staged_folder(folder) as temporary:
        write_merged(temporary, source.folder, adapter, dtype, trust_remote_code=code)
        write_files(temporary, read_tokenizer(source.tokenizer_folder))


@dataclass(frozen=True)
class Samples:
    """The samples of a round, before its training.

    Attributes:
        policy: the model that gave them.
        prompts: their prompts with at least one score.
        responses: those with a score; of equal responses to a prompt each counts.
        unscored: responses without a score: unfinished, empty, or without a usable verdict.
        mean_score: of the responses; None without any, and for shares of won comparisons.
        pairs: number of pairs; None if no prompt gave one, so that the rounds end.
    """

    policy: str
    prompts: int
    responses: int
    unscored: int
    mean_score: float | None
    pairs: int | None


@dataclass(frozen=True)
class Training:
    """The training of a round.

    Attributes:
        steps: optimizer steps.
        accuracy: share of pairs whose chosen response has the larger reward, in the last metrics row.
        computed: reference log-probs computed by this run.
        found: those found in the store.
        seconds: of training.
    """

    steps: int
    accuracy: float | None
    computed: int | None
    found: int | None
    seconds: float | None


@dataclass(frozen=True)
class RoundResult:
    """A round so far; the last one has samples only."""

    number: int
    samples: Samples | None = None
    training: Training | None = None


def read_result(file: Path, number: int) -> RoundResult:
    """Return the stored result of a round; an empty one if there is none.

    Raises:
        DataError: the file is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        samples, training = content["samples"], content["training"]
        return RoundResult(
            number,
            None if samples is None else Samples(**samples),
            None if training is None else Training(**training),
        )
    except FileNotFoundError:
        return RoundResult(number)
    except (ValueError, TypeError, KeyError) as fault:
        raise DataError(
            "the result of a round cannot be read",
            where=str(file),
            got=type(fault).__name__,
            remedy="delete this file and run the same command again: finished work is found again",
        ) from fault


def write_result(file: Path, result: RoundResult) -> None:
    """Write the result of a round whole."""
    write_text(file, json.dumps(asdict(result), indent=2) + "\n")


def write_results(file: Path, results: Sequence[RoundResult]) -> None:
    """Write the results of all rounds, and the hints."""
    content = {"rounds": [asdict(one) for one in results], "hints": hints(results)}
    write_text(file, json.dumps(plain(content), indent=2) + "\n")


def read_training(summary: dict[str, Any]) -> Training:
    """Return the facts of a training from the content of its summary.json."""
    reference = summary.get("reference") or {}
    final = summary.get("final") or {}
    return Training(
        steps=int(summary["steps"]),
        accuracy=final.get("rewards/accuracies"),
        computed=reference.get("computed"),
        found=reference.get("hits"),
        seconds=summary.get("train_seconds"),
    )


def samples_of(policy: str, file: Path, pairs: int | None, is_relative: bool = False) -> Samples:
    """Return the counts and the mean score of a file of samples.

    A response that equals an earlier one of its prompt has its score. Scores of comparisons (`is_relative`)
    have a mean of one half in every round, so it is not given.
    """
    prompts = responses = unscored = 0
    total = 0.0
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            scores = _scores(json.loads(line))
            known = [score for score in scores if score is not None]
            prompts += bool(known)
            responses += len(known)
            unscored += len(scores) - len(known)
            total += sum(known)
    mean = total / responses if responses and not is_relative else None
    return Samples(policy, prompts, responses, unscored, mean, pairs)


def is_exhausted(file: Path, margin: float) -> bool:
    """Return whether responses have scores, and no prompt has two that differ by more than `margin`."""
    if not file.is_file():
        return False
    has_scores = False
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            known = [score for score in _scores(json.loads(line)) if score is not None]
            has_scores = has_scores or bool(known)
            if known and max(known) - min(known) > margin:
                return False
    return has_scores


def _scores(row: Mapping[str, Any]) -> list[float | None]:
    """Return the score of every response to a prompt: of equal responses, the judge has scored the first."""
    samples = [*row["responses"], *row["unused"]]
    texts = [(one["content"].strip(), one.get(THOUGHT_FIELDS[0])) for one in samples]
    known = {
        text: one["score"] for text, one in zip(texts, samples, strict=True) if one.get("score") is not None
    }
    return [known.get(text) for text in texts]


def hints(results: Sequence[RoundResult]) -> list[str]:
    """Return sentences about scores that do not rise and responses that are all alike."""
    found = []
    scored = [(one.number, one.samples) for one in results if one.samples is not None]
    means = [(number, samples.mean_score) for number, samples in scored if samples.mean_score is not None]
    if len(means) > 1:
        (_, before), (number, after) = means[-2:]
        if after <= before:
            found.append(
                f"the mean score did not rise in round {number - 1} ({before:.4g} to {after:.4g}): look at "
                "the samples, lower optim.lr, take other prompts (pairs.prompt_parts) or more samples"
            )
    if scored and scored[-1][1].pairs is None:
        found.append(
            f"round {scored[-1][0]} has no pair: no two responses to a prompt have scores that differ by "
            "more than pairs.margin, so there is nothing more to learn from these prompts and this judge"
        )
    return found


def results_table(results: Sequence[RoundResult]) -> str:
    """Return the rounds as a table for the terminal; scores are those before a round's training."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in ("round", "responses", "mean score", "pairs", "steps", "accuracy", "reference", "seconds"):
        table.add_column(heading, justify="right")
    for one in results:
        samples, training = one.samples, one.training
        if samples is None:
            continue
        reference = (
            "" if training is None else f"{_cell(training.computed)} new, {_cell(training.found)} found"
        )
        table.add_row(
            str(one.number) if training is not None else "after",
            str(samples.responses),
            _cell(samples.mean_score, ".4f"),
            _cell(samples.pairs),
            *(
                ("", "", "", "")
                if training is None
                else (
                    str(training.steps),
                    _cell(training.accuracy, ".3f"),
                    reference,
                    _cell(training.seconds, ".0f"),
                )
            ),
        )
    return table_text(table)


def _cell(value: float | None, format_: str = "") -> str:
    return "-" if value is None else format(value, format_)


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
