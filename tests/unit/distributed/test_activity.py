"""Activity of a thread, as another thread sees it."""

import threading
from collections.abc import Callable

import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters

from dpo_dist.distributed.activity import Activity, Doing
from dpo_dist.foundation.process import prefetch


def sampled(work: Callable[[], object], activity: Activity) -> Doing:
    """The activity of this thread while it is in `work`, which the sampling ends."""
    found: list[Doing] = []
    timer = threading.Timer(0.1, lambda: found.append(activity.sample()))
    timer.start()
    work()
    timer.join()
    return found[0]


def test_the_place_is_the_innermost_line_of_the_package() -> None:
    held = threading.Event()

    def items() -> object:
        held.wait(0.5)
        yield 1

    def work() -> None:
        with prefetch(items(), 1) as ready:
            next(ready)

    activity = Activity()
    activity.enter("evaluation")
    activity.steps_done = lambda: 7
    doing = sampled(work, activity)
    assert doing.work == "evaluation after step 7"
    assert doing.place.startswith("dpo_dist/foundation/process.py:")
    assert not doing.call, "it waits for its own thread, not for a rank"


def test_steps_are_counted_from_one_in_training() -> None:
    activity = Activity()
    activity.enter("training")
    activity.steps_done = lambda: 0
    assert activity.sample().work == "step 1"


def test_the_time_at_a_place_starts_again_when_the_thread_goes_on() -> None:
    activity, times = Activity(), list[float]()

    def sample() -> None:
        activity.sample()
        activity._since -= 100
        times.append(activity.sample().seconds)

    def sampled_soon() -> threading.Timer:
        timer = threading.Timer(0.05, sample)
        timer.start()
        return timer

    first = sampled_soon()
    first.join()
    second = sampled_soon()
    second.join()  # another line, so another place
    assert times == [100, 100], "a sample at another place has started again"


def frame_of(module: str, function: str, wait: Callable[[], object]) -> Callable[[], object]:
    """A function that a stack shows as `function` of `module`."""
    scope = {"__name__": module, "held": wait}
    exec(f"def {function}():\n    held()", scope)
    return scope[function]


def test_a_collective_call_is_named_by_its_outermost_function() -> None:
    held = threading.Event()
    inner = frame_of(dist.distributed_c10d.__name__, "all_gather", lambda: held.wait(0.3))
    decorated = frame_of("torch.distributed.c10d_logger", "wrapper", inner)
    outer = frame_of(dist.distributed_c10d.__name__, "all_gather_object", decorated)
    assert sampled(outer, Activity()).call == "all_gather_object"


def test_a_wait_for_the_gathered_weights_is_a_collective_call() -> None:
    """The handle of an asynchronous call is waited for outside of torch.distributed."""
    held = threading.Lock()
    held.acquire()
    scope = {"__name__": partition_parameters.__name__, "held": held}
    exec("def wait():\n    held.acquire(timeout=0.3)", scope)
    decorated = frame_of("deepspeed.utils.nvtx", "wrapped_fn", scope["wait"])
    assert sampled(decorated, Activity()).call == "all_gather of weights"
