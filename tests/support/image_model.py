"""A small model that reads images, with its tokenizer and image processor; pairs about pictures."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoConfig

from tests.support.image_processors import image_tokenizer, write_processor
from tests.support.invented_images import READERS
from tests.support.multimodal import whole_model

KIND = "qwen2_5_vl"
QUESTION = "What is it?"


def write_image_model(folder: Path, seed: int = 1) -> Path:
    """Write a Qwen2.5-VL with random weights that are large enough to see."""
    tokenizer, made = image_tokenizer(KIND), READERS[KIND]
    write_processor(folder, KIND)
    places = {f"{name}_token_id": f"<|{name}_pad|>" for name in ("image", "video")}
    places |= {f"vision_{side}_token_id": f"<|vision_{side}|>" for side in ("start", "end")}
    text = made.text | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in places.items()}
    config = AutoConfig.for_model(KIND, text_config=text, vision_config=made.vision, **made.options | ids)
    whole_model(config, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_pictures(folder: Path, colours: tuple[str, ...] = ("red", "green", "blue")) -> Path:
    """Write pictures of one colour each, and a file of pairs about them that differ in the picture only."""
    records = []
    for colour in colours:
        Image.new("RGB", (60, 50), colour).save(folder / f"{colour} one.png")
        records.append(image_pair(f"{colour} one.png", f"It is {colour}.", "No."))
    file = folder / "pictures.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def image_pair(image: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A pair about an image."""
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return {
        "images": [image],
        "prompt": [{"role": "user", "content": parts}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
