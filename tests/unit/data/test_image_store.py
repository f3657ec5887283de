"""Images of encoded sources: stored once, watched, verified, and given to the model with their inputs."""

import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.pack import PackedImages
from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.data.config import DataConfig, Ranked, SourceConfig
from dpo_dist.data.images import ImageProcessor
from dpo_dist.data.records import ImageFile, Part
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import PreferenceDataset, count_shared, open_dataset
from dpo_dist.encoded.partners import with_partners
from dpo_dist.encoded.store import EncodedSource
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import MEMO_FOLDER
from tests.support.image_processors import file_of, image_tokenizer, picture, processor_of
from tests.support.prefixes import check_claims, some_of

pytestmark = pytest.mark.slow

KIND = "qwen2_5_vl"
COSTS = ComputeCosts(key=0.0, target=0.0)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    return processor_of(tmp_path_factory.mktemp("model"), KIND)


@pytest.fixture
def expanded(processor: ImageProcessor) -> Iterator[mock.Mock]:
    """Called for each image that is encoded."""
    with mock.patch.object(processor, "expanded", side_effect=processor.expanded) as spy:
        yield spy


def write(folder: Path, name: str, *images: list[str], prompt: str = "What is it?") -> str:
    """Write pairs that differ in their images only, which are files of the folder."""
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": "A dog."}],
            "rejected": [{"role": "assistant", "content": "No."}],
            "images": own,
        }
        for own in images
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def paint(folder: Path, **seeds: int) -> None:
    for name, seed in seeds.items():
        (folder / f"{name}.png").write_bytes(file_of(picture(seed, 40 + 28 * seed, 60)))


def encode(
    folder: Path, processor: ImageProcessor | None, *paths: str, **data: Any
) -> tuple[EncodedSource, ...]:
    part = data.pop("part", Part())
    config = DataConfig(cache=str(folder / "cache"), **data)
    sources = [SourceConfig(path) for path in paths]
    return Preparation(sources, config, image_tokenizer(KIND), KIND, part=part, processor=processor).whole()


def opened(folder: Path, processor: ImageProcessor, *paths: str, **data: Any) -> PreferenceDataset:
    return open_dataset(encode(folder, processor, *paths, **data), DataConfig(max_bad_share=1.0), processor)


def test_each_distinct_image_is_stored_once_and_encoded_once(
    tmp_path: Path, processor: ImageProcessor, expanded: mock.Mock
) -> None:
    paint(tmp_path, a=1, b=2, same=1)
    path = write(tmp_path, "pairs.jsonl", ["a.png"], ["b.png", "a.png"], [], ["same.png"])
    other = write(tmp_path, "more.jsonl", ["b.png"])
    data = opened(tmp_path, processor, path, other)
    assert data.images is not None
    assert len(data.images.distinct) == 2
    [first, second, none, same, last] = [data.example(index).images for index in range(5)]
    assert [image.digest for image in second] == [last[0].digest, first[0].digest]
    assert (none, same[0].digest) == ((), first[0].digest)
    size = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*-images.arrow"))
    assert size < 1.2 * sum((tmp_path / name).stat().st_size for name in ("a.png", "b.png", "b.png")) + 5000
    expanded.reset_mock()
    again = opened(tmp_path, processor, other, path)
    assert not expanded.called
    assert again.fingerprint != data.fingerprint
    examples, keys = data.examples_with_keys(range(5))
    np.testing.assert_array_equal(keys, data.keys)
    for example, names in zip(examples, (["a"], ["b", "a"], [], ["a"], ["b"]), strict=True):
        for image, name in zip(example.images, names, strict=True):
            expected = processor.inputs((tmp_path / f"{name}.png").read_bytes())
            assert all(torch.equal(image.inputs[key], value) for key, value in expected.items())
            assert np.count_nonzero(example.prompt_ids == processor.placeholder_id) >= image.tokens


