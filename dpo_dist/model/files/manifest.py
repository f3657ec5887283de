"""The manifest of a model folder that this program wrote: digests of its files, and of its base.

    dpo_dist_manifest.json    {"files": {"config.json": DIGEST, ...}, "base": DIGEST or null}

By it a file that is damaged, cut or replaced later is found before the folder is taken as a result. Folders
without a manifest are other people's, and pass.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.foundation.files import content_digest, read_fields, remembered_digest, write_json
from dpo_dist.foundation.text import first_few

MODEL_MANIFEST = "dpo_dist_manifest.json"
# People edit these in a folder that stays the same model.
_EDITABLE = (MODEL_MANIFEST, "README.md", "generation_config.json")


def write_manifest(folder: Path, base: str | None) -> None:
    """Write the manifest of a model folder, as the last of its files.

    `base` is the `ModelFiles.base` of the model from which it was trained; None: not known.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.name not in _EDITABLE)
    files = list(filter(Path.is_file, paths))
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = pool.map(lambda file: content_digest([file]), files)
    names = [file.relative_to(folder).as_posix() for file in files]
    write_json(folder / MODEL_MANIFEST, {"files": dict(zip(names, digests, strict=True)), "base": base})


def find_damage(folder: Path, memo: Path | None, *, with_weights: bool = True) -> list[str]:
    """Return what differs from the manifest of `folder`, a line for each file; [] without a manifest.

    `memo`: the folder of cached digests, by which a file is read once. Without `with_weights`, no weights are
    read.
    """
    expected: dict[str, str] = _read(folder).get("files", {})

    def damage(name: str) -> str | None:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        is_read = with_weights or file.suffix != ".safetensors"
        if is_read and remembered_digest(file, memo) != expected[name]:
            return f"{name} has another content"
        return None

    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(filter(None, pool.map(damage, expected)))


def check_undamaged(folder: Path, memo: Path | None, *, with_weights: bool = True) -> None:
    """Check that the files of a model folder are those that were written; arguments as of `find_damage`."""
    damage = find_damage(folder, memo, with_weights=with_weights)
    if damage:
        raise CheckpointError(
            "the model folder is not as it was written",
            where=str(folder),
            got=first_few(damage, "other file"),
            expected=f"the files of its {MODEL_MANIFEST}",
            remedy="restore the files; the model/ of a run that has its checkpoints is written again by the "
            f"train command; if you changed them on purpose, delete {MODEL_MANIFEST}",
        )


def check_base(folder: Path, base: Path, digest: Callable[[], str]) -> None:
    """Check that the model in `base` is the one from which that in `folder` was trained.

    `digest` returns the `ModelFiles.base` of `base`; it is called only if a manifest names a digest.
    """
    expected = _read(folder).get("base")
    if expected is None:
        return
    current = digest()
    if current != expected:
        raise CheckpointError(
            "the base of this model is not the one from which it was trained",
            where=f"{base}, as the base of {folder}",
            got=f"digest {current}",
            expected=f"digest {expected}, of {MODEL_MANIFEST}",
            remedy="restore the files of the base, or name its former revision; if it has the same weights "
            f"in other files, delete {MODEL_MANIFEST}",
        )


def _read(folder: Path) -> dict[str, Any]:
    manifest = folder / MODEL_MANIFEST
    return read_fields(manifest) if manifest.is_file() else {}
