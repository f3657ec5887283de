"""Save the W&B dashboard of dpo_dist in a project, or a report about the runs of a group (a sweep).

    .venv/bin/python -m pip install -c constraints.txt -e ".[dashboard]"
    .venv/bin/python scripts/wandb_dashboard.py ENTITY/PROJECT
    .venv/bin/python scripts/wandb_dashboard.py ENTITY/PROJECT --report GROUP

`--check` prints the panels and saves nothing.
"""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_dist.foundation.errors import ExitCode
from dpo_dist.training.reporting.wandb_run import MARGINS, SAMPLES, STEP_AXIS

Needs = Literal["", "reference", "evaluations", "samples", "sources"]


@dataclass(frozen=True)
class Panel:
    """Curves over `train/global_step`; W&B shows a histogram's counts by color.

    Attributes:
        title: text above the curves.
        metrics: W&B names of the curves.
        pattern: regular expression of further names, for metrics by source or length.
        needs: part of a run that fills the panel.
    """

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str = ""
    needs: Needs = ""

    def missing(self, logged: Collection[str]) -> list[str]:
        """Return the panel's metrics and pattern that match none of these W&B names."""
        unmatched = self.pattern and not any(re.search(self.pattern, name) for name in logged)
        return [name for name in self.metrics if name not in logged] + ([self.pattern] if unmatched else [])


def _steps_and_evaluations(name: str) -> tuple[str, str]:
    """Return a metric's W&B names: of steps and of evaluations."""
    return f"train/{name}", f"eval/{name}"


def _sides(name: str, where: str = "train") -> tuple[str, str]:
    """Return a metric's W&B names: of chosen and of rejected responses."""
    return f"{where}/{name.format('chosen')}", f"{where}/{name.format('rejected')}"


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Preference": (
        Panel("Loss", _steps_and_evaluations("loss")),
        Panel("Accuracy: chosen above rejected", _steps_and_evaluations("rewards/accuracies")),
        Panel("Margin of rewards", _steps_and_evaluations("rewards/margins")),
        Panel("Rewards", _sides("rewards/{}")),
        Panel("Rewards, evaluation", _sides("rewards/{}", "eval"), needs="evaluations"),
        Panel("Accuracy by source", pattern="^eval/rewards/accuracies/.", needs="sources"),
        Panel("Margins of the pairs of an evaluation", (MARGINS,), needs="evaluations"),
        Panel("Log-prob per token", _sides("logps/{}_per_token")),
        Panel("Distance from the reference, nats per token", _sides("distance/{}"), needs="reference"),
        Panel("Gradient norm", ("train/grad_norm",)),
        Panel("Learning rate", ("train/learning_rate",)),
    ),
    "Samples": (
        Panel("Length of a response, tokens", ("eval/samples/length",), needs="samples"),
        Panel("Ended by itself", ("eval/samples/finished",), needs="samples"),
        Panel("Distinct 3-grams", ("eval/samples/distinct_3",), needs="samples"),
        Panel("Longest repeat", ("eval/samples/longest_repeat",), needs="samples"),
    ),
}
"""Panels by section, in the page's order."""

COMPARED = ("loss.kind", "loss.beta", "optim.lr", "trainer.seed")
"""Keys of the configuration that a report about several runs compares."""
RESULTS = ("eval/rewards/accuracies", "eval/rewards/margins", "eval/loss")
"""Results that such a report compares."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("--name", default="dpo_dist", help="name of the dashboard or title of the report")
    parser.add_argument("--report", metavar="GROUP", help="report about the runs of this WANDB_RUN_GROUP")
    parser.add_argument("--check", action="store_true", help="print the panels and save nothing")
    options = parser.parse_args(arguments)
    entity, _, project = options.project.partition("/")
    if not (entity and project):
        parser.error(f"expected ENTITY/PROJECT, got {options.project}")
    if options.check:
        _print_panels()
        return 0
    try:
        import wandb
        import wandb_workspaces
    except ImportError:
        parser.error(
            "wandb-workspaces is missing: .venv/bin/pip install -c constraints.txt -e '.[dashboard]'"
        )
    del wandb_workspaces
    if options.report:
        page = sweep_report(entity, project, options.name, options.report)
    else:
        page = workspace(entity, project, options.name)
    try:
        page.save()
    except wandb.Error as error:  # no API key, no such project, or no server
        print(f"wandb_dashboard.py: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return int(ExitCode.invalid)
    print(page.url)
    return 0


def workspace(entity: str, project: str, name: str) -> Any:
    """Return the dashboard, not yet saved."""
    from wandb_workspaces import workspaces as ws

    sections = [
        ws.Section(name=title, panels=_panels(title), is_open=True) for title in ("Verdict", *SECTIONS)
    ]
    settings = ws.WorkspaceSettings(x_axis=STEP_AXIS)
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def sweep_report(entity: str, project: str, title: str, group: str) -> Any:
    """Return a report about a group's runs, not yet saved: settings against results, then curves."""
    from wandb_workspaces.reports import v2 as wr

    columns = [
        *(wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key)) for key in COMPARED),
        *(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(name)) for name in RESULTS),
    ]
    compared = [
        wr.ParallelCoordinatesPlot(columns=columns, title="Settings and results"),
        wr.ParameterImportancePlot(with_respect_to=RESULTS[0]),
    ]

    def grid(panels: Sequence[Any]) -> Any:
        runs = wr.Runset(entity=entity, project=project, name=group, filters=f"Group = '{group}'")
        return wr.PanelGrid(runsets=[runs], panels=list(panels))

    blocks = [wr.H1(f"Runs of {group}"), grid(compared)]
    for section in ("Verdict", *SECTIONS):
        blocks += [wr.H1(section), grid(_panels(section))]
    return wr.Report(entity=entity, project=project, title=title, blocks=blocks)


def _panels(section: str) -> list[Any]:
    """Return a section's panels; the section "Verdict" compares values of the runs' summaries."""
    from wandb_workspaces.reports import v2 as wr

    if section == "Verdict":
        return [wr.RunComparer(diff_only="split")]
    tables = [wr.WeavePanelSummaryTable(table_name=SAMPLES)] if section == "Samples" else []
    return [*(line_plot(panel) for panel in SECTIONS[section]), *tables]


def line_plot(panel: Panel) -> Any:
    """Return a panel as an object of wandb-workspaces."""
    from wandb_workspaces.reports import v2 as wr

    return wr.LinePlot(
        title=panel.title,
        x=STEP_AXIS,
        y=list(panel.metrics),
        metric_regex=panel.pattern or None,
    )


def _print_panels() -> None:
    for section, panels in SECTIONS.items():
        print(section)
        for panel in panels:
            needs = f"   needs {panel.needs}" if panel.needs else ""
            print(f"  {panel.title}: {', '.join([*panel.metrics, panel.pattern]).strip(', ')}{needs}")


if __name__ == "__main__":
    sys.exit(main())
