"""One trainer, once, in a process of its own: `python -m benchmarks variant FOLDER VARIANT STORE OUT`.

FOLDER is what `benchmarks.assets.prepare` wrote. OUT/rank-N.json gets what was measured, the losses among it.
Variants: `trl_default`, `trl_best_N` (N pairs a micro-batch), `dpo_dist` (with the reference values that
STORE holds already), and `without_...`: dpo_dist less a part of it (`benchmarks.ablation.ABLATIONS`).
"""

import contextlib
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.assets import ORDER, Setting, overrides

CURVES = ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "grad_norm")


@dataclass
class Meter:
    """Seconds by the clock and of all threads of this process, summed over the calls it has wrapped."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Measure what happens within."""
        started = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started[0]
            self.cpu_seconds += time.process_time() - started[1]

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, measured."""

        def measured(*arguments: Any, **options: Any) -> Any:
            with self.running():
                return work(*arguments, **options)

        return measured

    def without(self, part: "Meter") -> "Meter":
        """This less a part of it."""
        return Meter(self.seconds - part.seconds, self.cpu_seconds - part.cpu_seconds)


@dataclass(frozen=True)
class Measured:
    """Of one run: training steps only, scoring by the reference only, and both with loading and saving.

    `rows` are the logged metrics of each step, `work` what our training computed (`ablation.Work`).
    """

    training: Meter
    reference: Meter
    whole: Meter
    rows: list[dict[str, float]]
    work: dict[str, int]


def main() -> None:
    folder, variant, store, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    setting = Setting.read(folder)
    out.mkdir(parents=True, exist_ok=True)
    if variant.startswith("trl"):
        best_micro_pairs = int(variant.rpartition("_")[2]) if variant.startswith("trl_best") else None
        measured = run_trl(setting, folder, out, best_micro_pairs)
    else:
        measured = run_dpo_dist(setting, folder, store, out / "run", variant)
    result = {
        "training": vars(measured.training),
        "reference": vars(measured.reference),
        "whole": vars(measured.whole),
        "peak_bytes": _peak_bytes(),
        "work": measured.work,
        "curves": {name: [row[name] for row in measured.rows] for name in CURVES},
    }
    (out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


def run_dpo_dist(setting: Setting, folder: Path, store: Path, run_dir: Path, variant: str) -> Measured:
    """The whole program; what is loaded between reference and training is not part of either.

    One process shards nothing, as TRL's does not.
    """
    from benchmarks.ablation import ABLATIONS, removed
    from dpo_dist.config.load import load_run_config
    from dpo_dist.config.run_folder import RunFolder
    from dpo_dist.report.console import open_console

    ablation = ABLATIONS[variant]
    parallelism = "zero3" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "ddp"
    wanted = [*overrides(setting, folder, run_dir, store), f"parallelism={parallelism}"]
    config = load_run_config([*wanted, *ablation.overrides])
    training, filling, loading, whole = Meter(), Meter(), Meter(), Meter()
    with open_console(RunFolder(run_dir)) as console:
        from dpo_dist.reference.engine import load_digested
        from dpo_dist.reference.fill import StoreFiller
        from dpo_dist.training import loop, reference_setup
        from dpo_dist.training import run as run_module
        from dpo_dist.training.step import train_step

        with (
            patch.object(loop, "train_step", training.around(train_step)),
            patch.object(StoreFiller, "fill", filling.around(StoreFiller.fill)),
            patch.object(reference_setup, "load_digested", loading.around(load_digested)),
            removed(ablation) as work,
            whole.running(),
        ):
            run_module.train(config, console)
    metrics = run_dir / "dpo_metrics"
    training.seconds = json.loads((metrics / "summary.json").read_text())["train_seconds"]
    rows = json.loads((metrics / "log_history.json").read_text())
    return Measured(training, filling.without(loading), whole, rows, vars(work))


def run_trl(setting: Setting, folder: Path, out: Path, best_micro_pairs: int | None) -> Measured:
    """TRL's trainer on our token ids in our order; at its best if that is given a micro-batch."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.dpo_trainer import DPOTrainer

    training, reference, whole = Meter(), Meter(), Meter()

    class Trainer(DPOTrainer):
        """With the reference's scoring measured, and without a second tokenisation."""

        def _prepare_dataset(self, dataset: Any, *_arguments: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            with reference.running():
                return super()._precompute_ref_logps(*arguments)

    class Steps(TrainerCallback):
        """Measures from the first step to the last, without what is prepared before."""

        def on_train_begin(self, *_arguments: Any, **_options: Any) -> None:
            self.measured = training.running()
            self.measured.__enter__()

        def on_train_end(self, *_arguments: Any, **_options: Any) -> None:
            self.measured.__exit__(None, None, None)

    pairs = json.loads((folder / ORDER).read_text())
    columns = {name: pairs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    with whole.running():
        trainer = Trainer(
            model=str(folder / "model"),
            args=trl_config(setting, out, best_micro_pairs),
            train_dataset=Dataset.from_dict(columns),
            callbacks=[Steps()],
        )
        trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return Measured(training, reference, whole, rows, {})


def trl_config(setting: Setting, out: Path, best_micro_pairs: int | None, **changed: Any) -> Any:
    """TRL's defaults but for what makes the runs the same run; at its best, with all that makes it faster.

    `padding_free` is switched off in this version whatever it is set to, and Liger's fused loss is refused.
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
        **{**options, **changed},
    )


def _peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
