"""Make the preference records of `pairs.method`: the only module that connects the parts of this room."""

from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

from dpo_dist.config.pairs_schema import PairsMethod
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.generation.from_scores import pairs_from_scores
from dpo_dist.generation.labelling.people import label_pairs
from dpo_dist.generation.lock import locked

if TYPE_CHECKING:
    from dpo_dist.generation.stages import Screen


def make_pairs(config: RunConfig, screen: "Screen") -> None:
    """Write the preference records of `config.pairs`, and all responses with their scores.

    Raises:
        DpoDistError: they cannot be made.
    """
    match config.pairs.method:
        case PairsMethod.scores:
            with _only_start(config):
                pairs_from_scores(config, screen.say)
        case PairsMethod.samples | PairsMethod.delta:
            _from_models(config, screen)
        case PairsMethod.people:
            label_pairs(config, screen.say, screen.show)


def _from_models(config: RunConfig, screen: "Screen") -> None:
    """Join the processes, each of which loads whole models."""
    from dpo_dist.generation.from_models import MEMORY_REMEDY, pairs_from_models  # noqa: PLC0415  (slow)
    from dpo_dist.generation.stages import joined_stages  # noqa: PLC0415

    with ExitStack() as held, joined_stages(config, screen, MEMORY_REMEDY) as stages:
        stages.world.on_main(lambda: held.enter_context(_only_start(config)))
        pairs_from_models(config, stages)


def _only_start(config: RunConfig) -> AbstractContextManager[int]:
    """Lock the folder of pairs of the run directory: two starts would write the same parts."""
    folder = RunFolder.of(config)
    remedy = "wait until it ends, or set another run.dir"
    return locked(folder.pairs / folder.lock.name, "makes pairs in this run directory", remedy)