def test_records_that_differ_in_the_image_are_not_one(tmp_path: Path, processor: ImageProcessor) -> None:
    paint(tmp_path, a=1, b=2, c=2)
    paint(tmp_path, d=3)
    (tmp_path / "d.png").write_bytes(file_of(picture(9, 40 + 28, 60)))  # as many tokens as `a`
    data = opened(tmp_path, processor, write(tmp_path, "p.jsonl", ["a.png"], ["d.png"], ["b.png"], ["c.png"]))
    a, d, b, c = range(4)
    assert data.example(a).prompt_ids.tolist() == data.example(d).prompt_ids.tolist()
    assert len({data.keys[data.response_range(index)].tobytes() for index in range(4)}) == 3
    assert len(set(data.prompt_hashes.tolist())) == 3
    assert data.prompt_hashes[b] == data.prompt_hashes[c]
    assert data.counts["duplicates"] == 1
    other = opened(tmp_path, processor, write(tmp_path, "other.jsonl", ["d.png"]))
    assert count_shared(data, other) == 1
    held_out = Part(held_out=np.unique(other.prompt_hashes))
    kept = opened(tmp_path, processor, write(tmp_path, "p.jsonl", ["a.png"], ["d.png"]), part=held_out)
    assert len(kept) == 1


def test_partners_of_labelled_records_follow_this_records_image(
    tmp_path: Path, processor: ImageProcessor
) -> None:
    paint(tmp_path, **{f"i{n}": n for n in range(4)})
    rows = [
        {"prompt": [{"role": "user", "content": "What?"}], "label": bool(n % 2), "images": [f"i{n}.png"]}
        | {"completion": [{"role": "assistant", "content": f"Answer {n}."}]}
        for n in range(4)
    ]
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = with_partners(opened(tmp_path, processor, str(tmp_path / "kto.jsonl")), 1024)
    for index in range(4):
        own, partner = data.example(index).responses
        assert own.tolist() != partner.tolist()
    examples, keys = data.examples_with_keys(range(4), which=1)
    assert len(np.unique(keys, axis=0)) == 4
    assert len({example.images[0].digest for example in examples}) == 4


def test_an_image_that_changed_in_place_is_encoded_and_keyed_anew(
    tmp_path: Path, processor: ImageProcessor, expanded: mock.Mock
) -> None:
    paint(tmp_path, a=1, b=2)
    path = write(tmp_path, "pairs.jsonl", ["a.png"], ["b.png"], ["later.png"])
    first = opened(tmp_path, processor, path, max_bad_share=1.0)
    assert first.counts["dropped"] == {"image_unreadable": 1}
    paint(tmp_path, b=3)
    second = opened(tmp_path, processor, path, max_bad_share=1.0)
    assert second.fingerprint != first.fingerprint
    np.testing.assert_array_equal(second.keys[:2], first.keys[:2])
    assert not np.isin(second.keys[2:], first.keys).any()
    paint(tmp_path, later=4)
    assert len(opened(tmp_path, processor, path, max_bad_share=1.0)) == 3
    expanded.reset_mock()
    (tmp_path / "a.png").unlink()
    assert len(opened(tmp_path, processor, path, max_bad_share=1.0)) == 3
    assert not expanded.called, "images are stored, and their own files may be absent"
    for name in ("b.png", "later.png"):
        (tmp_path / "a.png").unlink(missing_ok=True)
        (tmp_path / "a.png").symlink_to(tmp_path / name)
        linked = opened(tmp_path, processor, path, max_bad_share=1.0)
        assert len(linked) == 3
        assert linked.example(0).images[0] is linked.example(("b.png", "later.png").index(name) + 1).images[0]
    expanded.reset_mock()
    opened(tmp_path, processor, path, max_bad_share=1.0)
    assert not expanded.called


FIXED = (10**18, 10**18)


def colour(file: Path, seed: int) -> None:
    """Write a picture whose size and time are those of every other."""
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(file_of(picture(seed, 56, 84), "BMP"))
    os.utime(file, ns=FIXED)


