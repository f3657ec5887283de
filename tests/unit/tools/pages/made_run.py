"""A run directory with every file that the page reads, and the text of a page."""

import html
import json
import re
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.training.reporting.metrics_log import MetricsLog, final_and_best
from tests.support.sample_files import sample, write_samples

HOSTILE = (
    "</style></text></svg></details></script><script>alert(1)</script><img src=x onerror=alert(2)>"
    '\u202e\u200b\x07\x1b[2J"><a href="javascript:alert(3)">x</a><!-- <b onclick=\'x\'>'
)


def text_of(page: Path) -> str:
    """The visible text of a page, with single spaces; elements of the text would be missing in it."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def row(step: int, source: str) -> dict[str, float]:
    return {
        **{"step": step, "loss": 0.7 - step / 100, "pairs": 64, "step_seconds": 1.0},
        **{"rewards/accuracies": 0.5 + step / 100, "rewards/margins": step / 20},
        **{f"rewards/accuracies/{source}": 0.75, f"rewards/margins/{source}": 1.25},
        **{"logps/chosen_per_token": -1.0 - step / 100, "logps/rejected_per_token": -1.1 - step / 50},
    }


def evaluation(step: int, source: str) -> dict[str, float]:
    return {
        **{"step": step, "eval_loss": 0.71 - step / 100, "eval_step_seconds": 2.0},
        **{"eval_rewards/accuracies": 0.625, "eval_rewards/margins": 0.5, "eval_rewards/both_fall": 0.6},
        **{f"eval_rewards/accuracies/{source}": 0.55, "eval_logps/chosen": -50.0 - step},
    }


def summary(label: str) -> dict[str, Any]:
    source = {"label": label, "path": label, "read": 2000, "kept": 1920, "pairs": 1920}
    source |= {"dropped": {}}
    train = source | {"dropped": {"identical_responses": 80}, "response_truncated": 17, "duplicates": 0}
    train |= {"examples": [f"{label}:3"], "sources": [source]}
    held_out = {"read": 100, "kept": 100, "pairs": 100, "dropped": {}, "left_in_train": 300, "sources": []}
    drift = {"responses": 32, "mean_token_drift": 2e-9, "largest_token_drift": 3e-6}
    drift |= {"rms_response_drift": 0.05, "largest_response_drift": 0.2}
    finding = {"rule": "does_not_generalise", "text": f"{label} fell", "remedy": "a lower `optim.lr`"}
    return {
        **{"steps": 30, "pairs_seen": 1920, "train_seconds": 4210.4, "pairs_per_second": 0.5},
        **{"peak_memory_bytes": 3 * 2**30, "world_size": 2, "settings": {"loss.beta": 0.1}},
        "reference": {"mode": "cached", "hits": 3000, "computed": 840, "seconds": 84.0, "drift": drift},
        "data": {"train": train, "eval": held_out},
        "exit": "completed",
        "verdict": {"sentence": f"does not generalise: {label}", "findings": [finding]},
    }


def evaluated(source: str) -> dict[str, Any]:
    whole = {"eval_rewards/accuracies": [0.55, 0.7], "eval_rewards/margins": [0.4, 0.6]}
    values = {name: value for name, value in evaluation(30, source).items() if name.startswith("eval_")}
    of_source = {"eval_rewards/accuracies": [0.45, 0.65]}
    return {
        "all": {**values, "eval_pairs": 100, "intervals": whole},
        source: {"eval_pairs": 40, "eval_rewards/accuracies": 0.55, "intervals": of_source},
    }


def write_rows(run: RunFolder, rows: list[dict[str, Any]]) -> None:
    run.log_history.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def made_run(folder: Path, text: str = "plain", source: str = "math") -> RunFolder:
    """A run of 30 steps whose texts and labels of users are `text`."""
    run = RunFolder(folder / "qwen-sigmoid-3fa9c1d2")
    history = MetricsLog.open(run, None)
    for step in range(1, 31):
        history.append(row(step, source))
        history.append(evaluation(step, source))
    history.close({**final_and_best(history.rows), **summary(text)})
    config = {
        "model": {"path": text, "revision": None, "dtype": "bf16", "adapter": None},
        "data": {"train": [{"path": text, "weight": 2.0, "split": None}, "b & c"]},
        "loss": {"kind": "sigmoid", "beta": 0.1, "terms": []},
        "reference": {"store": text},
        "optim": {"lr": 1e-6},
        "trainer": {"global_batch_pairs": 64},
    }
    run.config.write_text(yaml.safe_dump(config))
    environment = {"packages": {"torch": "2.13.0"}, "git_commit": "abc123", "git_changed_files": 2}
    environment |= {"gpus": [text, text], "command": f"python -m dpo_dist.train {text}"}
    run.environment.write_text(json.dumps(environment))
    run.state.write_text(json.dumps({"identity": {"run_digest": "3fa9c1d2", "eval_data": None}}))
    run.last_evaluation.path.mkdir(parents=True)
    run.last_evaluation.results.write_text(json.dumps(evaluated(source)))
    finding = {"rule": "label_leak", "level": "error", "text": text, "source": text, "remedy": text}
    DoctorFolder(run.path).doctor_report.parent.mkdir()
    DoctorFolder(run.path).doctor_report.write_text(
        json.dumps({"findings": [{**finding, "examples": [f"{text}:4"]}]})
    )
    write_samples(
        run.path, 30, [sample(1, text, prompt=text, source=text, chosen=text, reference=f"{text} before")]
    )
    return run


def change(file: Path, *keys: str, value: Any) -> None:
    """Set a key of a file of JSON or YAML."""
    is_json = "json" in file.suffix
    content = json.loads(file.read_text()) if is_json else yaml.safe_load(file.read_text())
    place = content
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    file.write_text(json.dumps(content) if is_json else yaml.safe_dump(content))
