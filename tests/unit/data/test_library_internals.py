"""The parts of transformers that it does not document do here what reading texts and images relies on."""

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoImageProcessor

from dpo_dist.data.library_internals import make_processor, processor_class, with_backend
from tests.support.image_processors import IMAGE_PROCESSORS, image_tokenizer, write_processor
from tests.support.tiny import qwen


def test_a_copy_of_a_tokenizer_encodes_as_described() -> None:
    tokenizer = qwen()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["normalizer"] = {"type": "Lowercase"}
    changed = with_backend(tokenizer, json.dumps(described))
    assert changed("SEA")["input_ids"] == tokenizer("sea")["input_ids"] != tokenizer("SEA")["input_ids"]


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_a_processor_is_made_without_torchvision(kind: str, tmp_path: Path) -> None:
    assert importlib.util.find_spec("torchvision") is None, "the test would show nothing"
    write_processor(tmp_path, kind)
    chosen = processor_class(tmp_path, kind)
    image_processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    parts = {"image_processor": image_processor, "tokenizer": image_tokenizer(kind)}
    processor = make_processor(tmp_path, chosen, parts)
    assert isinstance(processor, chosen)
    assert processor.image_processor is image_processor
    assert processor.image_token in image_tokenizer(kind).get_added_vocab()


def test_an_unknown_model_has_no_processor(tmp_path: Path) -> None:
    assert processor_class(tmp_path, "invented") is None
