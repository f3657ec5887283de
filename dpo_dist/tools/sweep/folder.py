"""The files of a sweep."""

from pathlib import Path

from dpo_dist.kit import PathBelow, RunFolder


class SweepFolder(RunFolder):
    """The folder of a sweep."""

    sweep = PathBelow("sweep.json")
    """The results of a sweep, in its folder."""

    def point_screen(self, run: RunFolder) -> Path:
        """Return the file with what a point of the sweep in this folder would print on the screen."""
        return self.logs / f"{run.path.name}.log"
