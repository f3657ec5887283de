"""Images in prompts: placeholders as the model's own processor writes them, truncation, and bad files."""

import io
import json
import pickle
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, ProcessorMixin
from transformers.image_utils import load_image
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.data.config import DataConfig
from dpo_dist.data.counts import reason_remedy
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.images import ImageProcessor, decode_image
from dpo_dist.data.read.images import as_file
from dpo_dist.data.records import IMAGE, BadRecord, UnusableRecordError
from dpo_dist.foundation.errors import ConfigError
from tests.support.image_processors import (
    IMAGE_PROCESSORS,
    TEMPLATE,
    file_of,
    image_record,
    image_tokenizer,
    picture,
    processor_of,
    write_processor,
)
from tests.support.tiny import with_template

WIDE = DataConfig(max_length=100_000)
FIRST, SECOND = (file_of(picture(seed, *size)) for seed, size in ((1, (60, 45)), (2, (120, 60))))
SHOWN = {
    "one": (["Look # here."], [FIRST]),
    "alone": (["#"], [FIRST]),
    "several": (["First # then #\n\n#"], [FIRST, SECOND, FIRST]),
    "turns": (["# What?", "A dog.", "\n\nAnd # ?"], [SECOND, FIRST]),
    "none": (["What?"], []),
}


def encoded(record: Any, kind: str, processor: ImageProcessor, config: DataConfig = WIDE) -> EncodedExample:
    example = encode_pair(record, config, image_tokenizer(kind), processor)
    assert isinstance(example, EncodedExample), example
    return example


def own_processor(folder: Path, kind: str) -> Any:
    """The processor of transformers, which has no video processor here."""
    name = PROCESSOR_MAPPING_NAMES[kind]
    files = [module for path, module in [*sys.modules.items()] if "transformers.models." in path]
    own = next(
        vars(module)[name] for module in files if ".processing_" in module.__name__ and name in vars(module)
    )
    parameters = own.get_processor_dict(folder)[0]
    parts = {"tokenizer": image_tokenizer(kind)}
    parts["image_processor"] = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", return_value=object):
        return own.from_args_and_dict([parts.get(part) for part in own.get_attributes()], parameters)


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_prompts_and_inputs_are_those_of_the_models_own_processor(kind: str, tmp_path: Path) -> None:
    processor, tokenizer = processor_of(tmp_path, kind), image_tokenizer(kind)
    own = own_processor(tmp_path, kind)
    for contents, images in SHOWN.values():
        record = image_record(*contents, images=images)
        turns = []
        for turn in record.prompt:
            texts = turn.content.split(IMAGE)
            parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})][
                1:
            ]
            turns.append({"role": turn.role, "content": parts})
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        pictures = [decode_image(image) for image in images] or None
        expected = own(text=[rendered], images=pictures, return_tensors="pt")
        example = encoded(record, kind, processor)
        assert example.prompt_ids.tolist() == expected["input_ids"][0].tolist()
        assert len(example.images) == len(images)
        placeholders = np.count_nonzero(example.prompt_ids == processor.placeholder_id)
        assert placeholders == sum(image.tokens for image in example.images)
        for image in {*images}:
            alone = own(text=[own.image_token], images=[decode_image(image)], return_tensors="pt")
            inputs = processor.inputs(image)
            assert {"pixel_values"} <= set(inputs) <= set(alone)
            assert all(torch.equal(value, alone[name]) for name, value in inputs.items())


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_a_spelled_token_of_images_stays_text(kind: str, tmp_path: Path) -> None:
    processor, tokenizer = processor_of(tmp_path, kind), image_tokenizer(kind)
    names = {processor.token, tokenizer.convert_ids_to_tokens(processor.placeholder_id), "<image>", "[IMG]"}
    spelled = " and ".join(sorted(names))
    for contents, in_prompt, images in (
        (f"# is {spelled} #", spelled, [FIRST, SECOND]),
        ("# is", "", [FIRST]),
        ("What?", "", []),
    ):
        sides = (f"It is {spelled}.", "No.")
        example = encoded(image_record(contents, images=images, responses=sides), kind, processor)
        assert "image_tag_in_text" in example.changes
        placeholders = np.count_nonzero(example.prompt_ids == processor.placeholder_id)
        assert placeholders == sum(image.tokens for image in example.images)
        assert in_prompt in tokenizer.decode(example.prompt_ids)
        assert spelled in tokenizer.decode(example.responses[0])
        assert processor.placeholder_id not in example.responses[0]


