"""The file of encoded data: another one for every input of the ids, the same one for everything else."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest

from dpo_dist.data.config import (
    DataConfig,
    Ranked,
    ScoredDataConfig,
    SourceConfig,
    UnpairedDataConfig,
)
from dpo_dist.data.config import Truncation as Cut
from dpo_dist.data.images import ImageProcessor
from dpo_dist.data.read.sources import DataSource
from dpo_dist.data.records import Part
from dpo_dist.encoded.build import Preparation
from tests.support import tiny
from tests.support.records import GOOD, jsonl

# Each field is in one of two tables: whoever adds one decides.
DATA = {
    "eval_share": 0.5,
    "drop_eval_prompts": True,
    "max_length": 30,
    "max_prompt_length": 5,
    "max_scorer_length": 9,
    "truncation": Cut.drop,
    "text_as_messages": True,
    "chat_template": "{folder}/other.jinja",
    "template_arguments": {"date": "today"},
    "untrained": ["thoughts"],
    "ranked": Ranked.best_worst,
}
DATA_WITHOUT_EFFECT = {
    "train": [],
    "eval": [SourceConfig("eval.jsonl")],
    "max_bad_share": 1.0,  # judged at each start
    "cache": "{folder}/another",  # the names of the files are the same
}
SOURCE = {
    "split": "test",
    "name": "subset",
    "data_dir": "below",
    "revision": "1" * 40,
    "limit": 3,
    "fields": "pair",
    "ignore": ["id"],
    "reader": "tests.support.own_code:ship_code",
    "images": "{folder}/pictures",
}
# A pinned revision and the digests of files say what a path holds.
SOURCE_WITHOUT_EFFECT = {"path": "another/dataset", "weight": 2.0, "label": "other"}
TEMPLATE = "{{ date }}" + tiny.CHATML


def named(value: Any, folder: Path) -> Any:
    return value.format(folder=folder) if isinstance(value, str) else value


def file_of(folder: Path, source: SourceConfig, **data: Any) -> str:
    """Return the name of the file with the records of a source, which needs no network."""
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "other.jinja").write_text(TEMPLATE + "!")
    data = {name: named(value, folder) for name, value in data.items()}
    config = DataConfig(**{"train": [source], "cache": str(folder / "cache")} | data)
    tokenizer, processor = tiny.qwen(), cast(ImageProcessor, SimpleNamespace(settings=b"images"))
    tokenizer.chat_template = TEMPLATE
    part = Part.to_train(config, np.array([7], dtype=np.uint64))
    sources = config.train or [source]
    with mock.patch.object(DataSource, "pinned", lambda source: source):
        [planned] = Preparation(sources, config, tokenizer, "qwen", part=part, processor=processor).plan()
    return planned.target.file.name


def test_data_that_earlier_versions_encoded_are_found() -> None:
    """Each kind of data has the address that it has had since it was first written."""
    usual = {
        "max_length": 1024,
        "max_prompt_length": None,
        "max_scorer_length": None,
        "ranked": "whole",
        "template_arguments": None,
        "template_date": "2024-07-26",
        "text_as_messages": "auto",
        "truncation": "keep_start",
        "takes_apart": False,
        "untrained": ["empty_thoughts"],
    }
    assert DataConfig().encoding_identity == usual
    assert UnpairedDataConfig().encoding_identity == usual | {"takes_apart": True}
    assert ScoredDataConfig().encoding_identity == usual | {"for_scores": True}


def test_each_field_is_known() -> None:
    tables = [(DataConfig, DATA, DATA_WITHOUT_EFFECT), (SourceConfig, SOURCE, SOURCE_WITHOUT_EFFECT)]
    for section, changes, without_effect in tables:
        assert sorted([*changes, *without_effect]) == sorted(field.name for field in fields(section))


@pytest.mark.parametrize("field", [*DATA, *DATA_WITHOUT_EFFECT])
def test_a_key_of_data_changes_the_file_if_it_changes_ids(field: str, tmp_path: Path) -> None:
    source = SourceConfig("someones/dataset", revision="0" * 40)
    plain = file_of(tmp_path, source)
    changed = file_of(tmp_path, source, **{field: {**DATA, **DATA_WITHOUT_EFFECT}[field]})
    assert (changed != plain) == (field in DATA)


@pytest.mark.parametrize("field", [*SOURCE, *SOURCE_WITHOUT_EFFECT])
def test_a_key_of_a_source_changes_the_file_if_it_changes_ids(field: str, tmp_path: Path) -> None:
    source = SourceConfig("someones/dataset", revision="0" * 40)
    plain = file_of(tmp_path, source)
    value = {**SOURCE, **SOURCE_WITHOUT_EFFECT}[field]
    changed = file_of(tmp_path, replace(source, **{field: named(value, tmp_path)}))
    assert (changed != plain) == (field in SOURCE)


def test_content_and_kind_of_a_file_change_the_file_and_its_place_does_not(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = Path(jsonl(tmp_path, *GOOD))
    contents = {"moved": path.read_bytes(), "changed": path.read_bytes()[:-1]}
    found = {}
    for name, file in [("moved", "a.jsonl"), ("changed", "b.jsonl"), ("moved", "c.json")]:
        (tmp_path / "elsewhere" / file).write_bytes(contents[name])
        found[file] = file_of(tmp_path, SourceConfig(f"{tmp_path}/elsewhere/{file}"))
    plain = file_of(tmp_path, SourceConfig(str(path)))
    assert found["a.jsonl"].partition("-")[0] == plain.partition("-")[0]  # images: in other folders
    assert len({name.partition("-")[0] for name in (plain, *found.values())}) == 3


def test_tokenizer_template_and_images_settings_change_the_file(tmp_path: Path) -> None:
    source = SourceConfig(jsonl(tmp_path, *GOOD))
    config = DataConfig(cache=str(tmp_path / "cache"))

    def file(digest: str = "qwen", template: str = tiny.CHATML, settings: bytes | None = None) -> str:
        tokenizer = tiny.qwen()
        tokenizer.chat_template = template
        processor = None if settings is None else cast(ImageProcessor, SimpleNamespace(settings=settings))
        [planned] = Preparation([source], config, tokenizer, digest, processor=processor).plan()
        return planned.target.fingerprint

    changed = [file("other"), file(template=tiny.ZEPHYR), file(settings=b"images"), file(settings=b"others")]
    assert len({file(), *changed}) == 5
