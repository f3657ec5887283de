"""A module of tests that joins a world leaves it: else the modules after it would be in it, too."""

from collections.abc import Iterator

import pytest

from dpo_dist.distributed.processes.join import leave_world
from dpo_dist.foundation.process import kept_environment


@pytest.fixture(autouse=True, scope="module")
def world_left() -> Iterator[None]:
    with kept_environment():
        yield
    leave_world()
