"""The doctor's findings about pairs with images."""

import json
from pathlib import Path

import pytest

from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.images import ImageProcessor
from dpo_dist.tools.doctor.examine import examine
from dpo_dist.tools.doctor.shown_pairs import show_pairs
from tests.support.image_processors import file_of, image_tokenizer, picture, processor_of

QUESTION = "Which colour has the large square in the middle of this picture, if you look at it again?"


def pairs(folder: Path, *images: str) -> DataConfig:
    """Pairs that differ in the image, and in one word of the responses."""
    rows = [
        {"prompt": [{"role": "user", "content": QUESTION}], "images": [image]}
        | {
            side: [{"role": "assistant", "content": f"The large square is {side}."}]
            for side in ("chosen", "rejected")
        }
        for image in images
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train=[SourceConfig(str(folder / "pairs.jsonl"))])


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    return processor_of(tmp_path_factory.mktemp("model"), "gemma3")


def test_pairs_are_copies_only_with_the_same_image(tmp_path: Path, processor: ImageProcessor) -> None:
    for number, seed in enumerate((1, 2, 3, 3)):
        (tmp_path / f"{number}.png").write_bytes(file_of(picture(seed)))
    (tmp_path / "4.png").write_text("<svg/>")
    tokenizer = image_tokenizer("gemma3")
    differing = pairs(tmp_path, "0.png", "1.png", "2.png")
    rules = {finding.rule for finding in examine(differing, tokenizer, processor=processor).findings}
    assert rules.isdisjoint({"duplicates", "near_duplicates", "contradictions", "broken_text"}), rules
    equal = pairs(tmp_path, "2.png", "3.png", "4.png")
    report = examine(equal, tokenizer, processor=processor)
    assert "duplicates" in {finding.rule for finding in report.findings}
    assert list(report.sources[0]["dropped"]) == ["image_unreadable"]
    [one, *_] = show_pairs(equal, tokenizer, [], 1, processor)
    assert one.note == ""
