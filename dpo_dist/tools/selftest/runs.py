"""Results of checks; processes that a check starts, and the invented model and pairs on which they train."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import psutil

from dpo_dist.config.load import load_run_config
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.errors import DpoDistError
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.foundation.streams import print_line
from dpo_dist.training.reporting.metrics_log import read_latest_rows
from dpo_dist.training.start.preflight import checked_start

HANGS_SECONDS, _RUN_SECONDS = 120, 900  # for a process that waits for another one, for a whole run
WITHOUT_OVERLAP = "without overlap"
STEPS, COMPARED_METRICS = 4, ("loss", "grad_norm")  # for runs that are compared
RunRows = list[dict[str, Any]]


_NOT_INSTALLED = ("not installed", "needs Triton", "in torch before")
_NO_ROOM = ("memory is exhausted", "has no room", "cannot be written", "No space left")


class Check(NamedTuple):
    """A check that `passed`, `failed`, was `skipped` or only `measured`; the result in words and values."""

    name: str
    outcome: str
    seen: str
    values: Mapping[str, Any] = MappingProxyType({})


def shared_facts(date: str, checks: Sequence[Check]) -> dict[str, Any]:
    """Return what one machine tells others: devices, versions, speeds, outcomes; no name, path or error."""
    values = {check.name: check.values for check in checks}
    gpus = Counter(facts["name"] for facts in values.values() if "name" in facts)
    device = ", ".join(f"{number} x {name}" for name, number in gpus.items()) or "CPU"
    speeds = {name: facts for name, facts in values.items() if "pairs_per_second" in facts}
    facts = {"date": date, "device": device, "versions": values.get("versions", {}), "speeds": speeds}
    return {**facts, "checks": {check.name: check.outcome for check in checks}}


def failed_check(name: str, error: str, *, is_large: bool = False) -> Check:
    """Return a check that ended with an error, `skipped` for want of a package or a newer torch.

    One that `is_large` may also lack room.
    """
    lacks = _NOT_INSTALLED + _NO_ROOM * is_large
    return Check(name, "skipped" if any(lack in error for lack in lacks) else "failed", error)


def check_without_faults(name: str, faults: Sequence[str], seen: str) -> Check:
    """Return a check that failed with these faults, or, without any, passed with the result `seen`."""
    return Check(name, "failed" if faults else "passed", "; ".join(faults) or seen, {"faults": len(faults)})


def write_pairs(file: Path) -> None:
    """Write pairs of invented words."""
    draw = random.Random(0)  # noqa: S311  (no secret)

    def words() -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=4)) for _ in range(draw.randint(5, 60)))

    pairs = [{"prompt": words(), "chosen": words(), "rejected": words()} for _ in range(384)]
    file.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))


def write_model(folder: Path, shape: dict[str, Any]) -> Path:
    """Write random weights of this shape in bf16, with a byte tokenizer; return the folder."""
    import torch  # noqa: PLC0415  (slow)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    end, *letters = "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({word: number for number, word in enumerate((end, *letters))}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape, eos_token_id=0, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def quoted(path: Path) -> str:
    """Return a path in quotes for Hydra's command line; it may contain brackets, commas and quotes."""
    return '"' + str(path).replace('"', '\\"') + '"'


def train_rows(
    folder: Path, name: str, words: Sequence[str], gpus: int, steps: range, code: int = 0
) -> tuple[RunRows, str]:
    """Train, and return metrics rows and the error, "" without one; `code`: the exit code that is expected.

    The run directory is deleted; a preempted run keeps it without the metrics, for the run that resumes it.
    """
    run, program = RunFolder(folder / "run"), ["-m", "dpo_dist.train"]
    if name.endswith(WITHOUT_OVERLAP):
        program = ["-m", "dpo_dist.tools.selftest", "--without-overlap"]
    error = run_python(name, [*program, *_usual_words(folder, run), *words], gpus, code)
    rows: RunRows = [] if error else read_latest_rows(run)
    rows = [row for row in rows if all(math.isfinite(row.get(key) or math.nan) for key in COMPARED_METRICS)]
    shutil.rmtree(run.metrics if code and not error else run.path, ignore_errors=True)
    if not error and (done := [row["step"] for row in rows]) != [*steps]:
        error = f"rows of steps {done}, not {[*steps]}: a metric is not finite, or the run was not resumed"
    return rows, error


def train_without_overlap(words: Sequence[str]) -> int:
    """Train in this process without overlapping communication with computing; return the exit code."""
    from dpo_dist.distributed import deepspeed_config  # noqa: PLC0415  (slow)

    deepspeed_config.OVERLAPS = False
    config, stop = load_run_config(words, verb="train"), StopRequest()
    with stop.listening(), checked_start(config, trains=True) as console:
        from dpo_dist.tools.report.recorder import reporting  # noqa: PLC0415  (slow)
        from dpo_dist.training.run import train  # noqa: PLC0415  (slow)

        return train(config, console, stop, reporting())


def _usual_words(folder: Path, run: RunFolder) -> list[str]:
    """Return the overrides that all training runs share."""
    words = [f"run.dir={quoted(run.path)}", f"data.train=[{quoted(folder / 'pairs.jsonl')}]"]
    words += [f"data.cache={quoted(folder / 'encoded')}", f"reference.store={quoted(folder / 'store')}"]
    words += ["data.max_length=1024", "tracking=off", f"parallelism.timeout_seconds={HANGS_SECONDS}"]
    words += ["trainer.log_every=1", "trainer.save_every=0", "optim.lr=1e-4", "optim.warmup_ratio=0"]
    return [*words, "trainer.global_batch_pairs=16"]


def run_python(name: str, words: Sequence[str], gpus: int, code: int = 0) -> str:
    """Run Python with these arguments, on several GPUs by the launcher; return its error, if any."""
    print_line(f"running: {name}", sys.stderr)
    launcher = ["-m", "dpo_dist", "launch", "--num_processes", str(gpus)] if gpus > 1 else []
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = given if given[0] else [str(number) for number in range(gpus)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible[:gpus])}
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    pipe |= {"text": True, "errors": "replace"}
    with subprocess.Popen([sys.executable, *launcher, *words], env=environment, **pipe) as process:  # noqa: S603  (this package)
        try:
            screen, _ = process.communicate(timeout=_RUN_SECONDS)
        except BaseException as ended:  # it takes too long, or a signal ends this process
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            if isinstance(ended, subprocess.TimeoutExpired):
                return f"it did not end in {_RUN_SECONDS} s"
            raise
    if process.returncode < 0:  # without a launcher nothing has printed the signal
        screen += f"\nit was ended by {signal.Signals(-process.returncode).name}"
    return "" if process.returncode == code else f"exit code {process.returncode}: {_cause(screen)}"


def _cause(screen: str) -> str:
    """Return the line that says why a process failed: a signal, an error, or else the last line."""
    lines = [line.strip() for line in screen.splitlines() if line.strip()] or ["no output"]
    titles = ("error: ", *(f"{kind.title}: " for kind in DpoDistError.__subclasses__()))
    by_signal = [line for line in lines if " was ended by SIG" in line]
    return (by_signal or [line for line in lines if line.startswith(titles)] or lines[-1:])[0]
