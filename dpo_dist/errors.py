"""What goes wrong, told as one block: what, where, got, expected, what to do.

Every error a user can cause is a `DpoDistError`. The verbs print it without a traceback and end with its
`exit_code`; anything else that escapes is a fault of the program and keeps its traceback.
"""

import errno
from typing import ClassVar

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_PATH_FAULTS = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
    errno.ENAMETOOLONG,
)


class DpoDistError(Exception):
    """One fault, as a user should read it.

    Args:
        what: the fault in one sentence.
        where: the key, ``file:line`` or pair that caused it.
        got: the offending value.
        expected: what would have been accepted.
        remedy: what to do next.
    """

    exit_code: int = 2
    title: ClassVar[str] = "error"

    def __init__(self, what: str, *, where: str = "", got: str = "", expected: str = "", remedy: str = ""):
        super().__init__(what)
        self.what = what
        self.where = where
        self.got = got
        self.expected = expected
        self.remedy = remedy
        self.speaker: int | None = None
        """The rank that prints the error; None before the processes have joined."""

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with every field, so that one rank's error can be raised on all."""
        return _rebuild, (type(self), self.what, self.where, self.got, self.expected, self.remedy)

    def block(self) -> str:
        """The error as the lines a user reads; empty parts are left out."""
        lines = [f"{self.title}: {self.what}"]
        parts = (
            ("where", self.where),
            ("got", self.got),
            ("expected", self.expected),
            ("to do", self.remedy),
        )
        for label, text in parts:
            if text:
                lines.append(f"  {label + ':':<10}{text}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.block()


def _rebuild(
    kind: type[DpoDistError], what: str, where: str, got: str, expected: str, remedy: str
) -> DpoDistError:
    return kind(what, where=where, got=got, expected=expected, remedy=remedy)


class ConfigError(DpoDistError):
    """The configuration cannot be run as it is written."""

    title = "configuration error"


class DataError(DpoDistError):
    """The preference data cannot be used."""

    title = "data error"


class ReferenceModelError(DpoDistError):
    """Reference log-probs cannot be trusted or computed."""

    title = "reference error"


class CheckpointError(DpoDistError):
    """A checkpoint or result cannot be written, read or trusted."""

    title = "checkpoint error"


class DivergedError(DpoDistError):
    """Loss or gradient stopped being finite."""

    exit_code = 3
    title = "diverged"


class DeviceMemoryError(DpoDistError):
    """A GPU has no memory left."""

    title = "out of memory"


class PeerLostError(DpoDistError):
    """Another process of the run died or failed."""

    exit_code = 1
    title = "process lost"


def disk_error(fault: BaseException) -> ConfigError | None:
    """Return `fault` as an error for the user if a full disk, a path or its permissions caused it."""
    if not isinstance(fault, OSError):
        return None
    if fault.errno not in _DISK_IS_FULL and (fault.errno not in _PATH_FAULTS or fault.filename is None):
        return None
    return ConfigError(
        "a file cannot be written or read",
        where=str(fault.filename or "run.dir, data.cache or reference.store"),
        got=str(fault.strerror),
        remedy="make room, or correct the path or its permissions; what was committed is complete, "
        "start the same command again",
    )
