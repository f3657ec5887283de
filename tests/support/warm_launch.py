"""Launchers on a warm process: a Python that they start is a fork of it, which has imported everything."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from dpo_dist.config.verbs import VERBS
from dpo_dist.tools import launching
from tests.support.warm import be_random_anew


def fork_python() -> None:
    """Fork this process where torch's launcher or a verb starts Python; go on in it where it is executed."""
    mock.patch.object(subprocess_handler, "Popen", _Fork).start()
    mock.patch.object(launching, "subprocess", SimpleNamespace(Popen=_Fork)).start()
    mock.patch.object(os, "execvp", lambda _file, words: _be_python(words, dict(os.environ))).start()


class _Fork:
    """What torch's launcher and a verb that starts another one use of `subprocess.Popen`."""

    def __init__(self, args: Sequence[str], env: dict[str, str], stdout: Any, stderr: Any, **_session: Any):
        forks = multiprocessing.get_context("fork")
        self._process = forks.Process(target=_begin, args=(args, env, (stdout, stderr)))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return self._process.exitcode


def _begin(words: Sequence[str], variables: dict[str, str], streams: tuple[Any, Any]) -> None:
    os.setsid()
    for number, stream in enumerate(streams, 1):
        if stream is not None:
            os.dup2(stream if isinstance(stream, int) else stream.fileno(), number)
    _be_python(words, variables)


def _be_python(words: Sequence[str], variables: dict[str, str]) -> None:
    """Be a new process of Python with this command line: of a module, a verb or a script."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(variables)
    be_random_anew()
    assert words[0] == sys.executable
    sys.argv = [*words[2:]] if words[1] == "-u" else [*words[1:]]
    if sys.argv[0] != "-m":
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    del sys.argv[0]
    if sys.argv[0] == "dpo_dist":  # whose program would start Python anew
        sys.argv[:2] = [VERBS[sys.argv[1]].module]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
