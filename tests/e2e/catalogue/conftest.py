"""Run a case of the catalogue."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.catalogue.case import Case, check_case

Check = Callable[[Case], None]


@pytest.fixture
def check(assets: Path, tmp_path: Path) -> Check:
    """Run a case in an empty folder, and check its error."""
    return partial(check_case, folder=tmp_path, assets=assets)
