"""The charts of a run from its metrics rows, on its page and as an image."""

import math
import random
from pathlib import Path

import pytest
from matplotlib.image import imread

from dpo_dist.insight.pages.charts import PANELS, Panel, charts, draw_curves, panel_lines, rows_by_step
from dpo_dist.insight.pages.svg import COLORS, Line

LOSS = PANELS[0]


def rows(steps: int = 100, every: int = 20) -> list[dict[str, float]]:
    found = []
    for step in range(1, steps + 1):
        noise = random.Random(step).gauss(0, 0.05)
        found.append({"step": step, "loss": 0.7 + noise, "grad_norm": 2 + noise, "step_seconds": 36.0})
        if step % every == 0:
            found.append({"step": step, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7})
    return found


def lines_of(history: list[dict[str, float]], panel: Panel = LOSS) -> list[Line]:
    return list(panel_lines(panel, rows_by_step(history)))


def test_a_metric_has_values_a_mean_and_evaluations() -> None:
    raw, smooth, evaluation = lines_of(rows())
    assert [line.role for line in (raw, smooth, evaluation)] == ["raw", "smooth", "evaluation"]
    assert raw.values[0] == rows()[0]["loss"]
    assert [step for step, value in enumerate(evaluation.values, 1) if value] == [20, 40, 60, 80, 100]
    assert [line.role for line in lines_of(rows(3))] == ["raw"]


def test_an_evaluation_between_logged_steps_interrupts_no_line_and_a_missing_metric_is_a_gap() -> None:
    raw, evaluation = lines_of(
        [{"step": 10, "loss": 1.0}, {"step": 15, "eval_loss": 1.0}, {"step": 20, "loss": math.nan}]
    )
    assert raw.values[:2] == [1.0, None]
    assert math.isnan(raw.values[2])
    assert evaluation.values == [None, 1.0, None]
    history = [{"step": 1, "loss": 1.0, "grad_norm": 2.0}, {"step": 2, "loss": 1.0}]
    (line,) = lines_of(history, Panel("x", ("grad_norm",)))
    assert line.values[0] == 2.0
    assert math.isnan(line.values[1])


def test_sources_have_a_chart_of_as_many_as_there_are_colours() -> None:
    sources = {f"eval_rewards/accuracies/{n}²": 0.5 for n in range(9)}
    panel = Panel("By source", ("rewards/accuracies",), by_source=True)
    labels = [line.label for line in lines_of([{"step": 1, "eval_loss": 1.0, **sources}], panel)]
    assert labels == [f"{n}²" for n in range(len(COLORS))]


def test_a_page_has_the_charts_with_values_only() -> None:
    assert len(charts(rows())) == 3
    assert charts([]) == []


def test_rows_that_count_one_more_spike_are_marked_on_the_loss() -> None:
    history = [row | {"loss_spikes": float((row["step"] > 4) + (row["step"] > 8))} for row in rows(10)]
    [spike] = [line for line in lines_of(history) if line.role == "spike"]
    losses = {row["step"]: row["loss"] for row in history if "loss" in row}
    assert {step: value for step, value in enumerate(spike.values, 1) if value} == {
        step: losses[step] for step in (5, 9)
    }
    assert '<path class="spike c1"' in charts(history)[0]


def training_row(step: int) -> dict[str, float]:
    sides = {"rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/margins": 0.2}
    return {"step": step, "loss": 0.7, "rewards/accuracies": 0.5, **sides, "learning_rate": 0.0}


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([], id="none"),
        pytest.param([training_row(1)], id="one"),
        pytest.param(rows(), id="evaluated"),
        pytest.param([{"step": 5, "loss": math.nan, "grad_norm": math.inf}], id="not finite"),
        pytest.param([{"step": 0, "eval_loss": 0.6}], id="evaluation only"),
        pytest.param([training_row(step) for step in range(5000)], id="long"),
        pytest.param([{"step": step, "loss": 2.0**step} for step in range(1000)], id="diverged"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_rows_give_one_image(tmp_path: Path, history: list[dict[str, float]]) -> None:
    path = tmp_path / "training_curves.png"
    draw_curves(history, path, r"a $run\_{$ <b>")
    assert imread(path).shape == (800, 1600, 4)
    assert list(tmp_path.iterdir()) == [path]