def exchange(first: Path, second: Path) -> None:
    first.rename(first.with_name("between"))
    second.rename(first)
    first.with_name("between").rename(second)


def link(file: Path, target: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)


def unpack(file: Path, content: bytes) -> None:
    with tarfile.open(file.with_suffix(".tar"), "w") as archive:
        member = tarfile.TarInfo(file.name)
        member.size, member.mtime = len(content), FIXED[0] / 1e9
        archive.addfile(member, io.BytesIO(content))
    with tarfile.open(file.with_suffix(".tar")) as archive:
        archive.extractall(file.parent, filter="data")


# `a` and `b` are pictures beside the records, `link` leads to `a`, `both` is also in the source's `images`,
# which is looked up first, and `new` is in none of the records.
REPLACED: dict[str, Callable[[Path, Path], Any]] = {
    "copied over": lambda data, _: shutil.copy2(data / "new", data / "a"),
    "moved over": lambda data, _: (data / "new").replace(data / "a"),
    "unpacked over": lambda data, _: unpack(data / "a", (data / "new").read_bytes()),
    "link to another": lambda data, _: link(data / "link", data / "b"),
    "folder that is a link to another": lambda data, _: link(data / "sub", data / "later"),
    "names exchanged": lambda data, _: exchange(data / "a", data / "b"),
    "earlier folder has the name, too": lambda data, images: shutil.copy2(data / "new", images / "a"),
    "earlier folder has a link of the name": lambda data, images: link(images / "a", data / "b"),
    "the first of two is gone": lambda _, images: (images / "both").unlink(),
    "in place, an absent name appears": lambda data, _: shutil.copy2(data / "new", data / "absent"),
}
KEPT: dict[str, Callable[[Path, Path], Any]] = {
    "touched": lambda data, _: (data / "a").touch(),
    "other permissions": lambda data, _: (data / "a").chmod(0o600),
    "hard link": lambda data, _: (data / "another").hardlink_to(data / "a"),
    "equal copy moved over": lambda data, _: shutil.copy2(data / "a", data / "x").replace(data / "a"),
    "equal copy in an earlier folder": lambda data, images: shutil.copy2(data / "a", images / "a"),
    "link that leads out of the folders": lambda data, images: link(images / "a", data.parent / "out"),
    "the second of two is gone": lambda data, _: (data / "both").unlink(),
    "gone": lambda data, _: (data / "b").unlink(),
}


@pytest.fixture
def watched(tmp_path: Path, processor: ImageProcessor) -> Callable[[str], PreferenceDataset]:
    """Opens the pictures of REPLACED and KEPT, encoded in a cache."""
    data, images = tmp_path / "data", tmp_path / "images"
    names = ["a", "b", "link", "sub/e", "both", "absent"]
    for seed, name in enumerate(["a", "b", "new", "early/e", "later/e", "both", "../images/both", "../out"]):
        colour(data / name, seed)
    link(data / "link", data / "a")
    link(data / "sub", data / "early")
    path = write(data, "pairs.jsonl", *([name] for name in names))
    assert len({(file.stat().st_size, file.stat().st_mtime) for file in data.glob("?")}) == 1

    def opened_from(cache: str) -> PreferenceDataset:
        config = DataConfig(cache=str(tmp_path / cache), max_bad_share=1.0)
        source = SourceConfig(path, images=str(images))
        encoded = Preparation([source], config, image_tokenizer(KIND), KIND, processor=processor).whole()
        return open_dataset(encoded, config, processor)

    return opened_from


@pytest.mark.parametrize("change", REPLACED)
def test_a_picture_that_was_replaced_with_its_size_and_time_kept_is_encoded_anew(
    change: str, tmp_path: Path, watched: Callable[[str], PreferenceDataset]
) -> None:
    before = watched("cache")
    REPLACED[change](tmp_path / "data", tmp_path / "images")
    after, fresh = watched("cache"), watched("other")
    assert after.fingerprint != before.fingerprint
    assert after.fingerprint == fresh.fingerprint


