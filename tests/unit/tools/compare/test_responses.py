"""Held-out prompts are chosen by content; responses of other settings are not used again."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.data.records import turns_of
from dpo_dist.foundation.errors import DataError
from dpo_dist.tools.compare.models import USUAL_PROMPTS, held_out
from dpo_dist.tools.sampling.prompts import generation_settings
from dpo_dist.tools.sampling.settings import Sampling
from tests.support.records import assistant, jsonl, user


def test_responses_of_other_settings_are_not_used_again(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("one")
    keys = [
        *("model.dtype=fp32", "data.max_length=99", "data.max_prompt_length=9"),
        *("data.template_arguments={a: 1}", f"data.chat_template={template}"),
    ]

    def settings(*overrides: str) -> dict[str, Any]:
        lines = ["compare.models=[a,b]", "data.eval=[held.jsonl]", *overrides]
        config = load_run_config(lines, verb="compare")
        return generation_settings(config.data, config.model, Sampling(9))

    found = [settings(), *(settings(key) for key in keys)]
    template.write_text("two")
    found.append(settings(keys[-1]))
    assert len({str(each) for each in found}) == len(found)
    assert settings("sampling.prompts=9") == found[0]


RECORDS = [
    {"prompt": [user(f"question {n % 30}")], "chosen": [assistant(f"good {n}")], "rejected": [assistant("x")]}
    for n in range(40)
]


def chosen(tmp_path: Path, records: list[Any], *overrides: str) -> tuple[list[str], list[str]]:
    source = jsonl(tmp_path, *records)
    base = ["model.path=x", "data.train=[x.jsonl]"]
    if not any(override.startswith("data.") for override in overrides):
        overrides = (*overrides, f"data.eval=[{{path: {source}, label: held}}]")
    said: list[str] = []
    config = load_run_config([*base, *overrides])
    records, labels = held_out(config.data, config.sampling.prompts or USUAL_PROMPTS, said.append)
    assert {labels[record.prompt_key()] for record in records} <= {"held", "records"}
    first = [turns_of(record.responses[0])[-1].content for record in records]
    return [turns_of(record.prompt)[0].content for record in records], [*said, *first]


def test_some_prompts_are_chosen_by_hash_and_kept_in_order(tmp_path: Path) -> None:
    few, said = chosen(tmp_path, RECORDS, "sampling.prompts=7")
    assert len(few) == 7 == len(set(few))
    assert few == sorted(few, key=lambda text: int(text.split()[1]))
    assert "prompts: 7 of 30 different ones" in said
    assert said[-7:] == [f"good {text.split()[1]}" for text in few]
    backwards, _ = chosen(tmp_path, RECORDS[::-1], "sampling.prompts=7")
    assert set(backwards) == set(few)
    more, _ = chosen(tmp_path, RECORDS, "sampling.prompts=8")
    assert set(few) < set(more)
    every, said = chosen(tmp_path, [*RECORDS, {"no": "prompt"}])
    assert len(every) == 30
    assert said[0].endswith("40 of 41 records kept")
    assert said[1].startswith("  1 dropped (unknown_format): ")
    assert said[2] == "prompts: 30 of 30 different ones, fewer than sampling.prompts=128"


def test_a_reserved_share_of_the_training_data_is_held_out(tmp_path: Path) -> None:
    source = jsonl(tmp_path, *RECORDS)
    found, _ = chosen(tmp_path, RECORDS, f"data.train=[{source}]", "data.eval_share=0.3")
    assert 0 < len(found) < 20
    with pytest.raises(DataError, match="no usable prompt"):
        chosen(tmp_path, RECORDS, f"data.train=[{source}]", "data.eval_share=1e-9")
