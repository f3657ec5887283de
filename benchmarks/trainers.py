"""One run of a trainer in this process: `python -m benchmarks.trainers OUT RUN`, RUN as JSON (`runs.Run`).

`runs.start` starts it. Writes measurements to OUT/rank-N.json: seconds of training steps, of scoring by the
reference, and of the whole run with loading and saving; peak memory; metrics rows of all steps.
"""

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.runs import Result, Run
from benchmarks.setting import ORDER, Setting, overrides
from benchmarks.weigh import build_and_weigh, peak, peak_reserved


@dataclass
class Meter:
    """Sums wall-clock seconds and CPU seconds of this process over the measured calls."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Measure the block."""
        started = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started[0]
            self.cpu_seconds += time.process_time() - started[1]

    def wrap(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that calls `work` and measures it."""

        def measured(*arguments: Any, **options: Any) -> Any:
            with self.measure():
                return work(*arguments, **options)

        return measured

    def without(self, part: "Meter") -> "Meter":
        """Return a meter with the seconds of `part` subtracted."""
        return Meter(self.seconds - part.seconds, self.cpu_seconds - part.cpu_seconds)


@dataclass
class Measurements:
    """Measurements of one run.

    Attributes:
        rows: metrics rows of the steps.
        step_seconds: seconds of each step of TRL, from the end of the step before.
        memory: bytes of the reference's weights, and peaks (`Run.weighs_reference`).
    """

    training: Meter = field(default_factory=Meter)
    reference: Meter = field(default_factory=Meter)
    whole: Meter = field(default_factory=Meter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: Result = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)


def main() -> None:
    out, run = Path(sys.argv[1]), Run(**json.loads(sys.argv[2]))
    measured = (
        _train_with_trl(run, out) if run.variant.startswith(("trl", "guest")) else _train(run, out / "run")
    )
    meters = ("training", "reference", "whole")
    result = vars(measured) | {name: vars(getattr(measured, name)) for name in meters}
    result |= {"peak_bytes": peak(), "reserved_bytes": peak_reserved()}
    (out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


def _train(run: Run, run_dir: Path) -> Measurements:
    """Train with dpo_dist; loading counts neither as scoring nor as training."""
    from dpo_dist.config.load import load_run_config
    from dpo_dist.config.run_folder import RunFolder
    from dpo_dist.foundation.console import open_console

    folder = Path(run.folder)
    chosen = list(run.overrides)
    if not any(override.startswith("parallelism") for override in chosen):
        # TRL shards nothing in one process either.
        chosen.append(f"parallelism={'zero3' if int(os.environ.get('WORLD_SIZE', '1')) > 1 else 'ddp'}")
    config = load_run_config([*overrides(Setting.read(folder), folder, run_dir, Path(run.store)), *chosen])
    measured, filling, loading = Measurements(), Meter(), Meter()
    with open_console(RunFolder(run_dir).rank_log) as console, contextlib.ExitStack() as swaps:
        from dpo_dist.distributed.checkpoint.saver import CheckpointSaver
        from dpo_dist.foundation.signals import StopRequest
        from dpo_dist.reference.engine import load_reference
        from dpo_dist.reference.fill import StoreFiller
        from dpo_dist.tools.report.recorder import reporting
        from dpo_dist.training import reference as reference_setup
        from dpo_dist.training import run as run_module
        from dpo_dist.training.steps import loop
        from dpo_dist.training.steps.step import train_step

        swap = patch.object
        swaps.enter_context(swap(loop, "train_step", measured.training.wrap(train_step)))
        swaps.enter_context(swap(StoreFiller, "fill", filling.wrap(StoreFiller.fill)))
        swaps.enter_context(swap(reference_setup, "load_reference", loading.wrap(load_reference)))
        if run.weighs_reference:
            build = partial(build_and_weigh, reference_setup.prepare_reference, measured.memory)
            swaps.enter_context(swap(run_module, "prepare_reference", build))
        if not run.saves:
            swaps.enter_context(swap(CheckpointSaver, "save"))
            swaps.enter_context(swap(run_module, "export_checkpoint"))
        with measured.whole.measure():
            run_module.train(config, console, StopRequest(), reporting())
    if run.weighs_reference:
        measured.memory["peak while training"] = peak()
    metrics = run_dir / "dpo_metrics"
    measured.summary = json.loads((metrics / "summary.json").read_text())
    measured.rows = json.loads((metrics / "log_history.json").read_text())
    measured.training.seconds = measured.summary["train_seconds"]
    measured.reference = filling.without(loading)
    return measured


def _train_with_trl(run: Run, out: Path) -> Measurements:
    """Train with TRL on the same token ids in the same order."""
    from datasets import Dataset

    folder = Path(run.folder)
    is_best = run.variant.startswith("trl_best")
    best_micro_pairs = int(run.variant.rpartition("_")[2]) if is_best else None
    measured = Measurements()
    with measured.whole.measure():
        config = _trl_config(Setting.read(folder), out, best_micro_pairs)
        if run.variant == "guest_beta":
            config.beta = 0.3
        trainer = _trl_trainer(run, config, Dataset.from_dict(_columns(folder)), measured)
        trainer.train()
    return measured


def _columns(folder: Path) -> dict[str, Any]:
    pairs = json.loads((folder / ORDER).read_text())
    return {name: pairs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def _trl_trainer(run: Run, config: Any, dataset: Any, measured: Measurements) -> Any:
    """Return TRL's trainer, or our guest, which takes token ids and measures its phases."""
    import torch
    import trl
    from transformers import TrainerCallback

    from dpo_dist import trl as guest

    home: Any = guest if run.variant.startswith("guest") else trl

    class Trainer(home.DPOTrainer):
        """A trainer that measures its scoring."""

        reference_store = run.store

        def _prepare_dataset(self, dataset: Any, *_arguments: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            with measured.reference.measure():
                return super()._precompute_ref_logps(*arguments)

    class Steps(TrainerCallback):
        """Measures from the first step to the last, without preparations."""

        def on_train_begin(self, *_arguments: Any, **_options: Any) -> None:
            self.measured = measured.training.measure()
            self.measured.__enter__()
            self.last = time.perf_counter()

        def on_step_end(self, *_arguments: Any, **_options: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            measured.step_seconds.append(now - self.last)
            self.last = now

        def on_train_end(self, _arguments: Any, state: Any, *_others: Any, **_options: Any) -> None:
            self.measured.__exit__(None, None, None)
            measured.rows += [row for row in state.log_history if "loss" in row]

    model = str(Path(run.folder) / "model")
    return Trainer(model=model, args=config, train_dataset=dataset, callbacks=[Steps()])


def _trl_config(setting: Setting, out: Path, best_micro_pairs: int | None) -> Any:
    """Return TRL's defaults with the settings of this run; with `best_micro_pairs`, TRL's fastest options.

    The fastest options do not include `padding_free`, which this version of TRL ignores, and Liger's fused
    loss, which this version refuses.
    """
    import torch
    from trl.trainer.dpo_config import DPOConfig

    micro_pairs = best_micro_pairs or setting.trl_micro_pairs
    options: dict[str, Any] = {}
    if best_micro_pairs:
        options = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
        if setting.dtype == "bf16":
            options["model_init_kwargs"] = {"dtype": "bfloat16"}
            if importlib.util.find_spec("flash_attn"):
                options["model_init_kwargs"]["attn_implementation"] = "flash_attention_2"
    return DPOConfig(
        output_dir=str(out / "trl"),
        bf16=setting.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        max_length=setting.max_length,
        max_steps=setting.steps,
        per_device_train_batch_size=micro_pairs,
        gradient_accumulation_steps=setting.batch_pairs // micro_pairs,
        train_sampling_strategy="sequential",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=setting.seed,
        **options,
    )


if __name__ == "__main__":
    main()
