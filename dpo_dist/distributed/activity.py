"""Activity of this process, for other ranks: its step, its work, and the collective call it waits in."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import PurePath
from types import FrameType

_PACKAGE = "dpo_dist."
_COMMUNICATION = ("torch.distributed.", "deepspeed.comm.")
_OF_DECORATORS = ("wrapper", "log_wrapper", "wrapped_fn")
_GATHER_OF_WEIGHTS = ("deepspeed.runtime.zero.partition_parameters", "wait")
_WAITS, _WORLD = f"{_PACKAGE}distributed.waits", f"{_PACKAGE}distributed.world"


@dataclass(frozen=True)
class Doing:
    """Activity of a rank at one moment.

    Attributes:
        work: kind of work, and its step.
        place: innermost line of this package: file, line, function.
        call: the collective call that it waits in; empty: none.
        seconds: since it has been at this place.
        is_patient: whether the call lasts as long as the ranks that it waits for send heartbeats.
    """

    work: str = "starting"
    place: str = ""
    call: str = ""
    seconds: float = 0.0
    is_patient: bool = False

    @property
    def is_blocked(self) -> bool:
        """Return whether it waits in a call that times out, and answers no signal meanwhile."""
        return bool(self.call) and not self.is_patient

    def __str__(self) -> str:
        parts = [self.work]
        if self.call:
            parts.append(f"waiting in {self.call}")
        if self.place:
            parts.append(f"at {self.place}")
        return f"{', '.join(parts)}, for {self.seconds:.0f} s"

    def as_json(self) -> str:
        """Return all fields as JSON, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Doing":
        """Return the activity that another rank has written."""
        return cls(**json.loads(text))


class Activity:
    """Activity of the thread that creates this object; another thread samples it.

    Attributes:
        work: kind of work, as in `training.work_clock`.
        steps_done: returns the number of steps done; None before training.
        is_shown: whether a line on the screen says that this process works.
    """

    def __init__(self) -> None:
        self.work = "starting"
        self.steps_done: Callable[[], int] | None = None
        self.is_shown = False
        self.last = Doing()
        self._thread = threading.get_ident()
        self._mark: tuple[object, ...] = ()
        self._since = time.monotonic()

    def enter(self, work: str) -> None:
        """Begin a kind of work."""
        self.work = work

    def sample(self) -> Doing:
        """Return the present activity; a thread is at the same place until its stack of calls changes."""
        frames = list(_frames(sys._current_frames().get(self._thread)))
        work = self._named_work()
        mark = work, *((id(frame), frame.f_lasti) for frame in frames)
        now = time.monotonic()
        if mark != self._mark:
            self._mark, self._since = mark, now
        is_patient = any(_module(frame) == _WAITS for frame in frames)
        call = _patient_call(frames) if is_patient else _call(frames)
        self.last = Doing(work, _place(frames), call, round(now - self._since, 1), is_patient)
        return self.last

    def _named_work(self) -> str:
        if self.steps_done is None:
            return self.work
        done = self.steps_done()
        return f"step {done + 1}" if self.work == "training" else f"{self.work} after step {done}"


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of a stack, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _place(frames: list[FrameType]) -> str:
    """Return the innermost line of this package that is not itself a collective call of `World`."""
    own = [f for f in frames if _module(f).startswith(_PACKAGE) and _module(f) not in (_WAITS, _WORLD)]
    if not own:
        return ""
    code = own[0].f_code
    path = PurePath(code.co_filename)
    return f"{path.parent.name}/{path.name}:{own[0].f_lineno} ({code.co_name})"


def _call(frames: list[FrameType]) -> str:
    """Return the name of the collective call that a stack is in; empty if it is in none."""
    name, is_innermost = "", True
    for frame in frames:
        module, function = _module(frame), frame.f_code.co_name
        if module.startswith(_PACKAGE):
            break
        if function in _OF_DECORATORS:
            continue
        if module.startswith(_COMMUNICATION):
            name = function
        elif is_innermost and (module, function) == _GATHER_OF_WEIGHTS:
            name = "all_gather of weights"
        is_innermost = False
    return name


def _patient_call(frames: list[FrameType]) -> str:
    """Return the name of the method of `World` that waits for ranks that still work."""
    names = [frame.f_code.co_name for frame in frames if _module(frame) == _WORLD]
    return names[-1] if names else "wait"
