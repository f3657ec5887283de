"""The device is built once; where it cannot be, its tests are skipped."""

import pytest

from tests.simulated_cuda import runs


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    """Build the device, or find it."""
    lacking = runs.lacking()
    if lacking:
        pytest.skip(lacking)
    runs.build()
