"""What stored log-probs belong to: one reference, its numerics, the code that computed them (law L3).

Each such space is a folder of the store, named by a digest of all three; rows inside are addressed by the
exact token ids. Imports no torch.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Raised when the code that computes log-probs changes their digits, which
# tests/unit/reference/test_scoring_digits.py detects.
LOGP_PATH_VERSION = 2

# Raised when the files of a space change: rows of older formats are computed anew and never misread.
STORE_FORMAT = 2

FINGERPRINT_FILE = "space.json"

# Beside the spaces: digests of model files, one file for each.
MEMO_FOLDER = "file_digests"


@dataclass(frozen=True)
class ReferenceFingerprint:
    """All rows of one reference under one numerics profile.

    Attributes:
        reference: digest of the model's files.
        profile: `model.numerics.numerics_of`.
        label: the model's name for people; not a part of the space's identity.
    """

    reference: str
    profile: dict[str, str]
    label: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """Folder name of the space: digest over reference, profile and versions; 32 hex digits."""
        content = json.dumps(self._identity(), sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """For `space.json` beside the rows."""
        return {**self._identity(), "label": self.label}

    def _identity(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "profile": self.profile,
            "logp_path": LOGP_PATH_VERSION,
            "format": STORE_FORMAT,
        }


def read_fingerprint(folder: Path) -> ReferenceFingerprint | None:
    """The space that `folder` says it is; None if it does not say, or says another than its name.

    Raises:
        OSError: its `space.json` is there and cannot be read.
    """
    try:
        content = json.loads((folder / FINGERPRINT_FILE).read_bytes())
        space = ReferenceFingerprint(content["reference"], dict(content["profile"]), str(content["label"]))
        return space if space.describe() == content and space.name == folder.name else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
