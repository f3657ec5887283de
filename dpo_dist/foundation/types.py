"""Names of types that modules of several rooms use."""

from collections.abc import Mapping
from typing import Any, TypeAlias

Fields: TypeAlias = Mapping[str, Any]
"""Fields of a JSON object or of a table's row, by name."""
