"""Files of a comparison as `dpo-dist compare` writes them."""

import json
from pathlib import Path
from typing import Any

STYLE = {"length": 100.0, "finished": 1.0, "refusals": 0.02, "empty": 0.0}


def model(name: str, kl: float | None = None, score: float | None = None, **style: float) -> dict[str, Any]:
    """A model of `comparison.json`; intervals are 10 % of the KL, 0.03 of the score, 5 % of the style."""
    own = STYLE | style
    return {
        **{"name": name, "path": f"output/{name}/model", "kl": kl, "score": score},
        "kl_interval": None if kl is None else [0.9 * kl, 1.1 * kl],
        "score_interval": None if score is None else [score - 0.03, score + 0.03],
        "style": own,
        "style_intervals": {metric: [0.95 * value, 1.05 * value] for metric, value in own.items()},
    }


def win(first: str, second: str, rate: float) -> dict[str, Any]:
    """The win rate of `first` over `second`, with an interval of 0.06 on both sides."""
    interval = [rate - 0.06, rate + 0.06]
    return {"first": first, "second": second, "ties": 0, "rate": rate, "interval": interval}


def results(models: list[dict[str, Any]], wins: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    """The content of `comparison.json`; the first model is the base."""
    judge = "reward model helpfulness" if wins else None
    told = {"base": models[0]["name"], "prompts": 100, "judge": judge, "judge_compares": False}
    found = {
        "models": models,
        "wins": wins,
        "differences": [],
        "counts": {},
        "sampling": {"max_new_tokens": 256, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
    }
    return {**told, **found, **others}


def answer(text: str, score: float | None = None, finished: bool = True) -> dict[str, Any]:
    told = {"text": text, "tokens": len(text.split()), "finished": finished, "score": score}
    return {**told, "logp": -20.0, "base_logp": -25.0}


def row(number: int, responses: dict[str, dict[str, Any]], **others: Any) -> dict[str, Any]:
    told = {"prompt_id": f"{number:016x}", "prompt": f"Question {number}?", "source": "qa"}
    return {**told, "chosen": f"The chosen response {number}.", "responses": responses, **others}


def write_comparison(run: Path, content: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write both files of a run directory; return the path of the page that is made of them."""
    folder = run / "comparison"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(content))
    (folder / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder / "comparison.html"
