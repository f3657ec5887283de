"""Names of types that modules of several rooms use."""

from collections.abc import Mapping
from typing import Any, TypeAlias

Fields: TypeAlias = Mapping[str, Any]
"""An object of JSON or a row of a table, or a part of one, by the names of its fields."""
