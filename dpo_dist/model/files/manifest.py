"""The manifest of a model folder that this program wrote: digests of its files, and of its base.

    dpo_dist_manifest.json    {"files": {"config.json": DIGEST, ...}, "base": DIGEST or null}

By it a file that is damaged, replaced or added later is found before the folder is taken as a result. Folders
without a manifest are other people's, and pass.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.foundation.files import content_digest, remembered_digest, write_json
from dpo_dist.foundation.text import first_few
from dpo_dist.model.files.folder import GENERATION_CONFIG

MODEL_MANIFEST = "dpo_dist_manifest.json"
# People edit and add these in a folder that stays the same model: its sampling, pages and pictures.
_PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp")
_EDITABLE = (MODEL_MANIFEST, GENERATION_CONFIG, "*.md", "LICENSE*", "NOTICE*", *_PICTURES)


def write_manifest(folder: Path, base: str | None) -> None:
    """Write the manifest of a model folder, as the last of its files.

    `base` is the `ModelFiles.base` of the model from which it was trained; None: not known.
    """
    names = _compared_files(folder)
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = pool.map(lambda name: content_digest([folder / name]), names)
    write_json(folder / MODEL_MANIFEST, {"files": dict(zip(names, digests, strict=True)), "base": base})


def _compared_files(folder: Path) -> list[str]:
    """Return the names of the files that may decide what a model computes: all but pages and hidden files."""
    names = []
    for file in sorted(folder.rglob("*")):
        below = file.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in below.parts)
        is_editable = any(map(below.match, _EDITABLE))
        if file.is_file() and not (is_hidden or is_editable):
            names.append(below.as_posix())
    return names


def find_damage(folder: Path, memo: Path | None, *, with_weights: bool = True) -> list[str]:
    """Return what differs from the manifest of `folder`, a line for each file; [] without a manifest.

    `memo`: the folder of cached digests, by which a file is read once. Without `with_weights`, no weights are
    read.
    """
    if not (folder / MODEL_MANIFEST).is_file():
        return []
    expected = _read(folder).files
    if expected is None:
        return [f"{MODEL_MANIFEST} cannot be read"]

    def damage(name: str) -> str | None:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        is_read = with_weights or file.suffix != ".safetensors"
        if is_read and remembered_digest(file, memo) != expected[name]:
            return f"{name} has another content"
        return None

    with ThreadPoolExecutor(max_workers=8) as pool:
        changed = list(filter(None, pool.map(damage, expected)))
    return changed + [f"{name} was added" for name in added_files(folder)]


def added_files(folder: Path) -> list[str]:
    """Return the files that are not in the manifest of `folder`; [] without one."""
    expected = _read(folder).files
    return [] if expected is None else [name for name in _compared_files(folder) if name not in expected]


def check_undamaged(folder: Path, memo: Path | None, *, with_weights: bool = True) -> None:
    """Check that the files of a model folder are those that were written; arguments as of `find_damage`."""
    damage = find_damage(folder, memo, with_weights=with_weights)
    if damage:
        raise CheckpointError(
            "the model folder is not as it was written",
            where=str(folder),
            got=first_few(damage, "other file"),
            expected=f"the files of its {MODEL_MANIFEST}",
            remedy="restore the files, and move added ones elsewhere; the model/ of a run that has its "
            "checkpoints is written again by the train command",
        )


def check_base(folder: Path, base: Path, digest: Callable[[], str]) -> None:
    """Check that the model in `base` is the one from which that in `folder` was trained.

    `digest` returns the `ModelFiles.base` of `base`; it is called only if a manifest names a digest.
    """
    expected = _read(folder).base
    if expected is None:
        return
    current = digest()
    if current != expected:
        raise CheckpointError(
            "the base of this model is not the one from which it was trained",
            where=f"{base}, as the base of {folder}",
            got=f"digest {current}",
            expected=f"digest {expected}, of {MODEL_MANIFEST}",
            remedy="restore the files of the base, or name its former revision",
        )


@dataclass(frozen=True)
class _Manifest:
    """The content of a manifest; `files` is None if there is none that can be read."""

    files: dict[str, str] | None = None
    base: str | None = None


def _read(folder: Path) -> _Manifest:
    try:
        return TypeAdapter(_Manifest).validate_json((folder / MODEL_MANIFEST).read_bytes())
    except (OSError, ValueError):
        return _Manifest()
