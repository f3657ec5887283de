"""First on PYTHONPATH, it gives the simulated device to every Python process that asks for it."""

import os

if os.environ.get("SIMULATED_CUDA"):
    from tests.simulated_cuda import device

    device.install()
