"""What a function says to a user who may not read some files; root may read all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dpo_dist.foundation.errors import DpoDistError

_NOBODY = 65534


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """Yield a folder that every user may read, as those of pytest are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def error_for_other_user(work: Callable[[], object]) -> str:
    """Return the error of `work`, called as another user than root; "" without one."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        text = ""
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setuid(_NOBODY)
            work()
        except DpoDistError as error:
            text = str(error)
        except BaseException as bug:
            text = f"bug: {bug!r}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return text
