"""The answers of a comparison as files for AlpacaEval: `python examples/alpaca_eval.py RUN_FOLDER`.

Writes a file for each model to `comparison/alpaca_eval`, and prints the commands that read them. The first
model is the reference.
"""

import json
import shlex
import sys
from pathlib import Path


def main(run: Path) -> None:
    """Write the files, and print the commands."""
    answers: dict[str, list[dict[str, str]]] = {}
    for line in (run / "comparison/answers.jsonl").read_bytes().splitlines():
        row = json.loads(line)
        for model, response in row["responses"].items():
            answer = {"instruction": row["prompt"], "output": response["text"], "generator": model}
            answers.setdefault(model, []).append(answer)
    files = []
    for model, rows in answers.items():
        file = run / "comparison/alpaca_eval" / f"{model}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows), encoding="utf-8")
        files.append(str(file))
    reference, *others = files
    for other in others:
        words = ["alpaca_eval", "evaluate", "--reference_outputs", reference, "--model_outputs", other]
        print(shlex.join(words))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
