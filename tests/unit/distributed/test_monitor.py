"""End of the thread that watches the other processes."""

import threading
from types import SimpleNamespace

from dpo_dist.distributed.activity import Doing
from dpo_dist.distributed.monitor import Monitor, Reports


def test_a_monitor_that_is_closed_asks_nothing_any_more() -> None:
    """A thread within a question to the store would abort the process at the end of the interpreter."""
    asked, answered = threading.Event(), threading.Event()

    def exit_code(_seconds: float) -> None:
        asked.set()
        answered.wait(60)

    doing = Doing("step 1", "training/step.py:1 (step)", "", 0.0)
    monitor = Monitor(
        neighbours=SimpleNamespace(lost=lambda: None),
        record=SimpleNamespace(exit_code=exit_code),
        heartbeats=SimpleNamespace(seconds=0.01, beat_if_due=lambda: False, silent=list, is_cut_off=False),
        activity=SimpleNamespace(sample=lambda: doing),
        timeout_seconds=600,
        reports=Reports(),
        stacks=SimpleNamespace(),
        signals=SimpleNamespace(exit_code=lambda *_, **__: None),
        waits=SimpleNamespace(),
        is_aborted=False,
    )
    monitor.start()
    assert asked.wait(60)
    threading.Timer(0.3, answered.set).start()
    monitor.close()
    assert answered.is_set()
    assert not monitor.is_alive()