@pytest.mark.parametrize("change", KEPT)
def test_a_picture_with_the_same_content_is_not_encoded_anew_and_read_once(
    change: str,
    tmp_path: Path,
    watched: Callable[[str], PreferenceDataset],
    expanded: mock.Mock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = watched("cache")
    KEPT[change](tmp_path / "data", tmp_path / "images")
    expanded.reset_mock()
    assert watched("cache").fingerprint == before.fingerprint
    monkeypatch.setattr(ImageFile, "read", mock.Mock(side_effect=AssertionError("read again")))
    assert watched("cache").fingerprint == before.fingerprint
    assert not expanded.called


@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_damaged_images_are_not_opened_and_are_encoded_again(
    damage: str, tmp_path: Path, processor: ImageProcessor
) -> None:
    paint(tmp_path, a=1)
    path = write(tmp_path, "pairs.jsonl", ["a.png"])
    [source] = encode(tmp_path, processor, path)
    [file] = (tmp_path / "cache").glob("*-images.arrow")
    whole = file.read_bytes()
    if damage == "cut":
        os.truncate(file, 500)
    elif damage == "bit":
        file.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    else:
        file.unlink()
    with pytest.raises(DataError, match="damaged"):
        open_dataset([source], DataConfig(), processor)
    encode(tmp_path, processor, path)
    assert file.read_bytes() == whole
    assert len(open_dataset([source], DataConfig(), processor)) == 1


def test_settings_of_images_change_the_file_and_text_has_no_images(
    tmp_path: Path, processor: ImageProcessor
) -> None:
    paint(tmp_path, a=1)
    path, text = write(tmp_path, "pairs.jsonl", ["a.png"]), write(tmp_path, "text.jsonl", [])
    smaller = processor_of(tmp_path / "smaller", KIND, 2000)
    coarser = processor_of(tmp_path / "coarser", KIND, image_mean=[0.5, 0.5, 0.5])
    encoded = [encode(tmp_path, each, path)[0].file for each in (processor, smaller, coarser)]
    assert len(set(encoded)) == 3
    [source] = encode(tmp_path, processor, text)
    assert not source.image_file.exists()
    data = open_dataset([source], DataConfig(), processor)
    assert (data.images, data.dummy_image()) == (None, None)
    [unread] = encode(tmp_path, None, path, max_bad_share=1.0)
    assert not unread.image_file.exists()
    with pytest.raises(DataError, match="1 of 1 records cannot be used") as fault:
        open_dataset([unread], DataConfig())
    assert "model.images" in fault.value.remedy
    assert {file.suffix for file in (tmp_path / "cache").iterdir() if file.name != MEMO_FOLDER} == {".arrow"}


def test_every_rank_knows_which_micro_batches_have_images(tmp_path: Path, processor: ImageProcessor) -> None:
    paint(tmp_path, a=1, b=4)
    text = write(tmp_path, "text.jsonl", *[[]] * 5)
    data = opened(tmp_path, processor, write(tmp_path, "p.jsonl", ["a.png"], ["b.png", "a.png"]), text)
    assert data.images is not None
    indices = np.arange(len(data))
    plans = [shard_batch(data, indices, rank, 2, 80, COSTS) for rank in range(2)]
    assert plans[0].with_images == plans[1].with_images
    assert True in plans[0].with_images
    for number, batches in enumerate(zip(*(list(plan.batches()) for plan in plans), strict=True)):
        has = [any(data.with_images(np.array(plan.micro_batches[number], dtype=np.int64))) for plan in plans]
        assert plans[0].with_images[number] == any(has)
        for batch, own in zip(batches, has, strict=True):
            assert (batch.images is not None) == any(has)
            if isinstance(batch.images, PackedImages):
                assert batch.images.is_dummy != own
                assert set(batch.images.inputs) == {"pixel_values", "image_grid_thw"}


def test_the_planner_counts_images(tmp_path: Path, processor: ImageProcessor) -> None:
    paint(tmp_path, a=1, b=4)
    ranking = {
        "prompt": [{"role": "user", "content": "What is it?"}],
        "responses": ["A dog.", "A cat.", "No."],
        "scores": [3, 2, 1],
        "images": ["a.png"],
    }
    (tmp_path / "ranking.jsonl").write_text(json.dumps(ranking))
    pairs = write(tmp_path, "p.jsonl", [], ["b.png", "a.png"])
    data = opened(tmp_path, processor, f"{tmp_path}/ranking.jsonl", pairs, ranked=Ranked.all_pairs)
    indices = np.arange(len(data))
    responses, counts = data.response_indices(indices), data.response_counts(indices)
    without, counted = (
        data.sizes(indices, responses, counts, replace(COSTS, image=image)).costs for image in (0.0, 2.0)
    )
    tokens = [sum(image.tokens for image in data.example(int(index)).images) for index in indices]
    assert tokens[4] > tokens[2] == tokens[1] == tokens[0] > tokens[3] == 0
    np.testing.assert_allclose(counted - without, 2 * np.array(tokens))


def folders_of(tmp_path: Path, **seeds: dict[str, int]) -> list[str]:
    """Write the same records into folders, each with pictures of its own; return the records' files."""
    for name, own in seeds.items():
        (tmp_path / name).mkdir()
        paint(tmp_path / name, **own)
    return [write(tmp_path / name, "pairs.jsonl", ["a.png"], ["b.png"], ["c.png"]) for name in seeds]


def test_equal_records_in_another_folder_have_the_images_of_that_folder(
    tmp_path: Path, processor: ImageProcessor
) -> None:
    one, two = folders_of(tmp_path, one={"a": 1, "b": 2, "c": 1}, two={"a": 3, "b": 4, "c": 5})
    first, second = (opened(tmp_path, processor, path) for path in (one, two))
    assert not np.isin(second.keys, first.keys).any()
    link = tmp_path / "link"
    for name in ("one", "two"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        chosen = SourceConfig(one, images=str(link))
        config = DataConfig(cache=str(tmp_path / "cache"))
        sources = Preparation([chosen], config, image_tokenizer(KIND), KIND, processor=processor).whole()
        data = open_dataset(sources, config, processor)
        np.testing.assert_array_equal(data.keys, {"one": first, "two": second}[name].keys)


def test_data_are_the_same_if_records_and_images_moved_and_others_if_an_image_became_another(
    tmp_path: Path, processor: ImageProcessor
) -> None:
    one, two, other = folders_of(
        tmp_path,
        one={"a": 1, "b": 2, "c": 1},
        two={"a": 1, "b": 2, "c": 1},
        other={"a": 1, "b": 2, "c": 2},
    )
    first, moved, changed = (opened(tmp_path, processor, path) for path in (one, two, other))
    assert moved.fingerprint == first.fingerprint
    assert changed.fingerprint != first.fingerprint


def test_equal_images_are_shared_and_others_are_not(tmp_path: Path, processor: ImageProcessor) -> None:
    paint(tmp_path, a=1, b=2, c=1)
    names = [[f"{name}.png" for name in own] for own in ("a", "b", "c", "", "ab", "bb", "cb", "ba")]
    path = write(tmp_path, "pairs.jsonl", *names)
    data = opened(tmp_path, processor, path)
    assert data.prefixes is not None
    for seed in range(20):
        check_claims(data, some_of(data, random.Random(seed)))
    places = data.prefixes.places
    assert abs(places[0] - places[2]) == abs(places[4] - places[6]) == 1
    paint(tmp_path, c=2)
    changed = opened(tmp_path, processor, path)
    assert changed.prefixes is not None
    check_claims(changed, np.argsort(changed.prefixes.places))
