"""The verb `sweep`, and its keys."""

from dpo_dist.foundation.fields import key, schema, section
from dpo_dist.kit import Extension, Verb


@schema
class SweepConfig:
    """How the points of a sweep are run."""

    part: str = key("1/1", pattern=r"^[1-9]\d*/[1-9]\d*$", accepts="I/N, from 1/N to N/N")
    """The part of the points that this job trains, of N jobs."""

    @property
    def share(self) -> tuple[int, int]:
        """Index of this job's part, from 0, and the number of parts."""
        number, parts = map(int, self.part.split("/"))
        return number - 1, parts


EXTENSION = Extension(
    verbs={
        "sweep": Verb(
            "dpo_dist.tools.sweep",
            "train a run for each point of a grid of values",
            ("model.path", "data.train"),
            is_one_process=True,
        ),
    },
    sections={"sweep": section(SweepConfig, free=True, verbs="sweep")},
    rules="dpo_dist.tools.sweep.points",
)
