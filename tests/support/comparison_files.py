"""Files of a comparison as `dpo-dist compare` writes them."""

import json
from pathlib import Path
from typing import Any


def model(name: str, score: float | None = None, **others: Any) -> dict[str, Any]:
    """A model of `comparison.json`; the interval is 0.03 on both sides of the score."""
    interval = None if score is None else [score - 0.03, score + 0.03]
    shares = {"tokens": 100.0, "finished": 1.0, "empty": 0.0, "prompts_also_in_train": None}
    named = {"name": name, "path": f"output/{name}/model", "score": score, "score_interval": interval}
    return {**named, **shares, **others}


def results(models: list[dict[str, Any]], rate: float | None, **others: Any) -> dict[str, Any]:
    """The content of `comparison.json`; the interval is 0.06 on both sides of the rate."""
    interval = None if rate is None else [rate - 0.06, rate + 0.06]
    verdicts = {"wins": 60, "ties": 10, "losses": 30, "not_judged": 0}
    judge = None if rate is None else "reward model helpfulness"
    sampling = {"max_new_tokens": 256, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    found = {"models": models, "rate": rate, "interval": interval, **verdicts, "sampling": sampling}
    return {"prompts": 100, "judge": judge, "counts": {}, **found, **others}


def answer(text: str, score: float | None = None, finished: bool = True) -> dict[str, Any]:
    return {"text": text, "tokens": len(text.split()), "finished": finished, "score": score}


def row(number: int, responses: dict[str, dict[str, Any]], **others: Any) -> dict[str, Any]:
    told = {"prompt_id": f"{number:016x}", "prompt": f"Question {number}?", "source": "qa", "credit": None}
    return {**told, "chosen": f"The chosen response {number}.", "responses": responses, **others}


def write_comparison(run: Path, content: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write both files of a run directory; return the path of the page that is made of them."""
    folder = run / "comparison"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(content))
    (folder / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder / "comparison.html"
