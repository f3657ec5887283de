"""IFEval as a judge: lm-eval's rules, asked for the prompts of the benchmark's file."""

import json
from pathlib import Path

import pytest

from dpo_dist.data.records import Message, Origin, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.sampling.judges import FunctionJudge, Question

pytest.importorskip("lm_eval.tasks.ifeval.utils")

ROWS = [
    # As Google's file and as the hub's, which names the options of all rules.
    {"prompt": "No commas, three times the word cat.", "kwargs": [{}, {"keyword": "cat", "frequency": 3}]},
    {"prompt": "Answer in lower case. ", "kwargs": [{"keyword": None, "frequency": None}]},
]
RULES = [["punctuation:no_comma", "keywords:frequency"], ["change_case:english_lowercase"]]


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FunctionJudge:
    rows = [
        {"key": key, "instruction_id_list": rules, **row}
        for key, (rules, row) in enumerate(zip(RULES, ROWS, strict=True))
    ]
    rows[0]["kwargs"][1]["relation"] = "at least"
    file = tmp_path / "ifeval.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("IFEVAL_DATA", str(file))
    return FunctionJudge("examples.ifeval:score")


def scores(judge: FunctionJudge, prompt: str | tuple[Message, ...], *responses: str) -> list[float | None]:
    record = PreferenceRecord(prompt, (), Origin("ifeval.jsonl", 1))
    return judge.judge([Question(record, responses)])[0].scores


def test_a_response_scores_only_if_it_follows_all_instructions(judge: FunctionJudge) -> None:
    responses = ("cat cat cat", "cat, cat, cat", "cat", "a dog")
    assert scores(judge, ROWS[0]["prompt"], *responses) == [1, 0, 0, 0]
    chat = (Message("system", "Be kind."), Message("user", "Answer in lower case."))
    assert scores(judge, chat, "yes, of course i answer in english", "YES I DO") == [1, 0]


def test_other_prompts_have_no_score(judge: FunctionJudge) -> None:
    assert scores(judge, "Hello?", "hi", "good day") == [None, None]


def test_a_missing_file_is_said(judge: FunctionJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IFEVAL_DATA", "no such file")
    with pytest.raises(ConfigError, match="gives no usable scores") as missing:
        scores(judge, "Hello?", "hi")
    assert "FileNotFoundError" in str(missing.value.got)
