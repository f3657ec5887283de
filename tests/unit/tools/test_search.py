"""A search without training: what it tells optuna of runs, and what a kill anywhere leaves."""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.foundation.errors import ConfigError, ExitCode, RunOutcome
from dpo_dist.tools.sweep.folder import SweepFolder
from dpo_dist.tools.sweep.points import Points, SearchSpace, load_points
from dpo_dist.tools.sweep.pool import Pool, Words, is_finished
from dpo_dist.tools.sweep.results import sweep_lines, sweep_results
from dpo_dist.training.start.run_state import RunState, write_state

optuna = pytest.importorskip("optuna")
from optuna.storages.journal import JournalFileBackend  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from dpo_dist.tools.sweep.search import Search  # noqa: E402

pytestmark = pytest.mark.slow

BY = "eval_rewards/accuracies"
SPACE = ("optim.lr=tag(log, interval(1e-6,1e-3))", "optim.warmup_steps=interval(0,9)", "loss=sigmoid,ipo")
Train = Callable[[RunConfig], RunOutcome]


def space_in(folder: Path, *words: str, by: str = BY) -> SearchSpace:
    common = ["model.path=m", "data.train=[a.jsonl]", "data.eval_share=0.1", f"run.root={folder}"]
    space = load_points([*common, f"sweep.by={by}", *words])
    assert isinstance(space, SearchSpace)
    return space


def search_in(folder: Path, space: SearchSpace, said: list[str] | None = None) -> Search:
    console = Console(LineScreen([].append if said is None else said.append))
    (folder / "sweep").mkdir(exist_ok=True)
    return Search(space, SweepFolder(folder / "sweep"), console)


