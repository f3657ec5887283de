"""Sources as people write them: what a verb reads, what it says of it, and what it refuses."""

import json
from pathlib import Path

from tests.e2e.conftest import Overrides
from tests.support.launch import run_verb, summary

IN_ORDER = "everything that needs no weights and no GPU is in order"


def test_a_check_refuses_what_training_refuses(overrides: Overrides, tmp_path: Path) -> None:
    """Also by the first records of more; it says how many it has looked at."""
    pair = {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."}
    file = tmp_path / "pairs.jsonl"
    for times, share in ((5, "5 of 50 records"), (200, "102 of the first 1024 records")):
        file.write_text(("".join(json.dumps(pair) + "\n" for _ in range(9)) + "{}\n") * times)
        checked = run_verb("train", ["--check", *overrides(f"data.train=[{file}]")])
        assert (checked.code, IN_ORDER in checked.output) == (2, False), checked.output
        assert share in checked.output, checked.output
        assert ("of the first 1024 records" in checked.output) is (times == 200)
    accepted = run_verb("train", ["--check", *overrides(f"data.train=[{file}]", "data.max_bad_share=0.1")])
    assert (accepted.code, IN_ORDER in accepted.output) == (0, True), accepted.output
    assert "922 of the first 1024 records kept (the others were not looked at)" in accepted.output
    assert "text, without the chat template" in accepted.output


def test_a_run_says_how_each_source_was_read(overrides: Overrides, tmp_path: Path) -> None:
    """A prompt that ends as a dialogue becomes turns here, and stays text in TRL."""
    sides = {"chosen": " Hello!", "rejected": " No."}
    prompts = {
        "hh (Human/Assistant turns), by the chat template": "\n\nHuman: Say hello.\n\nAssistant:",
        "text, without the chat template": "Say hello.",
        "messages, by the chat template": [{"role": "user", "content": "Say hello."}],
    }
    files = [tmp_path / f"{name}.jsonl" for name in ("hh", "text", "turns")]
    for file, prompt in zip(files, prompts.values(), strict=True):
        file.write_text((json.dumps({"prompt": prompt, **sides}) + "\n") * 6)
    trained = run_verb("train", overrides(f"data.train=[{','.join(map(str, files))}]", "trainer.max_steps=1"))
    assert trained.code == 0, trained.output
    for file, words in zip(files, prompts, strict=True):
        assert f"{file}): 6 of 6 records kept: {words}" in trained.output, trained.output
    found = summary(tmp_path / "run")["data"]
    assert [source["read_as"] for source in found["train"]["sources"]] == [{words: 6} for words in prompts]
