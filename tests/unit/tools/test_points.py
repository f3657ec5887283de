"""The points of a sweep: all combinations of the swept overrides, each as the run that `train` would get."""

from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.sweep.points import load_points

pytestmark = pytest.mark.slow

RUN = ["model.path=m", "data.train=[a.jsonl]"]


def error_of(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_points([*RUN, *words])
    return str(caught.value)


def test_the_grid_is_the_product_in_hydras_grammar() -> None:
    swept = ["loss=choice(ipo,simpo)", "trainer.seed=range(1,4)", "optim.betas=[0.9,0.95],[0.8,0.99]"]
    points = load_points([*RUN, "loss.beta=0.3", *swept])
    assert len(points) == 2 * 3 * 2
    for words, config in points.items():
        assert [word.partition("=")[0] for word in words] == ["loss", "trainer.seed", "optim.betas"]
        alone = load_run_config([*RUN, "loss.beta=0.3", *words])
        assert config == alone
    assert len({config.run.dir for config in points.values()}) == len(points)


def test_experiments_and_files_are_swept_too(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    for name, beta in (("mild", 0.1), ("strong", 0.9)):
        (tmp_path / f"experiment/{name}.yaml").write_text(f"# @package _global_\nloss: {{beta: {beta}}}")
    points = load_points([*RUN, "+experiment=mild,strong", "optim.lr=1e-6,1e-5"], tmp_path)
    assert [config.loss.beta for config in points.values()] == [0.1, 0.1, 0.9, 0.9]


def test_all_mistakes_of_all_points_are_one_error() -> None:
    text = error_of("loss.kind=sigmoid,ipoo,hinge", "optim.lr=1e-6,fast", "seeds=3", "loss.options.gamma=1")
    assert "loss.kind=ipo" in text
    assert "optim.lr=fast" in text
    assert text.count("there is no key 'seeds'") == 1, "of all points, said once"


def test_rules_are_checked_at_every_point() -> None:
    text = error_of("loss.kind=sigmoid,simpo,nca_pair", "loss.divergence=js")
    assert "simpo" in text
    assert "nca_pair" in text


@pytest.mark.parametrize("swept", ["trainer.log_every=1,2", "loss.beta=0.1,0.1"])
def test_points_of_one_run_are_refused(swept: str) -> None:
    assert "this point is the same run as" in error_of(swept, "loss.kind=ipo,hinge")


def test_a_file_with_a_run_directory_is_told_what_to_add(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: {dir: runs/mine}")
    words = [str(tmp_path / "mine.yaml"), "loss.kind=ipo,hinge"]
    assert "run.dir=null" in error_of(*words)
    assert len(load_points([*RUN, *words, "run.dir=null"])) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.seed=range(1000000000)"], "at most 1,000 points"),
        (["optim.lr=range(0,inf)"], "at most 1,000 points"),
        (["trainer.seed=range(40)", "optim.lr=range(1,41)", "loss=ipo"], "optim.lr=range(1,41)\n"),
        (["trainer.seed=range(5,1)"], "this range has no values"),
        (["loss.beta=[0.1,0.2]"], "no key has several values"),
        (["optim.betas=[0.9,0.95]"], "no key has several values"),
    ],
)
def test_what_cannot_be_listed_is_one_error_at_once(words: list[str], said: str) -> None:
    assert said in error_of(*words)


def test_an_option_that_some_points_do_not_use_is_an_error() -> None:
    text = error_of("loss.kind=sigmoid,ipo,orpo", "loss.beta=0.2,0.3")
    assert "(0.2, orpo): loss.beta has no effect" in text
    assert "(0.3, orpo): loss.beta has no effect" in text
    assert len(load_points([*RUN, "loss.kind=sigmoid,ipo", "loss.beta=0.2,0.3"])) == 4


def test_a_command_without_several_values_is_no_sweep() -> None:
    assert "no key has several values" in error_of("loss.beta=0.1")
    assert len(load_points([*RUN, "trainer.seed=range(1)"])) == 1


def test_an_interval_has_no_points_and_other_verbs_name_the_sweep() -> None:
    assert "loss.beta=0.1,0.2 or 'loss.beta=range(1,4)'" in error_of("loss.beta=interval(0,1)")
    with pytest.raises(ConfigError, match="the verb sweep runs each"):
        load_run_config([*RUN, "loss.beta=0.1,0.2"])


def test_a_swept_key_names_the_run_directory_of_the_point() -> None:
    for config in load_points([*RUN, "loss.beta=0.1,0.2"]).values():
        assert config.run.dir == str(config.identity.default_dir)
