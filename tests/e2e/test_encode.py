"""`dpo-dist encode`: jobs encode the data of a run, which training then finds."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.encoded.build import Preparation
from tests.e2e.conftest import Overrides
from tests.support.launch import constants, run_verb, summary

SMALL = {"dpo_dist.encoded.build.PART_RECORDS": 4, "dpo_dist.encoded.build.CHUNK_RECORDS": 2}
NOTHING = {"dpo_dist.encoded.build.encode_records": None}


HELD_OUT = {
    "a share": ["data.eval_share=0.2"],
    "a file": ["data.eval=[{assets}/eval.jsonl]"],
    "a file that is left out": ["data.eval=[{assets}/eval.jsonl]", "data.drop_eval_prompts=true"],
}


@pytest.mark.parametrize("held_out", HELD_OUT)
def test_training_encodes_nothing_after_an_array_of_jobs(
    held_out: str, overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    data = [word.format(assets=assets) for word in HELD_OUT[held_out]] + [f"data.cache={tmp_path}/encoded"]
    words = []
    for number in (2, 3, 1):
        job = run_verb("encode", overrides(*data, f"encode.part={number}/3"), prepare=constants(**SMALL))
        assert job.code == 0, job.output
        words.append("all data are encoded" in job.output)
    assert words == [False, False, True]
    assert not (tmp_path / "run").exists()
    again = run_verb("encode", overrides(*data), prepare=constants(**NOTHING))
    assert "all data are encoded" in again.output
    trained = run_verb("train", overrides(*data, "trainer.max_steps=1"), prepare=constants(**NOTHING))
    assert trained.code == 0, trained.output
    assert summary(tmp_path / "run")["data"]["train"]["kept"] > 0


def other_job_ends_meanwhile() -> None:
    """Before the second encoding of job 1 of 2, job 2 encodes and joins what it can."""
    constants(**SMALL)()
    encode, earlier = Preparation.encode, list[tuple[Any, Any]]()

    def encode_too(self: Preparation, planned: Any, share: Any) -> list[int]:
        earlier.append((self, planned))
        if len(earlier) == 2:
            for one, its_planned in earlier:
                one.join(its_planned, encode(one, its_planned, (1, 2)), (1, 2))
        return encode(self, planned, share)

    Preparation.encode = encode_too  # type: ignore[assignment, method-assign]


def test_the_job_that_ends_last_joins_all_parts(overrides: Overrides, assets: Path, tmp_path: Path) -> None:
    data = [f"data.eval=[{assets}/eval.jsonl]", f"data.cache={tmp_path}/encoded", "encode.part=1/2"]
    job = run_verb("encode", overrides(*data), prepare=other_job_ends_meanwhile)
    assert "all data are encoded" in job.output, job.output


def test_data_that_training_would_refuse_are_refused_here(overrides: Overrides) -> None:
    refused = run_verb("encode", overrides("data.max_length=8", "data.truncation=drop"))
    assert refused.code == 2
    assert "cannot be used" in refused.output or "no pair" in refused.output, refused.output


def test_a_part_that_does_not_exist(overrides: Overrides) -> None:
    for part, words in (("4/3", "no such part"), ("0/3", "from 1/N to N/N")):
        refused = run_verb("encode", overrides(f"encode.part={part}"))
        assert refused.code == 2
        assert words in refused.output
