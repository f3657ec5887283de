"""Fingerprint of a set of stored log-probs: model weights, numerics, scoring-code version (law L3).

The store has one folder for each fingerprint, named by its digest; entries in the folder are addressed by the
exact token ids. Imports no torch.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.foundation.files import is_temporary, text_digest

# Raised when the code that computes log-probs changes their digits, which
# tests/unit/reference/test_scoring_digits.py detects.
LOGP_PATH_VERSION = 2

# Raised when the files of a store change: entries of older formats are computed again, never misread.
STORE_FORMAT = 2

FINGERPRINT_FILE = "space.json"

# Beside the fingerprints' folders: digests of model files, one file for each.
MEMO_FOLDER = "file_digests"

_FOLDER_NAME = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class ReferenceFingerprint:
    """Identity of stored log-probs: the reference's weights and the numerics they were computed with.

    Attributes:
        reference: digest of the model's files.
        profile: `model.numerics.numerics_of`.
        label: the model's name for people; not part of the identity.
    """

    reference: str
    profile: dict[str, str]
    label: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """Folder name: digest of reference, profile and versions; 32 hex digits."""
        return text_digest(json.dumps(self._identity(), sort_keys=True))

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `space.json`."""
        return {**self._identity(), "label": self.label}

    def _identity(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "profile": self.profile,
            "logp_path": LOGP_PATH_VERSION,
            "format": STORE_FORMAT,
        }


def read_fingerprint(folder: Path) -> ReferenceFingerprint | None:
    """Return the fingerprint of a store's folder; None if `space.json` is missing, damaged or another's."""
    try:
        content = json.loads((folder / FINGERPRINT_FILE).read_bytes())
        found = ReferenceFingerprint(content["reference"], dict(content["profile"]), content["label"])
        return found if found.as_dict() == content and found.name == folder.name else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def fingerprint_folders(root: Path) -> list[Path]:
    """Return the folders of all fingerprints in a store; a folder that is no store is an error."""
    try:
        content = sorted(root.iterdir())
    except OSError as error:
        raise _no_store(root, str(error.strerror)) from error
    named = [path for path in content if _FOLDER_NAME.fullmatch(path.name) and path.is_dir()]
    # Encoded data have such names too.
    found = [path for path in named if (path / FINGERPRINT_FILE).exists() or any(path.glob("*.safetensors"))]
    begun = {path for path in named if all(map(is_temporary, path.iterdir()))}  # by another or a killed start
    others = [
        path for path in content if path.name != MEMO_FOLDER and not is_temporary(path) and path not in begun
    ]
    if others and not found:
        raise _no_store(root, f"{others[0].name} and no log-probs")
    return found


def _no_store(root: Path, got: str) -> ReferenceModelError:
    return ReferenceModelError(
        "no reference store is found in this folder",
        where=str(root),
        got=got,
        remedy="give the folder set as reference.store, by default output/reference",
    )
