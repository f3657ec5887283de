"""Fill the reference store for a run, without training."""

from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.stops import Stops
from dpo_dist.errors import ExitCode
from dpo_dist.report.terminal.console import Console
from dpo_dist.signals import StopRequest
from dpo_dist.training.data_setup import load_inputs
from dpo_dist.training.header import say_header
from dpo_dist.training.reference_setup import prepare_reference
from dpo_dist.training.world_setup import open_world


def precompute(config: RunConfig, console: Console, stop: StopRequest) -> int:
    """Fill the reference store with all log-probs that the run of `config` uses; return the exit code.

    Args:
        config: of the run.
        console: of this rank.
        stop: is listening.

    Raises:
        StoppedError: a rank was asked to stop; what is scored is stored.
    """
    with open_world(config, console) as world:
        say_header(config, world, console)
        inputs = load_inputs(config, world, console)
        with stop.deferred():
            prepare_reference(config, inputs, world, console, Stops(stop, world))
        console.say(f"reference: all log-probs of this run are in the store {config.reference.store}")
    return ExitCode.completed
