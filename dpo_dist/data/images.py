"""Images of prompts: decoded within bounds, and processed as the model's own processor does."""

import copy
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_dist.data.example import ImageInput
from dpo_dist.data.library_internals import make_processor, processor_class
from dpo_dist.data.records import UnusableRecordError
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.foundation.types import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

# Increase it when the same file gets other pixels: else stored log-probs of the former ones would be reused.
DECODING_VERSION = 2
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MOST_PIXELS = 80_000_000  # more than any camera's; Pillow itself warns above 89 million
_MOST_TIMES_LONGER = 200  # than the shorter side: processors would scale the shorter side up
_MOST_SCANS = 100  # as libtiff allows; encoders write about ten, and each goes over the whole image
# Of a JPEG's file: neither the escape of a byte 255 in a scan nor the marks between its parts.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_START_OF_JPEG = b"\xff\xd8"
_START_OF_SCAN = b"\xff\xda"
_END_OF_IMAGE = b"\xff\xd9"
_CACHED_FILES = 64
_CACHED_INPUTS = 16  # those of a large image take 20 MB
_INVENTED_SIZES = (112, 84), (56, 140)
# Outputs of processors that belong to the text, not to the image.
_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets"}


@dataclass(frozen=True, eq=False)
class ExpandedImage(ImageInput):
    """An image with its file, and the text that stands for it in a prompt: placeholders and other tokens."""

    text: str = ""
    content: bytes = b""


class ImageProcessor:
    """The image processor of a model folder; images above `max_pixels` are made smaller.

    `token` is the text that a chat template writes for an image, `placeholder_id` the token that the model
    replaces by a feature of an image, `tokens` the texts of both; `settings` is a digest of everything that
    decides the pixels and tokens; `invented` are small images of random pixels, in different sizes, for the
    check at start and for ranks without an image. `reads_several`: an image has the same pixels and tokens
    whatever other images are in its prompt.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, max_pixels: int | None = None):
        """Raises ConfigError: the folder has no image processor, or none that needs no torchvision."""
        self._arguments = (folder, tokenizer, max_pixels)
        self._max_pixels = max_pixels
        try:
            self._processor, self.placeholder_id = _with_pillow(folder, tokenizer)
            self.token = str(self._processor.image_token)
            self.tokens = {self.token, str(tokenizer.convert_ids_to_tokens(self.placeholder_id))}
            # LLaVA-OneVision cuts an image into tiles only if it is the only one of its prompt.
            self.reads_several = "batch_num_images" not in self._processor.image_processor.model_input_names
            self.invented = tuple(self._invent())
        except ConfigError:
            raise
        except Exception as error:  # files that others wrote can raise anything
            raise _refused(folder, f"no image processor can be made: {first_line(error)}") from error
        versions = [_pillow().__version__, version("transformers")]  # their code decides pixels
        settings = [self._processor.to_json_string(), max_pixels, DECODING_VERSION, *versions]
        self.settings = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).digest()
        self.expanded = lru_cache(maxsize=_CACHED_FILES)(self._expanded)
        self.inputs = lru_cache(maxsize=_CACHED_INPUTS)(self._inputs)
        if not self.invented[0].tokens:
            raise _refused(folder, "its processor writes no placeholders of an image into the prompt")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # the processor's own class is made here and cannot be pickled

    def _expanded(self, content: bytes) -> ExpandedImage:
        """Return the image of a file, without inputs. Raises UnusableRecordError."""
        text, _ = self._read(content)
        digest = hashlib.blake2b(self.settings + content, digest_size=16).digest()
        return ExpandedImage(digest, self._tokens(text), self.placeholder_id, text=text, content=content)

    def _inputs(self, content: bytes) -> dict[str, Any]:
        """Return the tensors that the model's tower reads, of the image in a file. Thread-safe."""
        return self._read(content)[1]

    def _invent(self) -> Iterator[ImageInput]:
        random = np.random.default_rng(0)
        for number, (width, height) in enumerate(_INVENTED_SIZES):
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            text, inputs = self._process(_pillow().fromarray(pixels))
            yield ImageInput(bytes([number]) * 16, self._tokens(text), self.placeholder_id, inputs)

    def _tokens(self, text: str) -> int:
        _, tokenizer, _ = self._arguments
        return text.count(tokenizer.convert_ids_to_tokens(self.placeholder_id))

    def _read(self, content: bytes) -> tuple[str, dict[str, Any]]:
        image = decode_image(content, self._max_pixels)
        try:
            return self._process(image)
        except Exception as error:  # processors refuse some shapes, each by an error of its own
            detail = f"{image.width} x {image.height}: the model's processor does not take it"
            raise UnusableRecordError("image_unreadable", detail) from error

    def _process(self, image: "Image") -> tuple[str, dict[str, Any]]:
        """Return the text that stands for an image, and the tensors."""
        processed = self._processor(
            images=[image], text=[self.token], return_tensors="pt", return_text_replacement_offsets=True
        )
        [[replaced]] = processed["text_replacement_offsets"]
        return replaced["replacement"], {k: v for k, v in processed.items() if k not in _OF_TEXT}


