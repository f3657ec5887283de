"""Run modules on the simulated device, in processes that are forked from the parent which has it."""

import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from tests.simulated_cuda.parent import environment, start_parent
from tests.support import launch, warm
from tests.support.launch import Finished

Prepare = Callable[[], None]


def _begin(prepare: Prepare | None) -> None:
    # Several files for each rank.
    mock.patch("dpo_dist.distributed.checkpoint.slices._FILE_BYTES", 2**16).start()
    if prepare is not None:
        prepare()


def run_module(
    module: str,
    arguments: list[str],
    processes: int = 1,
    prepare: Prepare | None = None,
    report: Path | None = None,
) -> Finished:
    """Run a module to its end, on processes with a device each; `prepare` is called in each before it."""
    variables, begin = environment(processes, report=report), partial(_begin, prepare)
    with tempfile.TemporaryDirectory() as temporary:
        screen = Path(temporary) / "screen"
        screen.touch()
        with mock.patch.object(forkserver, "connect_to_new_process", start_parent().connect_to_new_process):
            started = warm.start_module(
                warm.context, module, arguments, variables, processes, launch.ROOT, screen, begin
            )
        code = warm.wait(started, 540)
        return Finished(code, screen.read_text(encoding="utf-8"))


run_train = partial(run_module, "dpo_dist.train")
