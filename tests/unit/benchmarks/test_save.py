"""The benchmark of saving measures both ways on every size."""

from argparse import Namespace
from pathlib import Path

import torch

from benchmarks.save import Training, _measure
from tests.support.alone import ALONE


def test_both_ways_are_measured_and_leave_nothing(tmp_path: Path) -> None:
    training = Training({part: torch.ones(1000) for part in ("weight", "exp_avg", "exp_avg_sq")}, 1)
    measured = _measure(training, Namespace(work=tmp_path, rounds=1), ALONE)
    assert {name.rpartition(" ")[0] for name in measured} >= {"held", "held behind,", "slower at once,"}
    assert all(measured[f"held {way}, s"] > 0 for way in ("at once", "behind"))
    assert list(tmp_path.iterdir()) == []
