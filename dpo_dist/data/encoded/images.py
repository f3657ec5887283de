"""Images of an encoded dataset: which of the distinct ones each prompt has, and their inputs."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_dist.batching.example import ImageInput
from dpo_dist.data.encoded.store import EncodedSource, has_images
from dpo_dist.data.images import ImageProcessor
from dpo_dist.foundation.tables import Array


@dataclass(frozen=True)
class PromptImages:
    """The images in the prompts of a dataset, each distinct one once; their files stay on disk."""

    distinct: tuple[ImageInput, ...]  # without inputs
    places: Mapping[bytes, int]  # by digest, the index of each distinct image in `contents`
    contents: pa.ChunkedArray  # the files
    numbers: Array  # int64, the distinct images of all records, record after record
    starts: Array  # int64 [examples], offset of each example's images in `numbers`
    counts: Array  # int64 [examples]
    prompt_tokens: Array  # int64 [examples], placeholders of images in the prompt
    processor: ImageProcessor

    @property
    def fingerprint(self) -> str:
        """A digest of the images of all records in their order."""
        digest = hashlib.blake2b(b"".join(image.digest for image in self.distinct), digest_size=16)
        digest.update(self.numbers.tobytes())
        return digest.hexdigest()

    def of(self, index: int) -> tuple[ImageInput, ...]:
        """Return the images of an example, without inputs."""
        start = int(self.starts[index])
        return tuple(self.distinct[n] for n in self.numbers[start : start + int(self.counts[index])])

    def with_inputs(self, image: ImageInput) -> ImageInput:
        """Return an image with the tensors that the model's tower reads."""
        return replace(image, inputs=self.processor.inputs(self.content(image)))

    def content(self, image: ImageInput) -> bytes:
        """Return the file of an image."""
        content: bytes = self.contents[self.places[image.digest]].as_py()
        return content


def prompt_images(
    sources: Sequence[EncodedSource], tables: Sequence[pa.Table], processor: ImageProcessor
) -> PromptImages | None:
    """Return the images in the `tables` of these sources, which `read_source` has verified, or None."""
    pairs = zip(sources, tables, strict=True)
    files = [source.images() for source, records in pairs if has_images(records)]
    if not files:
        return None
    stored, table = pa.concat_tables(files), pa.concat_tables(tables)
    counts = np.asarray(pc.list_value_length(table["images"]), dtype=np.int64)
    digests, tokens = stored["digest"].to_pylist(), stored["tokens"].to_pylist()
    places: dict[bytes, int] = {}
    for place, digest in enumerate(digests):  # sources may have the same image
        places.setdefault(digest, place)
    number = {digest: index for index, digest in enumerate(places)}
    distinct = tuple(
        ImageInput(digest, tokens[place], processor.placeholder_id) for digest, place in places.items()
    )
    numbers = np.array([number[digest] for digest in pc.list_flatten(table["images"]).to_pylist()])
    before = np.concatenate(([0], np.cumsum(np.array([image.tokens for image in distinct])[numbers])))
    starts = np.cumsum(counts) - counts
    examples = np.repeat(np.arange(len(table)), np.asarray(pc.list_value_length(table["examples"])))
    return PromptImages(
        distinct,
        places,
        stored["content"],
        numbers,
        starts[examples],
        counts[examples],
        (before[starts + counts] - before[starts])[examples],
        processor,
    )
