"""The first lines of a start: run directory, model, data, processes, steps."""

from collections.abc import Sequence

from dpo_dist.config.data_schema import SourceConfig
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.sampler import BatchSampler
from dpo_dist.distributed.world import World
from dpo_dist.number_text import counted, first_few, percent
from dpo_dist.report.terminal.console import Console


def say_header(config: RunConfig, world: World, console: Console) -> None:
    """Print everything that is known before the data are read."""
    hosts = len({peer.host for peer in world.peers})
    processes = counted(world.size, "process", "processes")
    share = f"{config.data.eval_share:g} of them" if config.data.eval_share else "none"
    console.say(f"run directory: {RunFolder.of(config)}")
    console.say(f"model: {config.model.path}, {config.model.dtype}, {config.parallelism.kind}")
    console.say(f"data: {_sources(config.data.train)}; evaluation: {_sources(config.data.eval) or share}")
    console.say(f"world: {processes} on {counted(hosts, 'host')}, {world.device.type}")
    if world.sequence is not None:
        console.say(f"world: in groups of {world.sequence.ranks} that share the tokens of each micro-batch")


def say_steps(sampler: BatchSampler, first: int, ema_decay: float | None, console: Console) -> None:
    """Print the number of steps, of which `first` are done, and how much a moving average forgets in them."""
    pairs = counted(sampler.global_batch_pairs, "pair")
    left = f", {first:,} of them done" if first else ""
    console.say(f"training: {counted(sampler.steps, 'step')} of {pairs}{left}")
    if ema_decay is not None:
        kept = percent(ema_decay**sampler.steps)
        console.say(f"moving average of the weights: at the end {kept} of it are the weights at the start")


def _sources(sources: Sequence[SourceConfig]) -> str:
    return first_few([source.path for source in sources])
