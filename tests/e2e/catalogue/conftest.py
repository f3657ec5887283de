"""Run a case of the catalogue."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.catalogue.case import Case, check_case, run_case

Check = Callable[[Case], None]


@pytest.fixture
def check(assets: Path, tmp_path: Path) -> Check:
    """Run a case in an empty folder, and check its error."""

    def run(case: Case) -> None:
        check_case(case, run_case(case, tmp_path, assets))

    return run
