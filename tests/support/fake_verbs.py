"""Stand-ins for `pairs` and `train` that write their results in an instant, for tests of rounds.

As a launcher: `python fake_verbs.py -m dpo_dist.train --config-dir DIR +experiment=round`. Every call is
added to `calls.jsonl` in the working folder; a file `fail` there, with a verb, a round and an exit code or
`kill`, makes one call fail.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

EXIT_CODES = "DPO_DIST_EXIT_CODES"


def main() -> int:
    verb = sys.argv[2].rpartition(".")[2]
    folder = Path(sys.argv[4])
    config = yaml.safe_load((folder / "experiment" / "round.yaml").read_text())
    run_dir = Path(config["run"]["dir"])
    number = int(run_dir.name if verb == "pairs" else run_dir.parent.name)
    with Path("calls.jsonl").open("a") as calls:
        calls.write(json.dumps({"verb": verb, "round": number, "config": config}) + "\n")
    code = _failure(verb, number)
    code = code or (_pairs(run_dir, number) if verb == "pairs" else _train(run_dir))
    Path(f"{os.environ[EXIT_CODES]}.0").write_text(f"{code}\n")
    return min(code, 1)  # as accelerate does


def _failure(verb: str, number: int) -> int:
    file = Path("fail")
    if not file.exists():
        return 0
    failing, round_, how = file.read_text().split()
    if (failing, int(round_)) != (verb, number):
        return 0
    file.unlink()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(how)


def _pairs(run_dir: Path, number: int) -> int:
    """Four responses with scores whose mean is 0.25, 0.5, 0.75, 1.0 in rounds 1 to 4."""
    scores = [float(index < number) for index in range(4)]
    samples = [{"content": f"r{number}-{index}", "score": score} for index, score in enumerate(scores)]
    _write(run_dir / "pairs" / "samples.jsonl", {"prompt": "p", "responses": samples, "unused": []})
    if len(set(scores)) == 1:
        return 2
    pair = {"prompt": "p", "chosen": f"r{number}-0", "rejected": f"r{number}-3"}
    _write(run_dir / "pairs" / "pairs.jsonl", pair)
    return 0


def _train(run_dir: Path) -> int:
    (run_dir / "model").mkdir(parents=True, exist_ok=True)
    summary = {"steps": 5, "train_seconds": 1.5, "final": {"rewards/accuracies": 0.75}}
    _write(run_dir / "dpo_metrics" / "summary.json", summary | {"reference": {"computed": 2, "hits": 1}})
    return 0


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    sys.exit(main())
