"""Samples that can be part of a pair."""

from typing import Any

from dpo_dist.config.pairs_schema import DropOrKeep, PairsConfig
from dpo_dist.generation.results import usable

DROP, KEEP = DropOrKeep.drop, DropOrKeep.keep


def sample(content: str, **facts: Any) -> dict[str, Any]:
    return {"content": content, "finished": True, "same_ids": True} | facts


def test_samples_that_are_not_used_are_counted_by_reason() -> None:
    samples = [
        sample("a"),
        sample("a "),
        sample("a", fields={"reasoning_content": "t"}),
        sample(" "),
        sample("b", finished=False),
        sample("c", same_ids=False),
    ]
    kept, counts = usable(samples, PairsConfig())
    assert [samples.index(each) for each in kept] == [0, 2, 5]
    assert counts == {"identical": 1, "empty": 1, "unfinished": 1}
    kept, counts = usable(samples, PairsConfig(unfinished=KEEP, encoded_differently=DROP))
    assert [samples.index(each) for each in kept] == [0, 2, 4]
    assert counts == {"identical": 1, "empty": 1, "encoded_differently": 1}
