"""Images of records: their files, as bytes or below an allowed folder."""

import base64
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dpo_dist.data.records import MAX_RECORD_BYTES, UnusableRecordError, shown_key


@dataclass(frozen=True)
class ImageFile:
    """The file of an image: its content, or its name, looked up in `folders` in their order.

    Wherever a link leads, the file must be below one of the folders. A name can be a base64 `data:` URI.
    """

    content: bytes | None = field(default=None, repr=False)
    name: str = ""
    folders: tuple[str, ...] = ()

    def read(self) -> bytes:
        """Return the content of the file. Raises UnusableRecordError: `image_unreadable`, with the cause."""
        content = self.content
        try:
            if content is None and self.name.startswith("data:"):
                content = base64.b64decode(self.name.partition(";base64,")[2], validate=True)
            elif content is None:
                with self._file().open("rb") as stream:
                    content = stream.read(MAX_RECORD_BYTES + 1)
        except (OSError, ValueError, RuntimeError) as fault:  # RuntimeError: links in a circle
            raise UnusableRecordError("image_unreadable", f"{type(fault).__name__} for its file") from fault
        if not 0 < len(content) <= MAX_RECORD_BYTES:
            detail = (
                f"a file of {len(content):,} bytes" if not content else f"over {MAX_RECORD_BYTES:,} bytes"
            )
            raise UnusableRecordError("image_unreadable", detail)
        return content

    @cached_property
    def digest(self) -> bytes:
        """16 bytes over the content of the file."""
        return hashlib.blake2b(self.read(), digest_size=16).digest()

    def _file(self) -> Path:
        name = self.name.removeprefix("file://")
        if "://" in name:
            raise UnusableRecordError("image_unreadable", "a URL is not fetched")
        roots = [Path(folder).resolve() for folder in self.folders]
        files = [file for root in roots if (file := (root / name).resolve()).is_file()]
        allowed = (file for file in files if any(map(file.is_relative_to, roots)))
        if (file := next(allowed, None)) is None:
            shown = shown_key(Path(name).name)
            what = "is outside the folders of images" if files else "does not exist"
            raise UnusableRecordError("image_unreadable", f"the file {shown} {what}")
        return file
