"""Make the preference records of `pairs.method`: the only module that connects the parts of this room."""

from collections.abc import Callable
from typing import Protocol

from dpo_dist.config.pairs_schema import PairsMethod
from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import ConfigError
from dpo_dist.generation.from_scores import pairs_from_scores
from dpo_dist.generation.people import label_pairs


class Screen(Protocol):
    """The part of the console that this room uses."""

    def say(self, text: str) -> None:
        """Print one line and log it."""

    def show(self, text: str) -> None:
        """Print one line without logging it."""

    def alarm(self, text: str) -> None:
        """Print and log an error."""

    def heartbeat(self, work: str) -> Callable[[float], None]:
        """Return a function that prints the seconds spent on `work`, once a minute."""


def make_pairs(config: RunConfig, screen: Screen) -> None:
    """Write the preference records of `config.pairs`, and all responses with their scores.

    Raises:
        DpoDistError: they cannot be made.
    """
    match config.pairs.method:
        case PairsMethod.scores:
            pairs_from_scores(config, screen.say)
        case PairsMethod.people:
            label_pairs(config, screen.say, screen.show)
        case _:
            raise ConfigError(
                "this method is not available yet",
                where="pairs.method",
                got=config.pairs.method,
                remedy="set pairs.method=scores",
            )
