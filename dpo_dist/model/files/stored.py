"""Read weight files that are quantized as published: FP8 in blocks (DeepSeek, Qwen), MXFP4 (gpt-oss).

transformers' own loading keeps such weights quantized or casts their scales, holds the whole model on every
rank under ZeRO-3, and quantizes again when it saves. Here a folder's files are read as if they had plain
weights, so that everything else is as for any other model.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from dpo_dist.model.files.folder import stored_quantization, weight_files
from dpo_dist.model.library_internals import opening_files_by, unpack_mxfp4

_BLOCKS = "_blocks"  # of MXFP4: 32 numbers of 4 bits in 16 bytes
_SCALES = "_scales"  # their exponent
_SCALE = "_scale_inv"  # of FP8: what the block's numbers are multiplied with
RowChoice = slice | EllipsisType | None
"""The rows of a tensor that are read; an ellipsis: all, None: the tensor is left out."""
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}


def plain_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """Return the transformers configuration of a model folder, of the plain weights that are read from it."""
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    stored = stored_quantization(folder)
    for part in (model_config, model_config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    if stored is not None:
        model_config.stored_as = str(stored.get("quant_method"))
    return model_config


@contextlib.contextmanager
def plain_weights(
    folder: Path,
    dtype: torch.dtype,
    kept: Collection[str] = (),
    rows: Mapping[str, RowChoice] | None = None,
    drawn: Mapping[str, Tensor] | None = None,
    *,
    is_read: bool = True,
) -> Iterator[None]:
    """Inside the block, make transformers read the weights of `folder` as plain ones of `dtype`.

    `kept` are names of MXFP4 weights that are read as `join_mxfp4` returns them. `rows` are those to read of
    some tensors, by name; None: the tensor is left out. `drawn` are weights that are read as if the folder
    had them, too. Without `is_read`, quantized weights are on the meta device.
    """
    if stored_quantization(folder) is None and not rows and not drawn:
        yield
        return
    open_file = open_plain(folder, dtype, kept, drawn, is_read=is_read)
    with opening_files_by(lambda file: _Part(open_file(file), rows or {})):
        yield


def open_plain(
    folder: Path,
    dtype: torch.dtype,
    kept: Collection[str] = (),
    drawn: Mapping[str, Tensor] | None = None,
    *,
    is_read: bool = True,
) -> Callable[[str | Path], Any]:
    """Return a function that opens a weight file of `folder` as `safe_open` does, of plain weights.

    The arguments are those of `plain_weights`.
    """
    if stored_quantization(folder) is None and not drawn:
        return partial(safe_open, framework="pt")
    return _Reader(folder, dtype, kept, drawn, is_read=is_read).open


def mxfp4_names(folder: Path) -> set[str]:
    """Return the names of the weights that a folder has in MXFP4."""
    if stored_quantization(folder) is None:
        return set()
    return {name.removesuffix(_BLOCKS) for name in places(folder) if name.endswith(_BLOCKS)}


def join_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return bytes [experts, outputs, inputs / 32, 17]: 32 numbers of 4 bits and their exponent."""
    return torch.cat([blocks, scales[..., None]], -1)


