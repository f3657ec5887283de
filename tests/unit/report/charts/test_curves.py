"""The charts of a run from its metrics rows."""

import math
import random

import pytest

from dpo_dist.insight.pages.charts import MOST_LABELS, PANELS, Curves, Panel, charts

LOSS = PANELS[0]


def rows(steps: int = 100, every: int = 20) -> list[dict[str, float]]:
    found = []
    for step in range(1, steps + 1):
        noise = random.Random(step).gauss(0, 0.05)
        found.append({"step": step, "loss": 0.7 + noise, "grad_norm": 2 + noise, "step_seconds": 36.0})
        if step % every == 0:
            found.append({"step": step, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7})
    return found


def test_a_metric_has_values_a_mean_and_evaluations() -> None:
    curves = Curves(rows())
    raw, smooth, evaluation = curves.lines(LOSS)
    assert [line.role for line in (raw, smooth, evaluation)] == ["raw", "smooth", "evaluation"]
    assert curves.steps == list(range(1, 101))
    assert raw.values[0] == rows()[0]["loss"]
    assert [step for step, value in zip(curves.steps, evaluation.values, strict=True) if value] == [
        20,
        40,
        60,
        80,
        100,
    ]


def test_few_values_have_no_mean() -> None:
    assert [line.role for line in Curves(rows(3)).lines(LOSS)] == ["raw"]


def test_an_evaluation_between_logged_steps_interrupts_no_line() -> None:
    curves = Curves(
        [{"step": 10, "loss": 1.0}, {"step": 15, "eval_loss": 1.0}, {"step": 20, "loss": math.nan}]
    )
    raw, evaluation = curves.lines(LOSS)
    assert raw.values[:2] == [1.0, None]
    assert math.isnan(raw.values[2])
    assert evaluation.values == [None, 1.0, None]


def test_a_training_row_without_a_metric_is_a_gap() -> None:
    curves = Curves([{"step": 1, "loss": 1.0, "grad_norm": 2.0}, {"step": 2, "loss": 1.0}])
    (line,) = curves.lines(Panel("x", (("norm", "grad_norm"),)))
    assert line.values[0] == 2.0
    assert math.isnan(line.values[1])


def test_hours_are_those_of_training_steps() -> None:
    logged = [{"step": step, "loss": 1.0, "step_seconds": 36.0} for step in (10, 20)]
    assert Curves([*logged, {"step": 20, "eval_loss": 1.0}]).hours == pytest.approx([0.1, 0.2])
    assert Curves([{"step": 10, "loss": 1.0}]).hours is None


def test_memory_is_in_gibibytes() -> None:
    rows = [{"step": step, "loss": 0.5, "memory/peak_allocated_bytes": 3 * 2**29} for step in (1, 2)]
    (panel,) = [each for each in PANELS if each.unit == "GiB"]
    (line,) = Curves(rows).lines(panel)
    assert line.values == [1.5, 1.5]


def test_labels_of_lengths_are_in_order_and_too_many_sources_are_named_in_the_title() -> None:
    lengths = {f"eval_rewards/accuracies_by_length/{label}": 0.5 for label in ("1024-", "1-63", "128-255")}
    panel = Panel("By length", prefix="rewards/accuracies_by_length/")
    found = Curves([{"step": 1, "eval_loss": 1.0, **lengths}]).labelled(panel)
    assert [label for label, _ in found.curves] == ["1-63", "128-255", "1024-"]
    sources = {f"rewards/accuracies/{n}²": 0.5 for n in range(9)}
    found = Curves([{"step": 1, "loss": 1.0, **sources}]).labelled(
        Panel("By source", prefix="rewards/accuracies/")
    )
    assert (found.title, len(found.curves)) == ("By source (6 of 9)", MOST_LABELS)


def test_a_page_has_the_charts_with_values_only() -> None:
    page = charts(rows())
    assert page.count("<figure") == 3
    assert page.count("axis-switch") == 1
    assert charts([]) == ""


def test_rows_that_count_one_more_spike_are_marked_on_the_loss() -> None:
    history = [row | {"loss_spikes": float((row["step"] > 4) + (row["step"] > 8))} for row in rows(10)]
    curves = Curves(history)
    [spike] = [line for line in curves.lines(PANELS[0]) if line.role == "spike"]
    assert {step: value for step, value in zip(curves.steps, spike.values, strict=True) if value} == {
        step: row["loss"] for row in history if "loss" in row and (step := row["step"]) in (5, 9)
    }
    assert '<path class="spike c1"' in charts(history)
    assert [line.role for panel in PANELS for line in Curves(rows(10)).lines(panel)].count("spike") == 0
    assert [line.role for line in curves.over(curves.steps, PANELS[0], "run")].count("spike") == 0
