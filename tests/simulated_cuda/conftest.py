"""The device is built once; where it cannot be, its tests are skipped."""

import pytest

from tests.simulated_cuda import parent


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    """Build the device, or find it."""
    lacking = parent.lacking()
    if lacking:
        pytest.skip(lacking)
    parent.build()
