"""Verbs that look at records: they never lose the image of one, nor take two images for one."""

from pathlib import Path

from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.tools.doctor.measures.observe import Observer
from dpo_dist.tools.shared.records import good_records
from tests.support.records import TEXT, jsonl


def test_the_doctor_takes_no_two_images_for_one_and_names_a_missing_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "copy").write_text("a")
    path = jsonl(tmp_path, *({**TEXT, "image": name} for name in ("a", "b", "copy", "no")))
    first, other, copy, missing = Observer(DataConfig(), None).observe(list(read_records(path)))
    for key in ("prompt", "record", "hash"):
        assert getattr(first, key) == getattr(copy, key) != getattr(other, key)
    assert missing.dropped == "image_unreadable"


def test_a_verb_that_cannot_show_images_drops_their_records_with_the_reason(tmp_path: Path) -> None:
    source, said = SourceConfig(jsonl(tmp_path, TEXT, {**TEXT, "image": "a"})), list[str]()
    kept = list(good_records(read_records(source), source, DataConfig(max_bad_share=0.5), said.append))
    assert [record.prompt for record in kept] == ["q"]
    assert "media_not_read" in said[1]