class _OneAtATime:
    """A tokenizer that one thread calls at a time: a fast tokenizer fails in two threads at once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._lock = Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self._lock:
            return self._tokenizer(*arguments, **options)


def _with_pillow(folder: Path, tokenizer: Tokenizer) -> tuple[Any, int]:
    """Return the folder's processor, with Pillow in place of torchvision, and the id of its placeholders."""
    from transformers import AutoConfig, AutoImageProcessor  # noqa: PLC0415  (slow)
    from transformers.image_processing_backends import PilBackend  # noqa: PLC0415

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind = config.model_type
    if config.is_encoder_decoder or kind == "mllama":
        raise _refused(folder, f"{kind}: its text model does not read features of images as tokens")
    if hasattr(config, "thinker_config"):
        raise _refused(folder, f"{kind} also reads and writes sound")
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except ImportError:  # of torchvision
        image_processor = None
    if not isinstance(image_processor, PilBackend):
        raise _refused(folder, f"the image processor of {kind} has no version for Pillow")
    chosen = processor_class(folder, kind)
    if chosen is None:
        raise _refused(folder, f"transformers has no processor of {kind}")
    # Some processors add tokens to their tokenizer.
    parts = {"image_processor": image_processor, "tokenizer": copy.deepcopy(tokenizer)}
    processor = make_processor(folder, chosen, parts)
    if processor.image_token not in tokenizer.get_added_vocab():
        raise _refused(folder, f"the tokenizer has no token {processor.image_token!r} for images")
    processor.tokenizer = _OneAtATime(processor.tokenizer)
    return processor, int(config.image_token_id)


def _refused(folder: Path, cause: str) -> ConfigError:
    return ConfigError(
        "the model's images cannot be processed",
        where="model.images",
        got=f"{folder}: {cause}",
        expected="a folder of a model whose image processor works with Pillow (docs/models.md)",
        remedy="put preprocessor_config.json and processor_config.json of the model into the folder; use "
        "another model; or set model.images=null to train on text",
    )


def _pillow() -> Any:
    from PIL import Image  # noqa: PLC0415  (text needs no Pillow)

    # Pillow warns of large images, palettes and broken metadata; an image that cannot be read is an error.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    return Image


def decode_image(content: bytes, max_pixels: int | None = None) -> "Image":
    """Return the image in a file as RGB on white, upright, the first frame of an animated one.

    It is made smaller to at most `max_pixels`. Raises UnusableRecordError: `image_unreadable`, or
    `image_too_large` by the size in the file's header, before any pixel is decoded.
    """
    from PIL import ImageOps  # noqa: PLC0415

    pillow: Any = _pillow()
    try:
        image: Image = pillow.open(io.BytesIO(content), formats=_FORMATS)
        shorter, longer = sorted(image.size)
        size = f"{image.width} x {image.height} pixels"
        if shorter * longer > _MOST_PIXELS:
            raise UnusableRecordError("image_too_large", f"{size}, over {_MOST_PIXELS:,}")
        if longer > _MOST_TIMES_LONGER * shorter:
            detail = f"{size}: a side over {_MOST_TIMES_LONGER} times the other"
            raise UnusableRecordError("image_too_large", detail)
        scans = _scans(content) if content.startswith(_START_OF_JPEG) else 1
        if scans > _MOST_SCANS:
            raise UnusableRecordError("image_unreadable", f"{scans:,} progressive scans, over {_MOST_SCANS}")
        bits = content[24] if image.format == "PNG" else 8
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            raise UnusableRecordError("image_unreadable", "its grey pixels have more than 8 bits")
        image = _on_white(image, bits)
    except pillow.DecompressionBombError as error:
        raise UnusableRecordError("image_too_large", "over 170 million pixels") from error
    except UnusableRecordError:
        raise
    except Exception as error:  # decoders raise all kinds of errors for broken files
        detail = f"not a whole file of {', '.join(_FORMATS)} ({type(error).__name__} of Pillow)"
        raise UnusableRecordError("image_unreadable", detail) from error
    pixels = image.width * image.height
    if max_pixels is None or pixels <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / pixels)
    width, height = (min(max(int(side * scale), 1), max_pixels) for side in image.size)
    return image.resize((width, height), pillow.Resampling.BICUBIC)


def _scans(content: bytes) -> int:
    """Return the number of scans of the image in a JPEG file, by its markers: no pixel is decoded."""
    scans = 0
    at = 2
    while (marker := _MARKER.search(content, at)) and marker[0] != _END_OF_IMAGE:
        scans += marker[0] == _START_OF_SCAN
        at = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])  # behind its segment
    return scans


def _on_white(image: "Image", bits: int) -> "Image":
    """Return an image as RGB, its transparent parts on white, as processors of models and servers show it.

    Pixels that are not seen have a colour, too, often black as the drawing beside them. `bits`: of a value in
    the file. Raises UnusableRecordError.
    """
    pillow = _pillow()
    key = image.info.get("transparency")
    if key is not None and image.mode in ("L", "RGB") and bits != 8:  # Pillow does not scale it as pixels
        raise UnusableRecordError("image_unreadable", f"a transparent colour of {bits} bits")
    if image.has_transparency_data:
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
