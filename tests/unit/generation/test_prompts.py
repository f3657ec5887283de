"""The file of prompts: parts of them, by their contents."""

import os
from pathlib import Path

from dpo_dist.config.load import load_run_config
from dpo_dist.generation.pairs.prompts import open_prompts, write_prompts
from tests.support.records import jsonl


def lines(folder: Path, source: Path, part: tuple[int, int], limit: int | None = None) -> list[str]:
    keys = {"prompt_part": part[0], "prompt_parts": part[1], "limit": limit or "null"}
    overrides = [f"pairs.{key}={value}" for key, value in keys.items()]
    config = load_run_config(["model.path=m", f"data.train=[{source}]", *overrides])
    return write_prompts(folder, config, lambda _: None).read_text().splitlines()


def test_parts_share_no_prompt_and_together_are_all(tmp_path) -> None:
    source = jsonl(tmp_path, *({"prompt": f"question {n % 50}", "completion": "c"} for n in range(60)))
    whole = lines(tmp_path, source, (0, 1))
    parts = [lines(tmp_path, source, (index, 3)) for index in range(3)]
    assert len(whole) == 50
    assert sorted(line for part in parts for line in part) == sorted(whole)
    assert all(8 < len(part) < 25 for part in parts)
    assert lines(tmp_path, source, (1, 3), limit=5) == parts[1][:5]


def test_dropped_records_before_the_limit_are_counted(tmp_path) -> None:
    good = [{"prompt": f"question {n}"} for n in range(4)]
    config = load_run_config(
        [
            "model.path=m",
            f"data.train=[{jsonl(tmp_path, {'unknown': 1}, *good, {'unknown': 2})}]",
            "data.max_bad_share=0.5",
            "pairs.limit=2",
        ]
    )
    said: list[str] = []
    left = tmp_path / "prompts.jsonl.tmp-0123456789ab"
    left.touch()
    os.utime(left, (0, 0))
    write_prompts(tmp_path, config, said.append)
    assert not left.exists()
    assert said[0].endswith("2 of 3 records kept")
    assert said[1] == "  1 dropped (unknown_format): the fields are of no known format"


def test_every_part_has_its_own_prompts(tmp_path) -> None:
    texts = [f"question {n} " + "\u2028é" * (n % 7) for n in range(23)]
    config = load_run_config(
        ["model.path=m", f"data.train=[{jsonl(tmp_path, *({'prompt': text} for text in texts))}]"]
    )
    file = write_prompts(tmp_path, config, lambda _: None)
    for size, parts in ((5, 5), (23, 1), (1, 23), (100, 1)):
        prompts = open_prompts(file, size)
        assert (prompts.parts, prompts.count) == (parts, 23)
        found = [[record.prompt for record in prompts.part(index)] for index in range(parts)]
        assert found == [texts[start : start + size] for start in range(0, 23, size)]
