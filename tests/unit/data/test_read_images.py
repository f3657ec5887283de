"""Images of records: their places in the prompt, and the files that are read."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from dpo_dist.config.load import load_run_config
from dpo_dist.data.config import SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.read.files import write_records
from dpo_dist.data.records import (
    IMAGE,
    BadRecord,
    PreferenceRecord,
    prompt_hash,
)
from dpo_dist.foundation.errors import ConfigError, DataError
from tests.support.image_processors import file_of
from tests.support.records import assistant, bad, good, jsonl, user

PAIR = {"chosen": "good", "rejected": "bad"}
PART = {"type": "image"}
TWO = ["a.png", "b.png"]
URI = "data:image/png;base64," + base64.b64encode(b"bytes").decode()


def picture(colour: str = "red", kind: str = "PNG") -> bytes:
    return file_of(Image.new("RGB", (3, 2), colour), kind)


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def turn(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def contents(record: PreferenceRecord) -> list[str]:
    assert not isinstance(record.prompt, str)
    assert all(not one.fields for one in record.prompt)
    return [one.content for one in record.prompt]


def names(record: PreferenceRecord) -> list[str | bytes]:
    return [image.content or image.name for image in record.images]


I = IMAGE  # noqa: E741
SHARED = [turn(text("what is"), {**PART, "image": "a.png"}, text("?"))]
FORMS: dict[str, tuple[dict[str, Any], list[str], list[Any]]] = {
    "TRL": ({"prompt": [user("q")], **PAIR, "images": TWO}, [f"{I}{I}q"], TWO),
    "TRL, one image": ({"prompt": [user("q")], **PAIR, "image": "a.png"}, [f"{I}q"], ["a.png"]),
    "TRL, parts": (
        {
            "prompt": [turn(PART, text("q"), PART)],
            "images": TWO,
            "chosen": [turn(text("good"), role="assistant")],
            "rejected": [turn(text("bad"), role="assistant")],
        },
        [f"{I}q{I}"],
        TWO,
    ),
    "TRL, parts as a table writes them": (
        {
            "prompt": [
                turn(
                    {**PART, "text": None, "image": {"bytes": None, "path": None}},
                    {**text("q"), "image": None},
                )
            ],
            **PAIR,
            "images": ["a.png", None],
        },
        [f"{I}q"],
        ["a.png"],
    ),
    "TRL, no prompt": (
        {"chosen": [*SHARED, assistant("good")], "rejected": [*SHARED, assistant("bad")]},
        [f"what is{I}?"],
        ["a.png"],
    ),
    "transformers": (
        {"prompt": [turn({**PART, "path": "a.png"}, {**PART, "base64": "Yg=="}, text("q"))], **PAIR},
        [f"{I}{I}q"],
        ["a.png", "data:;base64,Yg=="],
    ),
    "OpenAI": (
        {"prompt": [turn(text("q"), {"type": "image_url", "image_url": {"url": URI}})], **PAIR},
        [f"q{I}"],
        [URI],
    ),
    "its own image and one of the list": (
        {"prompt": [turn(PART, {**PART, "image": b"own"}, text("q"))], **PAIR, "images": ["a.png"]},
        [f"{I}{I}q"],
        ["a.png", b"own"],
    ),
    "images of a message": (
        {"prompt": [user("first"), assistant("yes"), {**user("q"), "images": TWO}], **PAIR},
        ["first", "yes", f"{I}{I}q"],
        TWO,
    ),
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "<image>q <image>"}],
            "images": TWO,
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        [f"{I}q {I}"],
        TWO,
    ),
    "LLaMA-Factory, alpaca": (
        {
            "instruction": "<image>q",
            "input": "more",
            "system": "be kind",
            "history": [["<image>", "yes"]],
            **PAIR,
            "images": TWO,
        },
        ["be kind", I, "yes", f"{I}q\nmore"],
        TWO,
    ),
    "ms-swift": (
        {"messages": [user("<image>q"), assistant("good")], "rejected_response": "bad", "images": ["a.png"]},
        [f"{I}q"],
        ["a.png"],
    ),
    "ms-swift, without tags": (
        {
            "messages": [{"role": "system", "content": "be kind"}, user("q"), assistant("good")],
            "rejected_response": "bad",
            "images": ["a.png"],
        },
        ["be kind", f"{I}q"],
        ["a.png"],
    ),
    "RLAIF-V": (
        {"question": "q", **PAIR, "image": {"bytes": b"jpeg", "path": "a.jpg"}, "ds_name": "vqa"},
        [f"{I}q"],
        [b"jpeg"],
    ),
    "a ranking": (
        {
            "prompt": "q",
            "image": {"bytes": None, "path": "a.png"},
            "completions": [
                {"model": "m", "content": "bad", "score": 1},
                {"model": "n", "content": "good", "score": 5},
            ],
        },
        [f"{I}q"],
        ["a.png"],
    ),
    "a label": (
        {"prompt": "q", "completion": "good", "label": True, "images": '["a.png"]'},
        [f"{I}q"],
        ["a.png"],
    ),
    "an image alone": ({"prompt": [turn(PART)], **PAIR, "images": ["a.png"]}, [I], ["a.png"]),
    "a tag beside parts": (
        {"prompt": [turn(PART, text("the tag <image>"))], **PAIR, "images": ["a.png"]},
        [f"{I}the tag <image>"],
        ["a.png"],
    ),
    "a tag that the response names too": (
        {"prompt": [user("<image>q")], "chosen": "good <image>", "rejected": "bad", "images": ["a.png"]},
        [f"{I}q"],
        ["a.png"],
    ),
    **{
        f"placeholders: {tag}": (
            {"prompt": [user(f"{tag} q {tag}")], **PAIR, "images": TWO},
            [f"{I} q {I}"],
            TWO,
        )
        for tag in (
            "<|vision_start|><|image_pad|><|vision_end|>",
            "<|vision_start|>" + "<|image_pad|>" * 9 + "<|vision_end|>",
            "<|image_pad|>",
            "<|media_pad|>",
            "<start_of_image>",
            "<start_of_image><image_soft_token><image_soft_token><end_of_image>",
            "<img><IMG_CONTEXT><IMG_CONTEXT></img>",
            "<|begin_of_image|><|image|><|end_of_image|>",
            "<|image>" + "<|image|>" * 3 + "<image|>",
            "[IMG]",
        )
    },
    "Phi": ({"prompt": [user("<|image_1|>q")], **PAIR, "image": "a.png"}, [f"{I}q"], ["a.png"]),
    "numbers from 1": (
        {"prompt": [user("is <image 1>"), assistant("?"), user("<image 2>?")], **PAIR, "images": TWO},
        [f"is {I}", "?", f"{I}?"],
        TWO,
    ),
    "numbers from 0": ({"prompt": [user("<image_0><image1>")], **PAIR, "images": TWO}, [I + I], TWO),
    "numbers of two digits": (
        {
            "prompt": [user("".join(f"<image {number}>" for number in range(1, 11)))],
            **PAIR,
            "images": [*"abcdefghij"],
        },
        [I * 10],
        [*"abcdefghij"],
    ),
    "Qwen-VL": (
        {"query": "Picture 1: <img>b/a.png</img>\nq <img>b.JPEG</img>", **PAIR},
        [f"Picture 1: {I}\nq {I}"],
        ["b/a.png", "b.JPEG"],
    ),
    "Qwen-VL, its files in a column, too": (
        {"prompt": "<img>a.png</img>q", **PAIR, "images": ["a.png"]},
        [f"{I}q"],
        ["a.png"],
    ),
    "hostile": (  # in linear time: else hours
        {"prompt": [user("<start_of_image>" * 50_000)], **PAIR, "images": ["a.png"] * 50_000},
        [I * 50_000],
        ["a.png"] * 50_000,
    ),
    "hostile forums": (
        {"prompt": [user("[IMG]" * 50_000 + "a.png[/IMG]")], **PAIR, "images": ["a.png"] * 49_999},
        [I * 49_999 + "[IMG]a.png[/IMG]"],
        ["a.png"] * 49_999,
    ),
    "forums": (
        {"prompt": "[IMG]a.png[/IMG] <img>q</img>", **PAIR, "image": "a.png"},
        [f"{I}[IMG]a.png[/IMG] <img>q</img>"],
        ["a.png"],
    ),
    "calls": (
        {
            "prompt": [
                user("<image>q"),
                {"role": "assistant", "content": "", "tool_calls": []},
                {"role": "tool", "content": "4"},
            ],
            **PAIR,
            "images": ["a.png"],
        },
        [f"{I}q", "", "4"],
        ["a.png"],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_have_the_places_that_the_other_program_gives_them(form: str) -> None:
    fields, expected, images = FORMS[form]
    record = good(fields)
    assert (contents(record), names(record)) == (expected, images)
    assert [str(response) for response in record.responses] in (
        ["good", "bad"],
        ["good"],
        ["good <image>", "bad"],
    )


TRL_PROMPTS: list[tuple[list[Any], list[str]]] = [
    ([{"role": "system", "content": "be kind"}, user("q"), assistant("yes"), user("r")], TWO),
    ([turn(text("q"), PART), turn(text("yes"), role="assistant"), turn(PART, text("r"))], TWO),
    ([turn({**PART, "image": "own.png"}, PART, text("q"))], ["a.png"]),
    ([user("q")], []),
]


@pytest.mark.parametrize(("prompt", "images"), TRL_PROMPTS)
def test_images_have_the_places_that_trl_gives_them(prompt: list[Any], images: list[str]) -> None:
    turns = [message["content"] for message in prepare_multimodal_messages(prompt, images)]
    record = good({"prompt": prompt, **PAIR, "images": images})
    read = record.prompt if isinstance(record.prompt, tuple) else ()
    assert [one.content for one in read] == [
        "".join(part.get("text", I) for part in parts) for parts in turns
    ]
    assert names(record) == [part["image"] for parts in turns for part in parts if part["type"] == "image"]


@pytest.mark.parametrize(
    "fields",
    [
        {"images": []},
        {"image": None},
        {"image": {"bytes": None, "path": None}},
        {},
        {"prompt": "<image 1> and <img>a.png</img>"},
    ],
)
def test_without_images_a_tag_is_text_and_a_prompt_stays_text(fields: dict[str, Any]) -> None:
    given = {"prompt": "the tag <image>", **PAIR, **fields}
    record = good(given)
    assert (record.prompt, record.images) == (given["prompt"], ())


Q, ONE = {"prompt": [user("q")], **PAIR}, {"images": ["a.png"]}
DROPPED = [
    ("image_count", {**Q, "prompt": [turn(PART, text("q"))]}),
    ("image_count", {**Q, "prompt": [turn(PART, PART, text("q"))], **ONE}),
    ("image_count", {**Q, "prompt": [turn({**PART, "path": "b.png"}, text("q"))], **ONE}),
    ("image_count", {**Q, "prompt": [user("<image><image>")], **ONE}),
    ("image_count", {**Q, "prompt": [user("<image>")], "images": TWO}),
    ("image_count", {**Q, "prompt": [{"role": "system", "content": "q"}], **ONE}),
    ("image_count", {**Q, "prompt": [user("<|image_pad|><|image_pad|>")], **ONE}),
    ("image_count", {**Q, "prompt": [user("<image 1> and <image 1>")], "images": TWO}),
    ("image_count", {**Q, "prompt": [user("<image 1> and <image 3>")], "images": TWO}),
    ("image_count", {**Q, "prompt": [user("<image 2> and <image 1>")], "images": TWO}),
    ("image_count", {**Q, "prompt": [user("<image 1> and [IMG]")], "images": TWO}),
    ("image_count", {**Q, "prompt": [user("<image 2> and <image 3>")], "images": TWO}),
    ("invalid_unicode", {**Q, "images": ["a\udc80.png"]}),
    ("invalid_unicode", {**Q, "prompt": [turn({**PART, "path": "\ud83d.png"}, text("q"))]}),
    ("unread_column", {**Q, **ONE, "image": "b.png"}),
    (
        "image_count",
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b", **ONE},
    ),
    ("unread_column", {**Q, "chosen_images": TWO}),
    ("unread_column", {**Q, "rejected_image": "a.png", **ONE}),
    ("image_in_response", {**Q, "chosen": [turn({**PART, "path": "a.png"}, role="assistant")]}),
    ("image_in_response", {**Q, "rejected": {**assistant("bad"), "images": ["a.png"]}}),
    ("image_in_response", {**Q, "chosen": "<image>", **ONE}),
    ("image_in_response", {**Q, "prompt": [user("<image>q")], "rejected": "<image>", "images": TWO}),
    ("image_unreadable", {**Q, "images": [5]}),
    ("unread_content", {**Q, "prompt": [turn({"type": "video", "video": "a.mp4"}, text("q"))]}),
    ("unread_column", {**Q, **ONE, "videos": ["a.mp4"]}),
    ("reserved_character", {**Q, "prompt": [user(f"{I}q")]}),
    ("reserved_character", {**Q, "prompt": [user(f"{I}<image>")], **ONE}),
    ("reserved_character", {**Q, "chosen": f"good{I}"}),
    ("reserved_character", {**Q, "chosen": "good\ufdd0"}),
    ("reserved_character", {**Q, "tools": [{"name": "\ufdd0"}]}),
    ("reserved_character", {**Q, "tools": [{"name": I}]}),
]


@pytest.mark.parametrize(("reason", "fields"), DROPPED)
def test_a_record_with_too_many_or_too_few_images_or_an_image_in_a_response_is_dropped(
    reason: str, fields: Any
) -> None:
    assert bad(fields).reason == reason


def test_plain_text_has_no_place_for_images() -> None:
    assert bad({"prompt": "q", **PAIR, **ONE}, fields="text").reason == "image_count"


def test_records_that_differ_in_an_image_only_have_different_keys_and_no_image_changes_no_key() -> None:
    same = [good({**Q, "images": [image]}) for image in (b"one", b"one", b"two")]
    for key in (PreferenceRecord.prompt_key, lambda record: prompt_hash(record.prompt, record.images)):
        one, again, two = map(key, same)
        assert one == again != two
    first, second = (good({**Q, "images": images}) for images in ([b"a", b"b"], [b"b", b"a"]))
    assert prompt_hash(first.prompt, first.images) != prompt_hash(second.prompt, second.images)
    # Splits and stores of earlier runs of texts stay as they are.
    assert prompt_hash("q") == prompt_hash(good(Q).prompt, ()) == 17061056879570276798
    assert good(Q).prompt_key() == "6e0f77ecf567b978258a63e19d646a76"


# Files.


def contents_read(source: SourceConfig | str) -> list[bytes | str]:
    """Return for each record its image's content, or the detail of the reason why it cannot be read."""
    records = [record.readable() for record in read_records(source)]
    return [
        content
        for record in records
        for content in (
            [record.detail] if isinstance(record, BadRecord) else [image.read() for image in record.images]
        )
    ]


