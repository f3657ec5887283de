"""The dashboard as data, and as wandb-workspaces sends it."""

import json
from pathlib import Path
from typing import Any

import pytest
import wandb

from dpo_dist.config.keys import all_keys
from dpo_dist.config.losses import LossConfig
from dpo_dist.generation import text_facts
from dpo_dist.insight.metrics.log import COLUMNS
from dpo_dist.insight.metrics.names import BEST, MARGINS, SAMPLES, STEP_AXIS, wandb_names
from dpo_dist.insight.metrics.wandb_dashboard import COMPARED, RESULTS, SECTIONS, Panel
from dpo_dist.objective.metrics import MetricPlan
from scripts import wandb_dashboard
from tests.support.wandb_server import WandbServer

PANELS = [panel for panels in SECTIONS.values() for panel in panels]
PERCENTILES = [f"rewards/margins/p{percent}" for percent in ("05", "25", "50", "75", "95")]


def known_names() -> set[str]:
    steps = [*COLUMNS, *MetricPlan(LossConfig(), ("a", "b")).names]
    evaluations = [*MetricPlan(LossConfig(), ("a", "b"), is_evaluation=True).names, *PERCENTILES]
    row = dict.fromkeys([*steps, *(f"eval_{name}" for name in evaluations)], 0.0)
    return {*wandb_names(row), MARGINS}


def test_metrics_of_panels_and_of_best_values_exist() -> None:
    names = known_names()
    missing = {name for panel in PANELS if panel.needs != "samples" for name in panel.missing(names)}
    assert missing == set()
    assert set(BEST) | set(RESULTS) <= names
    assert set(COMPARED) <= set(all_keys())


def test_a_missing_metric_and_an_unmatched_pattern_are_found() -> None:
    panel = Panel("a title", ("train/loss", "train/lost"), pattern="^eval/by_source/.")
    assert panel.missing(["train/loss", "eval/by_source"]) == ["train/lost", "^eval/by_source/."]


def test_metrics_of_samples_are_those_of_generated_texts() -> None:
    text = Path(text_facts.__file__).read_text()
    shown = [name for panel in PANELS if panel.needs == "samples" for name in panel.metrics]
    assert all(f'"{name.removeprefix("eval/samples/")}"' in text for name in shown)


def test_check_prints_every_panel(capsys: pytest.CaptureFixture[str]) -> None:
    assert wandb_dashboard.main(["entity/project", "--check"]) == 0
    printed = capsys.readouterr().out
    assert all(panel.title in printed for panel in PANELS)


def test_a_project_without_entity_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        wandb_dashboard.main(["project"])
    assert "expected ENTITY/PROJECT" in capsys.readouterr().err


def test_a_missing_key_is_an_error_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(page: Any) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(pytest.importorskip("wandb_workspaces.workspaces").Workspace, "save", save)
    assert wandb_dashboard.main(["entity/project"]) == 2
    assert capsys.readouterr().err == (
        "wandb_dashboard.py: error: No API key configured. Use `wandb login` to log in.\n"
    )


def test_the_workspace_has_every_panel_on_the_axis_of_steps() -> None:
    pytest.importorskip("wandb_workspaces")
    view = wandb_dashboard.workspace("entity", "project", "a name")._to_model()
    sections = view.spec.section.panel_bank_config.sections
    assert [section.name for section in sections][: len(SECTIONS) + 1] == ["Verdict", *SECTIONS]
    kinds = [panel.view_type for section in sections for panel in section.panels]
    assert (kinds.count("Run Comparer"), kinds.count("Weave")) == (1, 1)
    tables = [panel for section in sections for panel in section.panels if panel.view_type == "Weave"]
    assert SAMPLES in str(tables[0].config)
    configs = [
        panel.config
        for section in sections
        for panel in section.panels
        if panel.view_type == "Run History Line Plot"
    ]
    assert [config.chart_title for config in configs] == [panel.title for panel in PANELS]
    assert {config.x_axis for config in configs} == {STEP_AXIS}
    assert [config.metrics or [] for config in configs] == [list(panel.metrics) for panel in PANELS]


def test_the_report_of_a_sweep_has_every_panel_and_the_runs_of_the_group() -> None:
    pytest.importorskip("wandb_workspaces")
    page = wandb_dashboard.sweep_report("entity", "project", "a title", "my sweep")
    grids = [block for block in page.blocks if hasattr(block, "panels")]
    plots = [panel.title for grid in grids[1:] for panel in grid.panels if hasattr(panel, "title")]
    assert plots == [panel.title for panel in PANELS]
    assert all("my sweep" in str(runs.filters) for grid in grids for runs in grid.runsets)
    assert len(grids[0].panels[0].columns) == len(COMPARED) + len(RESULTS)


@pytest.mark.usefixtures("own_wandb")
@pytest.mark.parametrize("report", [False, True])
def test_a_server_gets_a_page_that_wandb_workspaces_reads_back(
    report: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    from wandb_workspaces.reports.v2 import internal as reports
    from wandb_workspaces.workspaces import internal as workspaces

    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        group = ["--report", "my sweep"] if report else []
        assert wandb_dashboard.main(["entity/project", *group]) == 0
        (view,) = server.views()
    assert server.url in capsys.readouterr().out
    assert (view["entityName"], view["projectName"]) == ("entity", "project")
    model = reports.Spec if report else workspaces.WorkspaceViewspec
    read = model.model_validate_json(view["spec"])
    assert read.model_dump_json(by_alias=True).count("panels") >= len(SECTIONS)
    titles = [json.dumps(panel.title) for panel in PANELS]
    assert all(title in view["spec"] for title in titles)
