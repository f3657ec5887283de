"""Responses side by side; which samples of a run its page shows."""

import json
from pathlib import Path

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.tools.pages.answers import answer_blocks
from dpo_dist.tools.pages.blocks import Answers, Text
from dpo_dist.tools.pages.samples import samples_section, worst_pairs
from tests.support.sample_files import GOOD, sample, write_samples


def test_ten_prompts_are_shown_in_their_order(tmp_path: Path) -> None:
    write_samples(tmp_path, 7, [sample(number) for number in range(30)])
    titles = [answers.title for answers in answers_of(tmp_path)]
    assert titles == [f"Question {number}?" for number in range(10)]


def answers_of(folder: Path) -> list[Answers]:
    return [block for block in samples_section(RunFolder(folder)) if isinstance(block, Answers)]


def test_responses_of_the_last_the_previous_and_the_first_step(tmp_path: Path) -> None:
    for step, word in ((0, "three"), (100, "one"), (200, "four"), (300, "five"), (1000300, "six")):
        write_samples(tmp_path, step, [sample(1, GOOD.replace("two", word))])
    [answers] = answers_of(tmp_path)
    # The response of step 0 is the reference's.
    names = [name for name, _, _ in answers.responses]
    assert names == ["reference", "step 1,000,300", "step 300", "chosen"]
    texts = ["".join(text for text, _ in pieces) for _, _, pieces in answers.responses]
    assert ["six" in texts[1], "five" in texts[2]] == [True, True]
    assert (answers.title, answers.notes) == ("Question 1?", "qa")
    texts = [block.text for block in samples_section(RunFolder(tmp_path)) if isinstance(block, Text)]
    sentence = "Responses of the policy after step 1,000,300 to 1 held-out prompt; all are in samples/"
    assert texts[0] == f"{sentence}step-1000300.jsonl."
    assert samples_section(RunFolder(tmp_path / "none")) == []


def test_a_last_response_that_equals_the_reference_is_shown(tmp_path: Path) -> None:
    for step in (0, 100):
        write_samples(tmp_path, step, [sample(1, reference=GOOD)])
    [answers] = answers_of(tmp_path)
    assert [name for name, _, _ in answers.responses] == ["reference", "step 100", "chosen"]
    assert answers.responses[1][1].endswith("the same text as reference")


def test_a_labelled_response_is_shown_with_its_reward(tmp_path: Path) -> None:
    row = {"origin": "a.jsonl:1", "prompt": "why"}
    good, bad = {"good": {"text": "so"}}, {"bad": {"text": "so"}}
    rows = [row | {"reward": -0.5, "responses": good}, row | {"reward": 0.5, "responses": bad}]
    file = tmp_path / "worst.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    first, last = worst_pairs(file)
    assert isinstance(first, Answers)
    assert isinstance(last, Answers)
    assert (first.notes, last.notes) == ("a.jsonl:1: reward -0.5", "a.jsonl:1: reward 0.5")
    assert first.responses[0][0] == "good"


def test_texts_and_prompts_are_shown_while_there_is_room() -> None:
    rows = [sample(number, prompt="q" * 7000) for number in range(10)]
    rows[1]["responses"]["reference"]["text"] = "\u202e" * 200_000
    blocks = answer_blocks([(row, "label") for row in rows], 240_000)
    *shown, last = blocks
    assert [isinstance(block, Answers) for block in shown] == [True] * len(shown)
    assert isinstance(last, Text)
    assert last.text == f"{10 - len(shown)} more prompts would make this page too large."
    assert 2 < len(shown) < 10
    first, second, *_ = shown
    assert isinstance(first, Answers)
    assert isinstance(second, Answers)
    assert first.prompt == [("q" * 6000, "")]
    assert "first 6,000 of 200,000 characters" in dict(each[:2] for each in second.responses)["reference"]
