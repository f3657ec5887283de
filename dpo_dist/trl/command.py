"""The command of a script's run: TRL's arguments and keys of ours become a file, and words of `train`."""

import contextlib
import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from dpo_dist.config.load import load_run_config
from dpo_dist.config.rules import best_direction
from dpo_dist.config.run_folder import RunFolder, checkpoint_folders
from dpo_dist.config.schema import DataConfig, Direction, RunConfig
from dpo_dist.foundation.errors import ConfigError, DpoDistError, raise_all
from dpo_dist.foundation.files import locked, write_text
from dpo_dist.foundation.process import this_rank
from dpo_dist.tools.convert.arguments import KTOConfig, TrainerArguments, refused
from dpo_dist.tools.convert.reading import ForeignRun
from dpo_dist.tools.convert.translate import Translation, translate_run
from dpo_dist.training.start.run_state import has_other_length, read_state
from dpo_dist.trl.data import examples, longest_tokens, sources
from dpo_dist.trl.launcher import launcher_keys

_BITS = ("load_in_", "bnb_4bit_quant_type")
"""How the keys begin that say how a base is quantized."""


class ScriptCommand:
    """What a script asks a run to do. A trainer collects it when it is made, writes it, and trains by it."""

    def __init__(
        self, args: TrainerArguments, kind: type[TrainerArguments], dtype: torch.dtype | None
    ) -> None:
        """Take the arguments of a `kind` of trainer; `dtype`: that of a model in memory, else None."""
        self.args, self.kind = args, kind
        self.arguments = copy.deepcopy(dict(vars(args)))
        """The values of `args` by which the command is made: `args` stays in the script's hands."""
        self.folder = Path(args.output_dir)
        self.run = RunFolder(self.folder / "run")
        self.theirs = args.keys(dtype)
        """Keys of TRL, as in a file of TRL: the arguments that are set, and an adapter's options."""
        self.ours: dict[str, Any] = {"run.dir": str(self.run), "run.root": str(self.folder)}
        """Keys of dpo_dist beside them, for what is no argument there: records, models, sharding."""
        self.ours["samples.prompts"] = 0
        self.evaluation: list[dict[str, Any]] = []
        """The sources of `eval_dataset`: for `evaluate` also if the run itself does not evaluate."""
        self.epoch_examples = 0
        """The pairs, or labelled responses, of an epoch; until `check`, by the lines of the files."""
        self.words: list[str] = []
        """The words of `train`: the file, and `args.words`. Empty until the file is written."""

    @property
    def labels(self) -> list[str]:
        """The names of the evaluation sets, if they have some."""
        return [source["label"] for source in self.evaluation if "label" in source]

    @property
    def best_metric(self) -> str:
        """The metric that chooses the best checkpoint, as TRL names it; empty: none."""
        return (self.args.metric_for_best_model or "").removeprefix("eval_")

    def add_records(self, train_dataset: Any, eval_dataset: Any, *, has_adapter: bool) -> None:
        """Write the records, and set their keys."""
        train = self.ours["data.train"] = sources(train_dataset, "train_dataset", self.args)
        if eval_dataset is not None:
            self.evaluation = sources(eval_dataset, "eval_dataset", self.args)
        if self.args.eval_strategy != "no":
            self.ours["data.eval"] = self.evaluation
        columns = train[0].get("columns", {})
        self.ours["data.unpair"] = self.kind is KTOConfig and "chosen" in columns
        if "images" in columns:
            trained = "none" if has_adapter else "tower"  # as TRL does
            self.ours |= {"model.images.train": trained, "data.images": str(Path.cwd())}

    def add_quantization(self, given: Any, model: Any) -> bool:
        """Set the keys of a quantized base, said by the argument or by the model; return if it is one."""
        given = given or self.theirs["model_init_kwargs"].pop("quantization_config", None)
        given = given or getattr(getattr(model, "config", None), "quantization_config", None)
        if given is None:
            return False
        given = BitsAndBytesConfig.from_dict(given) if isinstance(given, Mapping) else given
        self.theirs |= {key: value for key, value in given.to_dict().items() if key.startswith(_BITS)}
        return True

    def add_sharding(self) -> list[str]:
        """Set the keys that a file of DeepSpeed or of the launcher means; return what to print about them."""
        given = self.args.deepspeed
        if isinstance(given, Mapping) or (given and Path(given).is_file()):
            del self.theirs["deepspeed"]  # what it says is read below
        elif given or self.args.fsdp:
            return []  # the argument wins over the launcher, and the translation reads it
        is_quantized = any(key.startswith(_BITS) for key in self.theirs | self.theirs["model_init_kwargs"])
        is_half = bool(self.theirs.get("bf16", True) or self.args.fp16)
        keys, said = launcher_keys(os.environ, self.args, is_quantized=is_quantized, is_half=is_half)
        self.ours |= keys
        return said

    def set_longest(self, tokenizer: Any) -> None:
        """Set the length to that of the longest record, where the arguments have none: TRL then cuts none."""
        every, template = [*self.ours["data.train"], *self.evaluation], self.ours.get("data.chat_template")
        if any("images" in source.get("columns", {}) for source in every):
            remedy = "set it to a number of tokens that fits all records"
            raise refused("max_length", "None, with images", remedy)
        del self.theirs["max_length"]
        limits = DataConfig(chat_template=template, unpair=self.ours["data.unpair"], max_length=2**30)
        self.ours["data.max_length"] = longest_tokens(every, tokenizer, limits)

    def set_intervals(self) -> None:
        """Set the intervals in steps, by the lines of the files: each is a record."""
        lines = sum(len(Path(source["path"]).read_bytes().splitlines()) for source in self.ours["data.train"])
        self._set_epoch_examples(lines * (2 if self.ours["data.unpair"] else 1))

    def _set_epoch_examples(self, count: int) -> None:
        self.epoch_examples = count
        self.theirs |= self.args.intervals(count)

    def set_best_metric(self) -> None:
        """Name the metric of one evaluation set as here: `eval_easy_loss` is `loss/easy`."""
        metric, label = self._best_of_set()
        if label:  # a run with one set writes its metrics without a name
            self.theirs["metric_for_best_model"] = f"{metric}/{label}" if len(self.labels) > 1 else metric

    def _best_of_set(self) -> tuple[str, str]:
        """Return `best_metric` without the evaluation set that it names, and the name of this set."""
        named = (label for label in self.labels if self.best_metric.startswith(f"{label}_"))
        label = max(named, key=len, default="")
        return self.best_metric.removeprefix(f"{label}_" if label else ""), label

    def faults(self) -> list[ConfigError]:
        """Return errors of arguments that do not fit the records."""
        stops_early, has_evaluation = "early_stopping_patience" in self.theirs, bool(self.evaluation)
        faults = self.args.faults(self.epoch_examples, has_evaluation=has_evaluation, stops_early=stops_early)
        metric, label = self._best_of_set()
        best, is_highest = best_direction(f"eval_{metric}"), bool(self.args.greater_is_better)
        if metric and not label and len(self.labels) > 1:
            remedy = f"name the set: eval_{self.labels[0]}_{metric}"
            faults.append(refused("metric_for_best_model", f"{metric}, of several sets", remedy))
        elif best is not None and is_highest != (best is Direction.highest):
            remedy = f"set it to {best is Direction.highest}: here the {best} value of {metric} is the best"
            faults.append(refused("greater_is_better", str(is_highest), remedy))
        return faults

    def check(self, tokenizer: Any) -> None:
        """Raise the errors of the translation and of the script's `words`, before a model is written."""
        with tempfile.TemporaryDirectory() as folder, self.in_words_of_the_script():
            file = Path(folder, "dpo_dist.yaml")
            write_text(file, self._translation().as_file())
            limits = load_run_config([str(file), *self.args.words]).data
        if self.args.counts_records and "data.images" not in self.ours:
            # `set_intervals` has counted lines. A record that cannot be used is no part of an epoch, and it
            # takes the words to know which these are.
            self._set_epoch_examples(examples(self.ours["data.train"], tokenizer, limits))

    def write(self) -> Translation:
        """Write the file of the run, and set the words; return the translation."""
        translation, file = self._translation(), self.folder / "dpo_dist.yaml"
        write_text(file, translation.as_file())
        self.words = [str(file), *self.args.words]
        return translation

    def _translation(self) -> Translation:
        """Translate the keys; raise if one with an effect in TRL has no translation."""
        name = self.kind.__name__
        translation = translate_run(ForeignRun("TRL", self.theirs, name), self.ours)
        inner = self.theirs["model_init_kwargs"] | self.theirs.get("lr_scheduler_kwargs", {})
        given = self.theirs | inner
        faults = [
            refused(key, str(given.get(key)), f"{why}; keys of dpo_dist go into {name}(words=[...])")
            for key, why in translation.reasons.items()
            if key not in translation.unneeded and key not in translation.unused
        ]
        raise_all(faults)
        return translation

    def set_patience(self, evaluations: int | None) -> None:
        """Stop early after so many evaluations, or not; write the file anew, if there is one."""
        self.theirs.pop("early_stopping_patience", None)
        if evaluations is not None:
            self.theirs["early_stopping_patience"] = evaluations
        if self.words:  # else the trainer is still being made
            self.write()

    def configuration(self) -> RunConfig:
        """Return the configuration of the run, as `train` reads it."""
        return load_run_config(self.words)

    def check_resume(self, wanted: str) -> None:
        """Check that there is a checkpoint of these arguments, and that it is `wanted` if this is a path."""
        last = next(iter(checkpoint_folders(self.run.checkpoints)), None)
        if last is None:
            remedy = "there is no checkpoint yet: leave it out, and train() continues one if there is one"
            raise refused("resume_from_checkpoint", wanted, remedy)
        if wanted != "True" and last.resolve() != Path(wanted).resolve():
            raise refused("resume_from_checkpoint", wanted, f"pass True or {last}")
        state, identity = read_state(self.run), self.configuration().identity
        if state is None or has_other_length(state.identity, identity):
            return  # `train` itself says what to do about another length
        if state.identity.get("run_digest") != identity.digest:
            remedy = "leave it out to train from the start (what is there is kept), or restore the arguments"
            raise refused("resume_from_checkpoint", f"{last}, of other arguments or data", remedy)

    def move_former_run(self) -> Path | None:
        """Move a run aside that TRL would replace, and return where to; None: there is none to move."""
        if this_rank() != 0:
            self.wait_for_rank_0("moved the former run aside", lambda: not self._is_replaced())
            return None
        if not self._is_replaced():
            return None
        numbers = (number for number in range(1, 10**6) if not Path(f"{self.run}-{number}").exists())
        aside = Path(f"{self.run}-{next(numbers)}")
        with locked(self.run.lock, "trains in this output_dir", "wait for it, or set another output_dir"):
            self.run.path.rename(aside)
        return aside

    def _is_replaced(self) -> bool:
        """Return whether the run in `output_dir` is complete, or one of other arguments, models or data."""
        state, identity = read_state(self.run), self.configuration().identity
        return state is not None and (
            state.is_finished or state.identity.get("run_digest") != identity.digest
        )

    def wait_for_rank_0(self, work: str, is_done: Callable[[], bool]) -> None:
        """Wait until rank 0 has done what this rank needs; if that fails, a launcher ends this process.

        By files: outside of `train` the processes of a script have not joined.
        """
        seconds = self.configuration().parallelism.timeout_seconds
        end = time.monotonic() + seconds
        while not is_done():
            if time.monotonic() > end:
                remedy = "see the error of rank 0; words=['parallelism.timeout_seconds=3600'] waits longer"
                raise DpoDistError(f"rank 0 has not {work} in {seconds} s", remedy=remedy)
            time.sleep(0.1)

    @contextlib.contextmanager
    def in_words_of_the_script(self) -> Iterator[None]:
        """Say in the words of a script what to do about an error of a run."""
        try:
            yield
        except DpoDistError as error:
            text = error.advice.text.replace("run.dir", "output_dir").replace("model.adapter", "peft_config")
            error.where = error.where.replace("model.adapter", "peft_config")
            if words := error.advice.write:
                text += f"; a script passes it as {self.kind.__name__}(words={[*words]})"
            error.advice = replace(error.advice, text=text)
            raise


def dtype_in_memory(model: Any) -> torch.dtype | None:
    """Return the type in which a model in memory is trained; None: the arguments say it."""
    is_named = isinstance(model, str) or hasattr(model, "quantization_method")
    return None if is_named else getattr(model, "dtype", None)
