"""The runs whose trajectories are recorded."""

from pathlib import Path

from tests.support.invented import write_pairs
from tests.support.tiny_model import write_model

GOLDEN = Path(__file__).resolve().parents[1] / "assets" / "golden_trajectories.json"

SCENARIOS = {
    "sigmoid": ["loss.label_smoothing=0.1"],
    "ipo": ["loss.kind=ipo"],
    "simpo": ["loss.kind=simpo", "loss.beta=2.0", "reference.mode=none"],
    "sigmoid_and_sft": ["loss.terms=[{kind: sigmoid, weight: 1.0}, {kind: sft, weight: 0.2}]"],
}


def write_scenario(folder: Path) -> Path:
    """Write policy, reference and datasets of odd sizes to `folder`."""
    write_model(folder / "policy", seed=1)
    write_model(folder / "reference", seed=2)
    write_pairs(folder / "train.jsonl", 47, seed=3)
    write_pairs(folder / "eval.jsonl", 5, seed=4)
    return folder


def overrides(folder: Path, name: str) -> list[str]:
    """Return the command line of a scenario without `run.dir`."""
    reference = [] if "reference.mode=none" in SCENARIOS[name] else [f"reference.path={folder}/reference"]
    return [
        f"model.path={folder}/policy",
        "model.dtype=fp32",
        f"data.train=[{folder}/train.jsonl]",
        f"data.eval=[{folder}/eval.jsonl]",
        f"data.cache={folder}/encoded",
        "data.text_as_messages=false",
        f"reference.store={folder}/store",
        "optim.lr=2e-4",
        "trainer.global_batch_pairs=9",
        "trainer.max_steps=6",
        "trainer.eval_every=3",
        "tracking=off",
        "sampling.prompts=0",
        *reference,
        *SCENARIOS[name],
    ]
