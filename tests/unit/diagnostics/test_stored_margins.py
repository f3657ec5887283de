"""Nearness of the two sides of a stored pair: of the tokens that the loss counts."""

from pathlib import Path

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.data.build import prepare_dataset
from dpo_dist.data.dataset import open_dataset
from dpo_dist.insight.doctor.margins import NEARLY_EQUAL, _distance
from tests.support import tiny
from tests.support.doctor_data import write
from tests.support.records import assistant, user


def test_a_long_equal_turn_that_the_loss_does_not_count_makes_no_near_sides(tmp_path: Path) -> None:
    shared = user("and then the cat sat on the mat " * 20)
    sides = {
        "chosen": [assistant("Red."), shared, assistant("It slept.")],
        "rejected": [assistant("Blue"), shared, assistant("No idea.")],
    }
    source = SourceConfig(write(tmp_path / "a.jsonl", [{"prompt": [user("Which colour?")], **sides}]))
    data = DataConfig(cache=str(tmp_path / "encoded"), max_length=4096)
    dataset = open_dataset(prepare_dataset([source], data, tiny.qwen(), "qwen"), data)
    first, last = map(int, dataset.trained_tokens[:])
    assert 5 * first < dataset.lengths(0)[1]
    assert _distance(dataset, 0, first, last) > 3 * NEARLY_EQUAL