def rows(*images: Any) -> list[dict[str, Any]]:
    return [{"prompt": "q", **PAIR, "image": image} for image in images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder data/ with a picture below, beside a picture that its records must not read."""
    data = tmp_path / "data"
    (data / "pictures").mkdir(parents=True)
    (data / "pictures" / "a.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"outside")
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "inner.png").symlink_to(data / "pictures" / "a.png")
    (data / "circle.png").symlink_to(data / "circle.png")
    (data / "empty.png").write_bytes(b"")
    return data


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pictures/a.png", b"inside"),
        ("./pictures/../pictures/a.png", b"inside"),
        ("{data}/pictures/a.png", b"inside"),
        ("file://{data}/pictures/a.png", b"inside"),
        ("inner.png", b"inside"),
        (URI, b"bytes"),
        ("../secret.png", "the file secret.png is outside the folders of images"),
        ("{data}/../secret.png", "the file secret.png is outside the folders of images"),
        ("link.png", "the file link.png is outside the folders of images"),
        ("/dev/zero", "the file zero does not exist"),
        ("pictures", "the file pictures does not exist"),
        ("no.png", "the file no.png does not exist"),
        ("circle.png", "RuntimeError for its file"),
        ("a\0b", "ValueError for its file"),
        ("x" * 5000, "OSError for its file"),
        ("empty.png", "a file of 0 bytes"),
        ("https://example.com/a.png", "a URL is not fetched"),
        ("data:image/png;base64,%%", "Error for its file"),
    ],
)
def test_a_path_leads_to_a_file_below_the_folder_of_its_record(
    folder: Path, name: str, expected: Any
) -> None:
    source = jsonl(folder, *rows(name.format(data=folder)))
    assert contents_read(source) == [expected]


def test_a_file_is_read_up_to_the_limit_of_a_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_dist.data.records.MAX_RECORD_BYTES", 5)
    assert contents_read(jsonl(folder, *rows("pictures/a.png", URI))) == ["over 5 bytes", b"bytes"]


def test_images_are_looked_up_in_the_configured_folder_first(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "pictures").mkdir(parents=True)
    (root / "pictures" / "a.png").write_bytes(b"root")
    source = SourceConfig(jsonl(folder, *rows("pictures/a.png", "inner.png", "../data/inner.png")))
    assert contents_read(source) == [b"inside", b"inside", b"inside"]
    configured = replace(source, images=str(root))
    assert contents_read(configured) == [b"root", b"inside", b"inside"]
    with pytest.raises(DataError, match="does not exist"):
        read_records(replace(source, images=str(tmp_path / "no")))


def test_records_of_a_pattern_name_files_below_its_folder(folder: Path) -> None:
    below = folder / "records"
    below.mkdir()
    jsonl(below, *rows("pictures/a.png", "../pictures/a.png", "../../secret.png"))
    assert contents_read(f"{folder}/*/*.jsonl")[:2] == [b"inside", b"inside"]
    assert "outside" in str(contents_read(f"{folder}/*/*.jsonl")[2])
    assert "does not exist" in str(contents_read(str(below))[0])


def test_the_entry_of_a_dataset_info_names_images_below_its_folder(folder: Path) -> None:
    (folder / "records").mkdir()
    turns = [{"from": "human", "value": "<image>q"}]
    sides = {"good": {"from": "gpt", "value": "good"}, "bad": {"from": "gpt", "value": "bad"}}
    jsonl(folder / "records", {"turns": turns, **sides, "pictures": ["pictures/a.png"]})
    columns = {"messages": "turns", "chosen": "good", "rejected": "bad", "images": "pictures"}
    entry = {
        "file_name": "records/records.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": columns,
    }
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    assert contents_read(SourceConfig(str(folder), name="mine")) == [b"inside"]


def test_a_dataset_of_the_hub_has_its_files_in_the_hub_s_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "datasets--org--pairs"
    snapshot, blobs = cache / "snapshots" / "0", cache / "blobs"
    for below in (snapshot / "data", snapshot / "pictures", blobs):
        below.mkdir(parents=True)
    for name, place in (("pictures/a.png", snapshot), ("b.png", snapshot / "data")):
        blob = blobs / name.replace("/", "-")
        blob.write_bytes(name.encode())
        (place / name).symlink_to(blob)
    jsonl(snapshot / "data", *rows("pictures/a.png", "b.png", "../../../../data/pictures/a.png"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **_options: str(snapshot))
    first, second, outside = contents_read(SourceConfig("org/pairs", data_dir="data"))
    assert (first, second) == (b"pictures/a.png", b"b.png")
    assert "outside" in str(outside)


def described(saved: Any, folder: Path) -> list[bytes | str]:
    found = list[bytes | str]()
    folder.mkdir(exist_ok=True)
    saved.to_parquet(folder / "a.parquet")
    saved.save_to_disk(folder / "saved")
    for path in ("a.parquet", "saved"):
        found += contents_read(str(folder / path))
    return found


def test_a_column_of_images_of_datasets_is_read_as_stored(tmp_path: Path) -> None:
    jpeg = picture(kind="JPEG")
    features = {"prompt": datasets.Value("string"), "chosen": datasets.Value("string")}
    features |= {"rejected": datasets.Value("string"), "image": datasets.Image()}
    saved = datasets.Dataset.from_list(
        rows({"bytes": jpeg, "path": "a.jpg"}), features=datasets.Features(features)
    )
    assert described(saved, tmp_path) == [jpeg, jpeg]
    several = saved.rename_column("image", "images").to_list()
    features["images"] = datasets.List(features.pop("image"))
    several = [row | {"images": [row["images"], Image.new("RGB", (2, 2))]} for row in several]
    lists = datasets.Dataset.from_list(several, features=datasets.Features(features))
    first, second, *again = described(lists, tmp_path / "lists")
    assert first == jpeg
    assert str(second)[4:7] != ""
    assert again == [first, second]


SHOT = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "images": "shot.file"}
RLHF_V = {
    side: f"(text|fromjson).{column}"
    for side, column in (("prompt", "question"), *zip(PAIR, PAIR, strict=True))
}
RLHF_V["images"] = "image"
READER = """
def ranked(record):
    rating = lambda each: float(each["annotations"]["Helpfulness"]["Rating"])
    completions = [{"content": each["response"], "score": rating(each)} for each in record["completions"]]
    return {"prompt": record["prompt"], "completions": completions, "image": record["image"]}
"""


def test_columns_name_images_and_readers_return_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(folder, {"prompt": "q", **PAIR, "shot": {"file": "inner.png"}, "images": ["no.png"]})
    assert contents_read(SourceConfig(path, fields=SHOT, ignore=["images"])) == [b"inside"]
    assert contents_read(SourceConfig(path, ignore=["images"])) == []
    parts = jsonl(folder, {**Q, "prompt": [turn(PART, text("q"))], **ONE})
    [dropped] = read_records(SourceConfig(parts, ignore=["images"]))
    assert isinstance(dropped, BadRecord)
    assert dropped.reason == "image_count"
    # RLHF-V has the texts in a column, as JSON.
    rlhf_v = jsonl(folder, {"text": json.dumps({"question": "q", **PAIR}), "image": {"path": "inner.png"}})
    assert contents_read(SourceConfig(rlhf_v, fields=RLHF_V)) == [b"inside"]
    # VLFeedback rates its responses inside of objects.
    (tmp_path / "own_readers.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    rated = [
        {"model": name, "response": name, "annotations": {"Helpfulness": {"Rating": rating}}}
        for name, rating in (("worst", "1"), ("best", "5"), ("fair", "3"))
    ]
    saved = datasets.Dataset.from_list(
        [{"prompt": "q", "completions": rated, "image": {"bytes": b"jpeg", "path": "a.jpg"}}]
    )
    saved.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rated.parquet")
    [record] = read_records(SourceConfig(str(tmp_path / "rated.parquet"), reader="own_readers:ranked"))
    assert isinstance(record, PreferenceRecord)
    assert (record.responses, names(record)) == (("best", "fair", "worst"), [b"jpeg"])


def test_a_table_names_images(folder: Path) -> None:
    (folder / "pairs.csv").write_text(
        'prompt,chosen,rejected,images\nq,good,bad,inner.png\nr,good,bad,\ns,good,bad,"[""inner.png""]"\n'
    )
    assert contents_read(str(folder / "pairs.csv")) == [b"inside"] * 2


def test_records_in_memory_keep_the_pixels_of_their_images(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    image, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    records = [
        {"prompt": "q", **PAIR, "images": [image, grey, image]},
        {"prompt": [turn({**PART, "image": image}, text("q"))], **PAIR},
        {"prompt": "q", **PAIR, "images": [{"bytes": picture(), "path": None}]},
        {"prompt": "q", **PAIR, "images": Image.new("CMYK", (2, 2))},
    ]
    file = write_records(records, tmp_path, "data.train")
    written = {image: image.stat().st_mtime_ns for image in (tmp_path / "images").iterdir()}
    assert write_records(records, tmp_path, "data.train") == file
    assert {image: image.stat().st_mtime_ns for image in (tmp_path / "images").iterdir()} == written
    assert len(written) == 4  # each once
    first, second, third, again, stored, cmyk = contents_read(str(file))
    assert first == third == again
    assert stored == picture()
    for content, expected in ((first, image), (second, grey), (cmyk, Image.new("RGB", (2, 2), "white"))):
        assert isinstance(content, bytes)
        found = Image.open(io.BytesIO(content))
        assert (found.mode, found.tobytes()) == (expected.mode, expected.tobytes())
    broken = Image.open(io.BytesIO(picture()[:-22]))
    for value in (object(), broken):
        assert bad({"prompt": "q", **PAIR, "image": value}).reason == "image_unreadable"
        with pytest.raises(ConfigError, match="cannot be written"):
            write_records([{"prompt": "q", **PAIR, "image": value}], tmp_path, "data.train")


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_dataset_in_memory_brings_the_files_that_its_images_name(is_stream: bool, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    records = [{"prompt": "q", **PAIR, "images": [str(tmp_path / "a.png")]}]
    dataset = datasets.Dataset.from_list(records).cast_column("images", datasets.List(datasets.Image()))
    given = dataset.to_iterable_dataset() if is_stream else dataset
    assert contents_read(str(write_records(given, tmp_path / "cache", "data.train"))) == [picture()]


def test_the_folder_of_images_is_no_part_of_a_run_s_identity() -> None:
    words = ["model.path=m", "data.eval=[b.jsonl]", "model.images.train=none"]
    moved_to = "data.train=[{path: a.jsonl, images: pictures}]"
    plain, moved = (load_run_config([*words, train]) for train in ("data.train=[a.jsonl]", moved_to))
    assert plain.identity.digest == moved.identity.digest
    assert [source.images for source in (*moved.data.train, *moved.data.eval)] == ["pictures", None]
    with pytest.raises(ConfigError, match="no effect"):
        load_run_config(["model.path=m", moved_to])