def study_in(folder: Path) -> "optuna.Study":
    """The study as a stranger reads it."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "sweep/study.journal")))
    return optuna.load_study(study_name=None, storage=storage)


def evaluate(config: RunConfig, *values: float, metric: str = BY) -> None:
    """Write the evaluations of a run, before its first step and every two steps."""
    run = RunFolder(config.run.path)
    run.metrics.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 2 * number, "epoch": 0.1, metric: value} for number, value in enumerate((0.0, *values))]
    run.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))


def end(config: RunConfig, outcome: RunOutcome) -> RunOutcome:
    write_state(RunFolder(config.run.path), RunState(outcome, 4, {"run_digest": config.identity.digest}))
    return outcome


def score(config: RunConfig) -> float:
    return 1000 * config.optim.lr - 0.01 * config.optim.warmup_steps


def complete(config: RunConfig) -> RunOutcome:
    assert not is_finished(config), "it was trained again"
    evaluate(config, 0.1, score(config))
    return end(config, RunOutcome.completed)


CODES = {RunOutcome.diverged: ExitCode.diverged, RunOutcome.preempted: ExitCode.preempted}


def run(search: Search, train: Train = complete) -> list[Words]:
    """The points that a search trains, one at a time."""
    trained = []
    for words in search.waiting():
        trained.append(words)
        outcome = train(search.points[words])
        search.codes[words] = CODES.get(outcome, ExitCode.completed)
        search.ends[words] = (outcome, "")
        search.ended(words)
    return trained


def test_a_search_trains_what_optuna_samples_and_optuna_reads_it(tmp_path: Path) -> None:
    space = space_in(tmp_path, *SPACE, "sweep.trials=15")
    search = search_in(tmp_path, space)
    trained = run(search)
    assert len(set(trained)) == 15
    study = study_in(tmp_path)
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    for trial, words in zip(study.trials, trained, strict=True):
        config = search.points[words]
        assert trial.state is TrialState.COMPLETE
        assert trial.value == score(config)
        assert trial.intermediate_values == {2: 0.1, 4: trial.value}, "not the one before the first step"
        assert trial.params["optim.lr"] == config.optim.lr
        assert trial.params["optim.warmup_steps"] == config.optim.warmup_steps
        assert config == space.load(words)
        assert trial.params["optim.lr"] == float(f"{trial.params['optim.lr']:.4g}"), "of few digits"
    rates = [trial.params["optim.lr"] for trial in study.trials]
    assert sum(rate < 3e-5 for rate in rates[:10]) in range(2, 9), "on a logarithmic scale"
    found = search.facts()
    assert found["trials"] == {"completed": 15}
    best = max(trained, key=lambda words: score(search.points[words]))
    settings = found["best"]["settings"]
    assert [f"{key}={value}" for key, value in settings.items()] == list(best)
    assert type(settings["optim.lr"]) is float
    assert found["best"]["value"] == study.best_value
    results = sweep_results(search.points, search.ends, SweepFolder(tmp_path / "sweep"), found)
    assert results["search"] == found
    assert [row["outcome"] for row in results["points"]] == ["completed"] * 15
    page = tmp_path / "report.html"
    (line,) = (line for line in sweep_lines(results, search.points, page) if line.startswith("best"))
    assert line.split()[1:4] == [*best[:-1], f"{best[-1]}:"]
    assert "Search: accuracy" in page.read_text()
    found["values"] = dict.fromkeys(found["values"], study.best_value)
    assert sweep_lines(results, search.points, page)[-2].endswith(", one of 15 trials with this value")


def test_another_seed_is_another_search_and_the_lowest_loss_is_the_best(tmp_path: Path) -> None:
    trained = []
    for seed in (0, 1):
        space = space_in(tmp_path, SPACE[0], f"trainer.seed={seed}", "sweep.trials=3", by="eval_loss")
        search = search_in(tmp_path, space)
        losses = iter((0.5, 0.4, 0.6))

        def train(config: RunConfig, losses: Iterator[float] = losses) -> RunOutcome:
            evaluate(config, next(losses), metric="eval_loss")
            return end(config, RunOutcome.completed)

        trained += run(search, train)
        assert search.facts()["best"]["value"] == 0.4
    assert len(set(trained)) == 6


def test_a_search_that_is_killed_anywhere_ends_as_one_that_was_not(tmp_path: Path) -> None:
    words = [*SPACE, "sweep.trials=3"]
    whole = tmp_path / "whole"
    wanted = run(search_in(whole, space_in(whole, *words))) if whole.mkdir() is None else []
    lines = (whole / "sweep/study.journal").read_bytes().splitlines(keepends=True)
    lengths = list(accumulate(map(len, lines)))
    assert len(lines) > 20
    for length in [*lengths, lengths[-1] - 5, lengths[8] + 7]:  # the last two inside of a line
        folder = tmp_path / str(length)
        (folder / "sweep").mkdir(parents=True)
        kept = b"".join(lines)[:length]
        (folder / "sweep/study.journal").write_bytes(kept)
        (folder / "sweep/study.journal.lock").symlink_to("gone")  # which optuna would wait for
        # The configuration of the runs is the same, so that the study is.
        search = search_in(folder, space_in(whole, *words))
        trained = run(search, lambda config: RunOutcome.completed)
        assert trained == [], "runs that are complete are told, not trained"
        assert list(search.points) == wanted
        trials = study_in(folder).trials
        assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
        assert [trial.value for trial in trials] == [score(search.points[each]) for each in wanted]


def test_a_damaged_line_of_the_journal_is_named(tmp_path: Path) -> None:
    space = space_in(tmp_path, *SPACE, "sweep.trials=1")
    run(search_in(tmp_path, space))
    journal = tmp_path / "sweep/study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], lines[2][:20] + b"\n", *lines[3:]]))
    with pytest.raises(ConfigError, match="damaged") as caught:
        search_in(tmp_path, space)
    assert caught.value.where == str(journal)


def test_failed_and_stopped_points_continue_with_the_same_values(tmp_path: Path) -> None:
    space = space_in(tmp_path, *SPACE, "sweep.trials=2")
    for outcome in (RunOutcome.started, RunOutcome.preempted):
        trained = run(search_in(tmp_path, space), lambda config, as_=outcome: end(config, as_))
        assert len(trained) == 2
    assert run(search_in(tmp_path, space)) == trained
    assert run(search_in(tmp_path, space)) == []
    more = space_in(tmp_path, *SPACE, "sweep.trials=3")
    search = search_in(tmp_path, more)
    assert len(run(search)) == 1
    assert set(trained) < set(search.points)
    assert len(study_in(tmp_path).trials) == 3


def test_a_point_that_diverges_is_bad_and_not_tried_again(tmp_path: Path) -> None:
    space = space_in(tmp_path, *SPACE, "sweep.trials=2")
    assert len(run(search_in(tmp_path, space), lambda config: end(config, RunOutcome.diverged))) == 2
    search = search_in(tmp_path, space)
    assert run(search) == []
    assert search.facts()["trials"] == {"diverged": 2}
    assert search.facts()["best"] is None
    assert {trial.state for trial in study_in(tmp_path).trials} == {TrialState.PRUNED}


def test_values_that_are_sampled_again_are_trained_once(tmp_path: Path) -> None:
    search = search_in(tmp_path, space_in(tmp_path, "loss=sigmoid,ipo", "sweep.trials=8"))

    def train(config: RunConfig) -> RunOutcome:
        assert not is_finished(config)
        evaluate(config, 0.5)
        return end(config, RunOutcome.completed)

    assert len(run(search, train)) <= 2
    trials = study_in(tmp_path).trials
    assert [trial.value for trial in trials] == [0.5] * 8


def test_values_that_are_sampled_again_wait_for_the_point_that_trains(tmp_path: Path) -> None:
    search = search_in(tmp_path, space_in(tmp_path, "loss=sigmoid,ipo", "sweep.trials=8"))
    at_once = list(search.waiting())
    assert len(at_once) <= 2
    for words in at_once:
        evaluate(search.points[words], 0.7)
        end(search.points[words], RunOutcome.completed)
        search.ended(words)
    assert [trial.value for trial in study_in(tmp_path).trials] == [0.7] * 8


def good_trials(folder: Path, space: SearchSpace, values: tuple[float, ...]) -> None:
    """Add five trials of somebody else to a study."""
    study = study_in(folder)
    given = study.trials[0]
    for _ in range(5):
        trial = optuna.trial.create_trial(
            params=given.params,
            distributions=given.distributions,
            value=values[-1],
            intermediate_values={2 * number + 2: value for number, value in enumerate(values)},
        )
        study.add_trial(trial)


def test_a_point_below_the_median_of_the_others_is_stopped_once_and_said(tmp_path: Path) -> None:
    space = space_in(tmp_path, "optim.lr=interval(1e-6,1e-3)", "sweep.trials=7")
    said = list[str]()
    (first,) = [next(search_in(tmp_path, space).waiting())]
    good_trials(tmp_path, space, (0.6, 0.9))
    search = search_in(tmp_path, space, said)
    waiting = search.waiting()
    assert next(waiting) == first
    evaluate(search.points[first], 0.8)
    assert not search.is_hopeless(first)
    evaluate(search.points[first], 0.8, 0.85)
    assert search.is_hopeless(first)
    assert not search.is_hopeless(first), "a second signal would end it without saving"
    assert f"{first[0]}: stops, {BY} 0.85 at step 4 is worse than the median of other trials" in said
    search.codes[first] = ExitCode.preempted
    search.ended(first)
    assert search.codes[first] == ExitCode.completed, "the sweep is not to be repeated for it"
    assert search.ends[first] == ("pruned", "")
    second = next(waiting)
    evaluate(search.points[second], 0.5)
    # The search is killed here: at the next start the point is not begun again.
    search = search_in(tmp_path, space)
    assert list(search.waiting()) == []
    assert search.facts()["trials"]["pruned"] == 2
    assert search.ends[first] == search.ends[second] == ("pruned", "")


def test_a_stopped_point_that_has_ended_before_counts_as_complete(tmp_path: Path) -> None:
    space = space_in(tmp_path, "optim.lr=interval(1e-6,1e-3)", "sweep.trials=6")
    (words,) = [next(search_in(tmp_path, space).waiting())]
    good_trials(tmp_path, space, (0.6, 0.9))
    search = search_in(tmp_path, space)
    assert next(search.waiting()) == words
    evaluate(search.points[words], 0.1)
    assert search.is_hopeless(words)
    evaluate(search.points[words], 0.1, 0.95)
    end(search.points[words], RunOutcome.completed)
    search.ended(words)
    assert study_in(tmp_path).best_value == 0.95


def test_a_metric_that_the_evaluations_lack_ends_the_search_at_its_first_point(tmp_path: Path) -> None:
    search = search_in(tmp_path, space_in(tmp_path, SPACE[0], "sweep.trials=3", by=f"{BY}/web"))

    def train(config: RunConfig) -> RunOutcome:
        evaluate(config, 0.5)
        return end(config, RunOutcome.completed)

    with pytest.raises(ConfigError, match="do not have this metric"):
        run(search, train)


def test_a_point_of_a_launcher_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    """The first one of three waits for the last, which starts in the place of the second."""
    program = tmp_path / "launcher.py"
    program.write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "here, folder = Path(sys.argv[0]).parent, Path(sys.argv[sys.argv.index('--config-dir') + 1])\n"
        "(here / folder.name).with_suffix('.began').touch()\n"
        "until, is_first = time.monotonic() + 40, 'seed: 1' in "
        "(folder / 'experiment/round.yaml').read_text()\n"
        "while is_first and len([*here.glob('*.began')]) < 3:\n"
        "    time.sleep(0.05)\n    assert time.monotonic() < until\n"
    )
    words = ["model.path=m", "data.train=[a.jsonl]", f"run.root={tmp_path}", "trainer.seed=1,2,3"]
    points: Points = load_points([*words, f"sweep.launcher='{sys.executable} {program}'", "sweep.parallel=2"])
    folder = SweepFolder(tmp_path / "sweep")
    folder.logs.mkdir(parents=True)
    settings = next(iter(points.values())).sweep
    pool = Pool(points, folder, Console(LineScreen([].append)), settings)
    assert not pool.run(iter(points))
    assert set(pool.codes.values()) == {0}, [file.read_text() for file in folder.logs.glob("*.log")]