def places(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor: a weight may lie in another file than its scales."""
    places = dict[str, Path]()
    for file in weight_files(folder):
        if file.suffix != ".json":
            with safe_open(file, "pt") as tensors:
                places |= dict.fromkeys(tensors.keys(), file)
    return places


class _Reader:
    """The tensors of a folder; `open` returns what `safe_open` returns of a file with plain weights."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        kept: Collection[str] = (),
        drawn: Mapping[str, Tensor] | None = None,
        *,
        is_read: bool = True,
    ) -> None:
        self._dtype = dtype
        self._kept = kept
        self._drawn = drawn or {}
        self._is_read = is_read
        self._blocks = (stored_quantization(folder) or {}).get("weight_block_size", (128, 128))
        self._places = places(folder)
        self._files: dict[Path, Any] = {file: safe_open(file, "pt") for file in {*self._places.values()}}

    def open(self, file: str | Path) -> "_PlainFile":
        file = Path(file)
        names = [name for name, place in self._places.items() if place == file]
        weights = {name.removesuffix(_BLOCKS): self._weight(name) for name in names if self._is_weight(name)}
        if file == next(iter(self._files)):
            for name, values in self._drawn.items():
                weights[name] = self._lazy(values.to(self._dtype).__getitem__, [*values.shape])
        return _PlainFile(weights)

    def _is_weight(self, name: str) -> bool:
        if name.endswith(_SCALES):
            return name.removesuffix(_SCALES) + _BLOCKS not in self._places
        owner = name.removesuffix(_SCALE)
        if owner == name:  # what inputs are divided by, where they are FP8, too
            owner = name.replace(".activation_scale", ".weight")
        return owner == name or owner not in self._places

    def _weight(self, name: str) -> Any:
        """Return the slice of a weight, by its name in the files."""
        stored = self._slice(name)
        if name.endswith(_BLOCKS):
            scales = name.removesuffix(_BLOCKS) + _SCALES
            experts, outputs, groups, _ = stored.get_shape()
            if name.removesuffix(_BLOCKS) in self._kept:
                return self._lazy(
                    lambda rows: join_mxfp4(stored[rows], self._slice(scales)[rows]),
                    [experts, outputs, groups, 17],
                    torch.uint8,
                )
            return self._lazy(
                lambda rows: unpack_mxfp4(stored[rows], self._slice(scales)[rows], self._dtype),
                [experts, 32 * groups, outputs],
            )
        # transformers leaves weights that no block divides as they are, beside a scale that it never sets.
        if not stored.get_dtype().startswith(("F8", "F4")):
            return stored
        if name + _SCALE not in self._places:
            raise ValueError(f"{name} is quantized ({stored.get_dtype()}) without {name}{_SCALE}")
        return self._lazy(lambda rows: self._scaled(name)[rows], stored.get_shape())

    def _slice(self, name: str) -> Any:
        return self._files[self._places[name]].get_slice(name)

    def _lazy(
        self, read: Callable[[Any], Tensor], shape: list[int], dtype: torch.dtype | None = None
    ) -> "_Slice":
        dtype = dtype or self._dtype
        if not self._is_read:
            read = torch.empty(shape, dtype=dtype, device="meta").__getitem__
        return _Slice(read, shape, dtype)

    def _scaled(self, name: str) -> Tensor:
        weight: Tensor = self._slice(name)[...].float()
        scale: Tensor = self._slice(name + _SCALE)[...].float()
        if self._blocks and scale.numel() > 1:
            # The last block of a side may be cut, as in DeepSeek-V3's 576 rows: blocks are not equal parts.
            sides = [*zip(weight.shape[-2:], self._blocks, strict=True)]
            expected = [-(-side // block) for side, block in sides]
            if [*scale.shape[-2:]] != expected:
                raise ValueError(f"{name}{_SCALE} has {[*scale.shape]} blocks, not {expected}")
            for dim, (side, block) in zip((-2, -1), sides, strict=True):
                scale = scale.repeat_interleave(block, dim).narrow(dim, 0, side)
        return weight.mul_(scale).to(self._dtype)


@dataclass(frozen=True)
class _Slice:
    """A weight that is read when it is indexed, as a slice of `safe_open`: `read` takes rows."""

    read: Callable[[Any], Tensor]
    shape: list[int]
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.read(index)

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return _NAMES[self.dtype]


class _PlainFile(contextlib.AbstractContextManager["_PlainFile"]):
    """The plain weights of a file, with the methods of `safe_open`."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self._weights = weights

    def keys(self) -> list[str]:
        return [*self._weights]

    def get_slice(self, name: str) -> Any:
        return self._weights[name]

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._weights[name][...]
        return tensor

    def __exit__(self, *_: object) -> None:
        pass


class _Part(contextlib.AbstractContextManager["_Part"]):
    """An open file of which some tensors are left out, or have only some of their rows."""

    def __init__(self, file: Any, rows: Mapping[str, RowChoice]) -> None:
        self._file = file
        self._rows = rows

    def keys(self) -> list[str]:
        return [name for name in self._file.keys() if self._rows.get(name, ...) is not None]  # noqa: SIM118

    def get_slice(self, name: str) -> Any:
        stored = self._file.get_slice(name)
        rows = self._rows.get(name, ...)
        return stored if rows is ... else _OwnRows(stored, rows)

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class _OwnRows:
    """Some rows of a slice of `safe_open`, which are read when it is indexed."""

    stored: Any
    rows: RowChoice

    def __getitem__(self, index: Any) -> Tensor:
        rows: Tensor = self.stored[self.rows]
        return rows[index]
