"""The dashboard: panels of metrics that exist, as wandb-workspaces sends them."""

import json
from pathlib import Path

import pytest

from dpo_dist.config.keys import all_keys
from dpo_dist.config.losses import LossConfig
from dpo_dist.generation import text_facts
from dpo_dist.insight.metrics.log import BEST, COLUMNS
from dpo_dist.insight.metrics.trackers import MARGINS, STEP_AXIS, wandb_names
from dpo_dist.objective.metrics import MetricPlan
from scripts import wandb_dashboard
from scripts.wandb_dashboard import COMPARED, RESULTS, SECTIONS, Panel
from tests.support.wandb_server import WandbServer

PANELS = [panel for panels in SECTIONS.values() for panel in panels]


def test_metrics_of_panels_and_of_best_values_exist() -> None:
    evaluated = MetricPlan(LossConfig(), ("a", "b"), is_evaluation=True).names
    row = dict.fromkeys([*COLUMNS, *(f"eval_{name}" for name in evaluated)], 0.0)
    names = {*wandb_names(row), MARGINS}
    found = {name for panel in PANELS if panel.needs != "samples" for name in panel.missing(names)}
    assert found == set()
    assert row.keys() >= set(BEST)
    assert names >= set(RESULTS)
    assert set(COMPARED) <= set(all_keys())
    text = Path(text_facts.__file__).read_text()
    of_samples = [name for panel in PANELS if panel.needs == "samples" for name in panel.metrics]
    assert all(f'"{name.removeprefix("eval/samples/")}"' in text for name in of_samples)
    panel = Panel("a title", ("train/loss", "train/lost"), pattern="^eval/by_source/.")
    assert panel.missing(["train/loss", "eval/by_source"]) == ["train/lost", "^eval/by_source/."]


def test_check_prints_every_panel_and_a_project_needs_an_entity(capsys: pytest.CaptureFixture[str]) -> None:
    assert wandb_dashboard.main(["entity/project", "--check"]) == 0
    printed = capsys.readouterr().out
    assert all(panel.title in printed for panel in PANELS)
    with pytest.raises(SystemExit):
        wandb_dashboard.main(["project"])
    assert "expected ENTITY/PROJECT" in capsys.readouterr().err


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
        (view,) = server.views
    assert server.url in capsys.readouterr().out
    assert (view["entityName"], view["projectName"]) == ("entity", "project")
    model = reports.Spec if report else workspaces.WorkspaceViewspec
    model.model_validate_json(view["spec"])
    shown = [*(json.dumps(panel.title) for panel in PANELS), STEP_AXIS, *(group[1:])]
    assert [each for each in shown if each not in view["spec"]] == []
