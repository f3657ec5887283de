"""A spoiled run ends with a verdict that names its faults, on the screen and in summary.json."""

from pathlib import Path

from tests.e2e.conftest import Overrides
from tests.support.launch import summary, train


def test_the_verdict_names_the_faults_of_a_run(overrides: Overrides, assets: Path, tmp_path: Path) -> None:
    """Evaluation data are the training data, and all responses are cut."""
    leaked = f"data.eval=[{assets}/train.jsonl]"
    cut = ("data.max_length=40", "data.max_prompt_length=30", "data.truncation=keep_start")
    screen = train(overrides(leaked, *cut, "data.max_bad_share=1")).output
    judged = summary(tmp_path / "run")["verdict"]
    texts = {finding["rule"]: finding["text"] for finding in judged["findings"]}
    assert "(100 %) have a prompt that is also in the training data" in texts["evaluation_leak"]
    assert "have a response whose end data.max_length cuts" in texts["responses_cut"]
    assert judged["sentence"].startswith("evaluation data leaked into training: ")
    lines = screen[screen.index("verdict: ") :].splitlines()
    assert lines[0] == f"verdict: {judged['sentence']}"
    first, *others = texts.values()
    assert lines[1] == f"  try: {first.partition('. Try: ')[2]}"
    assert lines[2 : len(texts) + 1] == [f"  - {text}" for text in others]
