"""Data without the trainer: blocks of docs/python.md run beside files of TRL and of LLaMA-Factory."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.pages import blocks_of
from tests.support.records import assistant, jsonl, user

TRL = {"prompt": [user("capital?")], "chosen": [assistant("Bern.")], "rejected": [assistant("Rome.")]}
SAME = {"prompt": [user("same?")], "chosen": [assistant("yes")], "rejected": [assistant("yes")]}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "river?"}],
    "chosen": {"from": "gpt", "value": "Aare."},
    "rejected": {"from": "gpt", "value": "Rhine."},
}
COLUMNS = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
ENTRY = {"file_name": "demo.json", "ranking": True, "formatting": "sharegpt", "columns": COLUMNS}


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.with_template(tiny.qwen(), tiny.CHATML)
    tokenizer.save_pretrained("model")
    Path(jsonl(tmp_path, TRL, TRL, SAME)).rename("trl.jsonl")
    folder = Path("llama_factory")
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps({"dpo_demo": ENTRY}))
    (folder / "demo.json").write_text(json.dumps([SHAREGPT]))
    names: dict[str, Any] = {}
    for block in blocks_of("docs/python.md", "Data for another trainer"):
        assert block.language == "python"
        exec(block.text, names)
    opening = blocks_of("docs/python.md", "Data for another trainer")[0].text
    assert len(list(filter(None, opening.splitlines()))) <= 5, "imports, a tokenizer, and one line"
    *_, counted = shown = capsys.readouterr().out.splitlines()
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n -> {}<|im_end|>"
    trl, llama_factory = asked.format("capital?", "Bern."), asked.format("river?", "Aare.")
    assert "\n".join(shown[:-1]) == "\n".join([trl, trl, "trl.jsonl:3 identical_responses", llama_factory])
    assert counted == "2 of 3 kept; {'identical_responses': 1}"