TAGS = ["<image>", "<|image_1|>", "<image 1>", "<img>pictures/0.png</img>", "<start_of_image>"]
TAGS += ["<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|image_pad|>"]
TAGS += ["<|own|>"]


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_of_images_without_an_image_is_not_trained_as_text(tag: str, tmp_path: Path) -> None:
    processor, tokenizer = processor_of(tmp_path, "qwen2_vl"), image_tokenizer("qwen2_vl")
    processor.tokens.add("<|own|>")  # of a model that no other program writes for
    record = replace(image_record("First.", "Yes.", f"{tag}\nWhat?", images=[]), unread=("image_path",))
    dropped = encode_pair(record, WIDE, tokenizer, processor)
    assert (dropped.reason, dropped.unread) == ("image_count", ("image_path",))
    plain = replace(record, prompt=f"{tag}\nWhat?")
    assert encode_pair(plain, WIDE, tokenizer, processor).reason == "image_count"
    assert isinstance(encode_pair(plain, WIDE, tokenizer), EncodedExample), "the model reads no images"
    for text in (
        "the images of <a>",
        "[IMG]a.png[/IMG]",
        "<img src='a.png'>",
        "an <image-set> of <10 images>",
    ):
        example = encoded(image_record(text, images=[], responses=(text, "no")), "qwen2_vl", processor)
        assert "image_tag_in_text" not in example.changes


def test_records_that_differ_in_the_image_only_have_other_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = processor_of(tmp_path, "gemma3")
    other = processor_of(tmp_path, "gemma3", max_pixels=100)
    monkeypatch.setattr("dpo_dist.data.images.DECODING_VERSION", 0)
    earlier = processor_of(tmp_path, "gemma3")
    same = [encoded(image_record("#", images=[FIRST]), "gemma3", processor) for _ in range(2)]
    differing = [
        *same[:1],
        encoded(image_record("#", images=[SECOND]), "gemma3", processor),
        encoded(image_record("#", images=[FIRST]), "gemma3", other),
        encoded(image_record("#", images=[FIRST]), "gemma3", earlier),
    ]
    assert len({tuple(example.prompt_ids) for example in differing}) == 1
    assert len({response_keys([example]).tobytes() for example in differing}) == 4
    assert len({response_keys([example]).tobytes() for example in same}) == 1


def test_larger_images_are_made_smaller(tmp_path: Path) -> None:
    large = file_of(picture(3, 300, 200))
    tokens = []
    for most in (None, 30_000, 5_000):
        processor = processor_of(
            tmp_path, "qwen2_vl", most, size={"shortest_edge": 784, "longest_edge": 10**6}
        )
        tokens.append(encoded(image_record("#", images=[large]), "qwen2_vl", processor).images[0].tokens)
    assert tokens[0] > tokens[1] > tokens[2]
    for most in (1, 7, 5_000, 15_000, 59_999, 60_000):
        width, height = decode_image(large, most).size
        assert width * height <= most
        assert (width + 1) * (height + 1) > most  # no pixel is left out without need
    assert decode_image(large, 60_000).size == (300, 200)


def test_a_processor_can_be_sent_to_processes_that_encode(tmp_path: Path) -> None:
    processor = processor_of(tmp_path, "mistral3")
    copy = pickle.loads(pickle.dumps(processor))
    record = image_record("#", images=[SECOND])
    mine, theirs = (encoded(record, "mistral3", each) for each in (processor, copy))
    assert mine.prompt_ids.tolist() == theirs.prompt_ids.tolist()
    assert response_keys([mine]).tobytes() == response_keys([theirs]).tobytes()


ONLY_TEXT = "{% for message in messages %}<|im_start|>{{ message['content'] | string }}<|im_end|>{% endfor %}"
TWICE = TEMPLATE.replace("PLACE", "{% if loop.length > 1 %}<|image_pad|>{% endif %}<|image_pad|>")


def test_templates_must_write_each_image_once(tmp_path: Path) -> None:
    processor = processor_of(tmp_path, "qwen2_vl")
    record = image_record("Look # here", images=[FIRST])
    for template in (ONLY_TEXT, TEMPLATE.replace("PLACE", ""), TEMPLATE.replace("PLACE", "<image>")):
        tokenizer = with_template(image_tokenizer("qwen2_vl"), template)
        with pytest.raises(ConfigError, match="the chat template has no place for images"):
            encode_pair(record, WIDE, tokenizer, processor)
    tokenizer = with_template(image_tokenizer("qwen2_vl"), TWICE)
    assert encode_pair(record, WIDE, tokenizer, processor).reason == "image_count"


