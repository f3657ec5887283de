"""Every real file is read by one source each, with the faults that are known of it."""

from collections import Counter
from typing import Any

import pytest

from dpo_dist.config.data import DataConfig, DataFormat, SourceConfig
from dpo_dist.data.formats import check_source, read_records
from dpo_dist.data.records import BadRecord
from dpo_dist.foundation.errors import DataError
from tests.support.shared_data import shared_data_dir

SHARED = shared_data_dir()
pytestmark = pytest.mark.skipif(SHARED is None, reason="needs the slices of real data")

HH = {"empty_response": 4, "history_differs": 5}
SCORED = {"identical_responses": 5, "empty_response": 2}
RANKED = {"identical_responses": 6}
# Kept and dropped records of each file, and of each entry of dataset_info.json.
FILES: list[tuple[str, dict[str, Any], int, dict[str, int]]] = [
    ("hh_rlhf_sample.jsonl", {}, 1491, HH),
    ("llama_factory_sharegpt_en.json", {}, 150, {}),
    ("llama_factory_sharegpt_zh.json", {}, 300, {}),
    ("llama_factory_v1_message_pairs.jsonl", {}, 10, {}),
    *(
        ("llama_factory_kto_en.json", how, 0, {"unpaired": 60})
        for how in ({}, {"format": DataFormat.completion})
    ),
    ("ultrafeedback_plain_scored.jsonl", {}, 293, SCORED),
    ("ranked_oasst_history_zh.json", {}, 244, RANKED),
    ("system_history_question_zh.jsonl", {}, 150, {}),
    ("sharegpt_string_answers_zh.jsonl", {}, 80, {}),
    ("toolcall_pairs_zh.jsonl", {}, 11, {}),
    ("orca_system_question.csv", {}, 60, {}),
    ("templated_near_duplicates.jsonl", {}, 40, {}),
    # Of 16, 13, 11 and 6 records of the sources above; one with an empty response is in it twice.
    (
        "bad_records.jsonl",
        {"columns": {"record": "record"}},
        23,
        {"history_differs": 5, "empty_response": 7, "identical_responses": 11},
    ),
    ("derived/trl_conversational_from_hh.jsonl", {}, 200, {}),
    ("derived/ultrafeedback_binarized_messages.jsonl", {}, 100, {}),
    ("derived/llama_factory_alpaca_chosen_rejected.json", {}, 100, {}),
    ("", {"name": "dpo_en_demo"}, 150, {}),
    ("", {"name": "dpo_zh_demo"}, 300, {}),
    ("dataset_info.json", {"name": "ultrafeedback"}, 100, {}),
    ("", {"name": "orca_pairs"}, 60, {}),
    ("", {"name": "oaast_rm_zh"}, 244, RANKED),
]


def source_of(name: str, options: dict[str, Any]) -> SourceConfig:
    assert SHARED is not None
    return SourceConfig(path=str(SHARED / name), **options)


@pytest.mark.parametrize(("name", "options", "kept", "dropped"), FILES, ids=str)
def test_known_faults(name: str, options: dict[str, Any], kept: int, dropped: dict[str, int]) -> None:
    source = source_of(name, options)
    if kept:
        check_source(source, DataConfig(max_bad_share=1.0))
    else:
        with pytest.raises(DataError, match="pair good and bad responses"):
            check_source(source, DataConfig())
    outcomes = Counter(
        record.reason if isinstance(record, BadRecord) else "kept" for record in read_records(source)
    )
    assert outcomes.pop("kept", 0) == kept
    assert outcomes == dropped


def test_every_file_has_a_row_above() -> None:
    assert SHARED is not None
    files = {str(file.relative_to(SHARED)) for file in SHARED.rglob("*.*") if file.suffix != ".md"}
    assert files == {name for name, *_ in FILES if name}
