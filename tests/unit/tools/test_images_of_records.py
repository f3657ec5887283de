"""Verbs that look at records: they never lose the image of one, nor take two images for one."""

from pathlib import Path

from PIL import Image

from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.tools.doctor.measures.observe import Observer
from dpo_dist.tools.shared.records import good_records
from tests.support.image_processors import file_of
from tests.support.records import TEXT, jsonl


def test_the_doctor_takes_no_two_images_for_one_and_names_a_missing_file(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue"), ("copy", "red")):
        (tmp_path / name).write_bytes(file_of(Image.new("RGB", (4, 4), colour)))
    path = jsonl(tmp_path, *({**TEXT, "image": name} for name in ("a", "b", "copy", "no")))
    first, other, copy, missing = Observer(DataConfig(), None).observe(list(read_records(path)))
    for key in ("prompt", "record", "hash"):
        assert getattr(first, key) == getattr(copy, key) != getattr(other, key)
    assert missing.dropped == "image_unreadable"


def test_verbs_read_records_with_images_and_drop_those_whose_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a file")
    rows = (TEXT, {**TEXT, "image": "a"}, {**TEXT, "image": "no"})
    source, said = SourceConfig(jsonl(tmp_path, *rows)), list[str]()
    kept = list(good_records(read_records(source), source, DataConfig(max_bad_share=0.5), said.append))
    assert [len(record.images) for record in kept] == [0, 1]
    assert "image_unreadable" in said[1]
