"""The example for AlpacaEval: it writes the answers of a comparison in the format of AlpacaEval."""

import json
import shlex
from pathlib import Path

import pytest

from examples import alpaca_eval
from tests.support import comparison_files as files


def test_each_model_gets_a_file_with_its_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [('say "hé"\nplease', "5"), ("7", "a\u2028b")]
    rows = [
        files.row(number, {"base": files.answer(first), "a/step-000010": files.answer(second)})
        for number, (first, second) in enumerate(texts)
    ]
    files.write_comparison(tmp_path, {}, rows)
    alpaca_eval.main(tmp_path)
    command = shlex.split(capsys.readouterr().out)
    assert command[:2] == ["alpaca_eval", "evaluate"]
    for option, model, side in (("--reference_outputs", "base", 0), ("--model_outputs", "a/step-000010", 1)):
        file = Path(command[command.index(option) + 1])
        assert json.loads(file.read_text(encoding="utf-8")) == [
            {"instruction": f"Question {number}?", "output": pair[side], "generator": model}
            for number, pair in enumerate(texts)
        ]
