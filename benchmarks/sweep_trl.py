"""TRL's half of a sweep, all points in one process: `python -m benchmarks sweep_trl FOLDER VARIANT OUT`.

FOLDER is what `benchmarks.assets.prepare` wrote, with the points in `sweep.json`. OUT gets what was measured.

    trl_default   the reference beside the policy
    trl_kept      its values computed before training and kept beside the data set, as TRL does if that lies
                  on disk: found again as long as neither a pair of it nor anything about their tokens changes
"""

import json
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.assets import ORDER, Setting
from benchmarks.variant import Meter, trl_config

SWEEP = "sweep.json"


@dataclass
class Work:
    """What all points together took. `losses`: of each point's steps."""

    reference: Meter = field(default_factory=Meter)
    training: Meter = field(default_factory=Meter)
    scored_pairs: int = 0
    losses: list[list[float]] = field(default_factory=list)


def main() -> None:
    folder, variant, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    setting = Setting.read(folder)
    dataset = _dataset_on_disk(folder)
    started = time.monotonic()
    work = Work()
    for kind, beta in json.loads((folder / SWEEP).read_text()):
        config = trl_config(
            setting,
            folder / "trl",
            None,
            beta=beta,
            loss_type=[kind],
            precompute_ref_log_probs=variant == "trl_kept",
        )
        _train(folder, dataset, config, work)
    result = {
        "scored_pairs": work.scored_pairs,
        "reference_seconds": work.reference.seconds,
        "training_seconds": work.training.seconds - work.reference.seconds * (variant == "trl_default"),
        "points_seconds": time.monotonic() - started,
        "losses": work.losses,
    }
    out.write_text(json.dumps(result))


def _dataset_on_disk(folder: Path) -> Any:
    from datasets import Dataset, load_from_disk

    saved = folder / "trl_pairs"
    if not saved.is_dir():
        pairs = json.loads((folder / ORDER).read_text())
        columns = {name: pairs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        Dataset.from_dict(columns).save_to_disk(saved)
    return load_from_disk(saved)


def _train(folder: Path, dataset: Any, config: Any, work: Work) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    class Trainer(DPOTrainer):
        """Without a second tokenisation, and with what the reference scores before training counted."""

        def _prepare_dataset(self, dataset: Any, *_arguments: Any) -> Any:
            return dataset

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            return _counted(work, super().compute_ref_log_probs, model, inputs)

    trainer = Trainer(model=str(folder / "model"), args=config, train_dataset=dataset)
    if trainer.ref_model is not None:
        trainer.ref_model.forward = partial(_counted, work, trainer.ref_model.forward)
    with work.training.running():
        trainer.train()
    work.losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])


def _counted(work: Work, score: Any, *arguments: Any, **inputs: Any) -> Any:
    """`score`, measured. Its batch holds all chosen responses and then all rejected ones."""
    work.scored_pairs += len((inputs or arguments[-1])["input_ids"]) // 2
    with work.reference.running():
        return score(*arguments, **inputs)


if __name__ == "__main__":
    main()