def test_records_with_images_that_cannot_be_placed_are_dropped(tmp_path: Path) -> None:
    kind, processor = "qwen2_vl", processor_of(tmp_path, "qwen2_vl")
    tokenizer = image_tokenizer(kind)
    whole = image_record("#", images=[FIRST])
    assert encode_pair(whole, WIDE, tokenizer).reason == "media_not_read"
    for record in (
        image_record("# #", images=[FIRST]),
        image_record("#", images=[FIRST], responses=(f"a {IMAGE}", "b")),
        image_record(f"a {IMAGE}", images=[]),
    ):
        assert encode_pair(record, WIDE, tokenizer, processor).reason == "image_count"


def test_prompts_with_several_images_are_dropped_if_the_model_cuts_only_a_single_one_into_tiles(
    tmp_path: Path,
) -> None:
    config, tokenizer = AutoConfig.for_model("llava_onevision"), image_tokenizer("llava")
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.save_pretrained(tmp_path)
    sizes = {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": [[28, 56], [56, 28]]}
    own = {"image_processor_type": "LlavaOnevisionImageProcessor"} | sizes
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    (tmp_path / "processor_config.json").write_text('{"num_image_tokens": 4}')
    processor = ImageProcessor(tmp_path, tokenizer)
    encoded(image_record("#", images=[FIRST]), "llava", processor)
    several = encode_pair(image_record("# #", images=[FIRST, FIRST]), WIDE, tokenizer, processor)
    assert several.why == "several_images (2 images; this model reads one in a prompt)"


@pytest.mark.parametrize("truncation", ["drop", "keep_start", "keep_end", "both"])
def test_images_are_never_cut(truncation: str, tmp_path: Path) -> None:
    kind, processor = "qwen2_vl", processor_of(tmp_path, "qwen2_vl")
    record = image_record(
        "Earlier words. # And later words.", images=[FIRST], responses=("Yes, it is.", "No")
    )
    whole = encoded(record, kind, processor)
    ids = whole.prompt_ids.tolist()
    start = ids.index(processor.placeholder_id) - 1  # of the token that begins an image
    longest, needed = max(map(len, whole.responses)), len(ids) - start
    seen = set()
    for length in range(2, len(ids) + longest + 2):
        for most in (None, needed - 1, needed, needed + 1, len(ids)):
            config = DataConfig(max_length=length, max_prompt_length=most, truncation=truncation)
            example = encode_pair(record, config, image_tokenizer(kind), processor)
            if isinstance(example, BadRecord):
                assert example.tokens == len(ids) + longest
                seen.add(example.reason)
                if example.reason == "image_does_not_fit":
                    assert min(most or length, length) < needed or truncation in ("keep_end", "both"), config
                continue
            kept = example.prompt_ids.tolist()
            assert kept == ids[-len(kept) :]
            assert len(kept) >= needed
            assert len(kept) + max(map(len, example.responses)) <= length
            seen.add("cut" if len(kept) < len(ids) else "whole")
    expected = {"whole", "cut", "image_does_not_fit"}
    assert expected <= seen
    assert "max_pixels" in reason_remedy("image_does_not_fit")


def test_a_response_is_cut_though_an_image_stands_directly_after_bos(tmp_path: Path) -> None:
    processor, tokenizer = processor_of(tmp_path, "qwen2_vl"), image_tokenizer("qwen2_vl")
    tokenizer.bos_token = "<|im_start|>"
    parts = "{{ p.text if p.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}"
    tokenizer.chat_template = (
        "<|im_start|>{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}" + parts + "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    )
    record = image_record("# is what?", images=[FIRST], responses=("Yes, it is.", "No"))
    whole = encode_pair(record, WIDE, tokenizer, processor)
    config = DataConfig(max_length=len(whole.prompt_ids) + 2, truncation="keep_start")
    found = encode_pair(record, config, tokenizer, processor)
    assert [*map(len, (found.prompt_ids, *found.responses))] == [len(whole.prompt_ids), 2, 2]


def png(
    width: int, height: int, rows: bytes = b"", bits: int = 8, colour: int = 2, key: Sequence[int] = ()
) -> bytes:
    """A PNG of a few bytes that claims to be this large; `key` is its transparent colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    transparent = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparent + pixels + chunk(b"IEND", b"")


def gif(*frames: Image.Image) -> bytes:
    return file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return file_of(picture(4, 40, 20), "JPEG", exif=tags)


SMALL = picture(5, 40, 30)
JPEG, WEBP, TIFF = (file_of(SMALL, kind) for kind in ("JPEG", "WEBP", "TIFF"))
PROGRESSIVE = file_of(SMALL, "JPEG", progressive=True)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
WIDE_LINE = picture(6, 2000, 2)
GOOD = {
    "png": FIRST,
    "jpeg": JPEG,
    "webp": WEBP,
    "gif": gif(SMALL.convert("P")),
    "animated gif": gif(SMALL.convert("P"), picture(7, 40, 30).convert("P")),
    "bmp": file_of(SMALL, "BMP"),
    "tiff": TIFF,
    "cmyk": file_of(SMALL.convert("CMYK"), "JPEG"),
    "grey": file_of(SMALL.convert("L")),
    "rgba": file_of(SMALL.convert("RGBA")),
    "palette": file_of(SMALL.convert("P")),
    "one bit": file_of(SMALL.convert("1")),
    "ycbcr": file_of(SMALL.convert("YCbCr"), "JPEG"),
    "lab": file_of(SMALL.convert("LAB"), "TIFF"),
    "thin": file_of(picture(6, 199, 1)),
    "progressive jpeg": PROGRESSIVE,
    # Marks of scans that are none: in a comment, and in what a telephone appends (a film).
    "jpeg with a comment": PROGRESSIVE[:2] + b"\xff\xfe\x02\x02" + b"\xff\xda" * 256 + PROGRESSIVE[2:],
    "jpeg with a film": PROGRESSIVE + b"\xff\xda" * 3000,
    **{f"turned {orientation}": exif(orientation) for orientation in range(1, 9)},
}


def with_scans(jpeg: bytes, number: int) -> bytes:
    """Repeat the last scan of a JPEG file."""
    end = jpeg.rindex(b"\xff\xd9")
    return jpeg[:end] + jpeg[jpeg.rindex(b"\xff\xda") : end] * number + jpeg[end:]


BAD = {
    "nothing": (b"", "image_unreadable"),
    "one byte": (b"x", "image_unreadable"),
    "zeros": (bytes(1000), "image_unreadable"),
    "svg": (SVG, "image_unreadable"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "image_unreadable"),
    "json": (b'{"error": "not found"}', "image_unreadable"),
    "pdf": (b"%PDF-1.7\n%", "image_unreadable"),
    "pickle": (pickle.dumps([1]), "image_unreadable"),
    "another format": (file_of(SMALL, "ICO"), "image_unreadable"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_unreadable"),
    "png signature": (FIRST[:8], "image_unreadable"),
    "png header": (FIRST[:40], "image_unreadable"),
    "half a png": (FIRST[: len(FIRST) // 2], "image_unreadable"),
    "most of a png": (FIRST[:-30], "image_unreadable"),
    "damaged png": (FIRST[:200] + b"????" + FIRST[204:], "image_unreadable"),
    "png without pixels": (png(10, 10), "image_unreadable"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "image_unreadable"),
    "jpeg without its end": (JPEG[:-50], "image_unreadable"),
    "jpeg header": (JPEG[:20], "image_unreadable"),
    "half a webp": (WEBP[: len(WEBP) // 2], "image_unreadable"),
    "half a gif": (GOOD["gif"][: len(GOOD["gif"]) // 2], "image_unreadable"),
    "half a bmp": (GOOD["bmp"][: len(GOOD["bmp"]) // 2], "image_unreadable"),
    "half a tiff": (TIFF[: len(TIFF) // 2], "image_unreadable"),
    "float": (file_of(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "image_unreadable"),
    "32 bit": (file_of(Image.fromarray(np.ones((9, 9), np.int32)), "TIFF"), "image_unreadable"),
    "bomb": (png(10_000, 10_000), "image_too_large"),
    "large bomb": (png(60_000, 60_000), "image_too_large"),
    "largest bomb": (png(2**31 - 1, 2**31 - 1), "image_too_large"),
    "long": (png(20_000, 20), "image_too_large"),
    "longest": (png(2**31 - 1, 1), "image_too_large"),
    "line": (file_of(WIDE_LINE), "image_too_large"),
    "jpeg of many scans": (with_scans(PROGRESSIVE, 3000), "image_unreadable"),
    "jpeg of many scans behind a comment": (
        with_scans(PROGRESSIVE[:2] + b"\xff\xfe\x00\x04\xff\xd9" + PROGRESSIVE[2:], 3000),
        "image_unreadable",
    ),
    "no width": (png(0, 10), "image_unreadable"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_images_are_decoded_as_transformers_does(name: str, tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(GOOD[name])
    found = decode_image(GOOD[name])
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(load_image(str(file))))


DRAWING = Image.new("RGBA", (40, 30))
DRAWING.paste((0, 0, 0, 255), (5, 5, 20, 20))
DRAWING.paste((200, 40, 40, 255), (20, 10, 30, 25))
GREY = DRAWING.convert("LA")
FADED = DRAWING.copy()
FADED.putalpha(DRAWING.getchannel("A").point([value // 2 for value in range(256)]))


def on_colour(drawing: Image.Image, colour: Any) -> Image.Image:
    """A drawing without alpha, whose ground has a colour that it has nowhere else."""
    ground = Image.new("RGB", drawing.size, colour)
    ground.paste(drawing.convert("RGB"), mask=drawing.getchannel("A"))
    return ground


def palette_with_alpha(drawing: Image.Image) -> Image.Image:
    image = drawing.convert("RGB").quantize(8)
    image.putalpha(drawing.getchannel("A"))
    return image


def tagged(name: str) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 3
    return file_of(DRAWING.rotate(180), name, exif=tags, **({"lossless": True} if name == "WEBP" else {}))


DRAWN = {
    "RGBA": (DRAWING, file_of(DRAWING)),
    "optimized": (DRAWING, file_of(DRAWING, optimize=True)),
    "TIFF": (DRAWING, file_of(DRAWING, "TIFF", compression="tiff_lzw")),
    "WebP": (DRAWING, file_of(DRAWING, "WEBP", lossless=True)),
    "animated WebP": (DRAWING, file_of(DRAWING, "WEBP", lossless=True, save_all=True, append_images=[FADED])),
    "animated PNG": (DRAWING, file_of(DRAWING, save_all=True, append_images=[FADED])),
    "GIF": (DRAWING, file_of(DRAWING, "GIF")),
    "animated GIF": (DRAWING, file_of(DRAWING, "GIF", save_all=True, append_images=[FADED])),
    "palette": (DRAWING, file_of(DRAWING.quantize(8))),
    "palette with alpha": (DRAWING, file_of(palette_with_alpha(DRAWING), "TIFF")),
    "colour as key": (DRAWING, file_of(on_colour(DRAWING, (1, 2, 3)), transparency=(1, 2, 3))),
    "turned PNG": (DRAWING, tagged("PNG")),
    "turned WebP": (DRAWING, tagged("WEBP")),
    "grey with alpha": (GREY, file_of(GREY)),
    "grey as key": (GREY, file_of(on_colour(GREY, (9, 9, 9)).convert("L"), transparency=9)),
    "half": (FADED, file_of(FADED)),
    "palette with half": (FADED, file_of(FADED.quantize(8))),
    "memory": (DRAWING, as_file(DRAWING)),
    "memory, palette with alpha": (DRAWING, as_file(palette_with_alpha(DRAWING))),
    "memory, premultiplied": (DRAWING, as_file(DRAWING.convert("RGBa"))),
    "memory, GIF": (DRAWING, as_file(Image.open(io.BytesIO(file_of(DRAWING, "GIF"))))),
}


@pytest.mark.parametrize("name", DRAWN)
def test_transparent_parts_are_white_however_a_drawing_is_saved(name: str) -> None:
    drawing, content = DRAWN[name]
    white = Image.new("RGBA", drawing.size, "white")
    expected = np.asarray(Image.alpha_composite(white, drawing.convert("RGBA")).convert("RGB"))
    found = np.asarray(decode_image(content))
    assert expected.min() == (128 if drawing is FADED else 0)
    np.testing.assert_array_equal(found, expected)


# A row of four pixels: black, the transparent colour, and others.
KEYED: list[tuple[int, int, bytes, list[int], list[int]]] = [
    (1, 0, bytes([0b01010000]), [1], [0, 255, 0, 255]),
    (1, 0, bytes([0b01010000]), [0], [255, 255, 255, 255]),
    (8, 0, bytes([0, 5, 6, 255]), [5], [0, 255, 6, 255]),
    (8, 2, bytes([0, 0, 0, 5, 5, 5, 6, 6, 6, 5, 5, 5]), [5] * 3, [0, 255, 6, 255]),
]


@pytest.mark.parametrize(("bits", "colour", "row", "key", "expected"), KEYED)
def test_a_transparent_colour_is_that_of_the_file(
    bits: int, colour: int, row: bytes, key: list[int], expected: list[int]
) -> None:
    found = np.asarray(decode_image(png(4, 1, b"\0" + row, bits, colour, key)))
    assert found[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize(("bits", "colour"), [(2, 0), (4, 0), (16, 2)])
def test_a_transparent_colour_of_another_depth_is_not_read(bits: int, colour: int) -> None:
    row = bytes(4 * bits * (3 if colour else 1) // 8)
    with pytest.raises(UnusableRecordError) as raised:
        decode_image(png(4, 1, b"\0" + row, bits, colour, [1] * (3 if colour else 1)))
    assert (raised.value.reason, raised.value.detail) == (
        "image_unreadable",
        f"a transparent colour of {bits} bits",
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_pixels_of_16_bits_are_refused(kind: str) -> None:
    values = np.linspace(0, 65535, 81).astype(np.uint16).reshape(9, 9)
    with pytest.raises(UnusableRecordError, match="image_unreadable"):
        decode_image(file_of(Image.fromarray(values), kind))


@pytest.mark.parametrize("name", BAD)
def test_bad_images_have_a_reason(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    content, reason = BAD[name]
    with pytest.raises(UnusableRecordError) as fault:
        decode_image(content)
    assert fault.value.reason == reason
    assert fault.value.detail
    assert not recwarn.list


def test_one_pixel_and_a_small_image_are_read_or_refused_by_each_processor(tmp_path: Path) -> None:
    for kind in IMAGE_PROCESSORS:
        processor = processor_of(tmp_path / kind, kind)
        for size in ((1, 1), (1, 30), (30, 1), (2, 190)):
            record = image_record("#", images=[file_of(picture(1, *size))])
            found = encode_pair(record, WIDE, image_tokenizer(kind), processor)
            assert getattr(found, "reason", "image_unreadable") == "image_unreadable"


def test_folders_without_a_usable_processor_are_refused(tmp_path: Path) -> None:
    def refusal(kind: str, tokenizer_of: str = "qwen2_vl", **files: str | None) -> str:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        if kind in IMAGE_PROCESSORS:
            write_processor(folder, kind)
        else:
            AutoConfig.for_model(kind).save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text("{}")
        for name, text in files.items():
            file = folder / f"{name}.json"
            file.unlink() if text is None else file.write_text(text)
        with pytest.raises(ConfigError) as fault:
            ImageProcessor(folder, image_tokenizer(tokenizer_of))
        assert fault.value.where == "model.images"
        return fault.value.got

    assert "no image processor" in refusal("qwen2_vl", preprocessor_config=None, processor_config=None)
    assert "mllama" in refusal("mllama")
    assert "sound" in refusal("qwen2_5_omni")
    assert "t5gemma2" in refusal("t5gemma2")
    assert "llama4 has no version for Pillow" in refusal(
        "llama4", preprocessor_config='{"image_processor_type": "Llama4ImageProcessorFast"}'
    )
    assert "no image processor" in refusal("llama")
    assert "no image processor" in refusal("qwen2_vl", processor_config="{")
    assert "no image processor" in refusal("qwen2_vl", config='{"model_type": "none"}')
    own_code = {"auto_map": {"AutoImageProcessor": "own.Processor"}}
    assert "custom code" in refusal("llama", preprocessor_config=json.dumps(own_code))
    size = {"height": 10**12, "width": 10**12}
    own_size = {"image_processor_type": "Gemma3ImageProcessor", "size": size}
    assert "no image processor" in refusal("gemma3", "gemma3", preprocessor_config=json.dumps(own_size))
    assert "'[IMG]'" in refusal("mistral3", processor_config='{"image_token": "[PICTURE]"}').replace(
        "PICTURE", "IMG"
    )
