"""Tables of results as plain text."""

import io

from rich.console import Console
from rich.table import Table

_WIDTH = 79


def table_text(table: Table) -> str:
    """Return a table as lines of at most 79 columns, without colours."""
    screen = io.StringIO()
    Console(file=screen, width=_WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in screen.getvalue().strip("\n").splitlines())
