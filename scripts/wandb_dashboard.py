"""Save the W&B dashboard of dpo_dist in a project, or a report about the runs of a group (a sweep).

    .venv/bin/python -m pip install -c constraints.txt -e ".[dashboard]"
    .venv/bin/python scripts/wandb_dashboard.py ENTITY/PROJECT
    .venv/bin/python scripts/wandb_dashboard.py ENTITY/PROJECT --report GROUP

`--check` prints the panels and saves nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_dist.foundation.errors import ExitCode
from dpo_dist.insight.metrics.names import SAMPLES, STEP_AXIS
from dpo_dist.insight.metrics.wandb_dashboard import COMPARED, RESULTS, SECTIONS, Panel


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("--name", default="dpo_dist", help="name of the dashboard or title of the report")
    parser.add_argument("--report", metavar="GROUP", help="report about the runs with this tracking.group")
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
    """The dashboard, not saved."""
    from wandb_workspaces import workspaces as ws

    sections = [
        ws.Section(name=title, panels=_panels(title), is_open=True) for title in ("Verdict", *SECTIONS)
    ]
    settings = ws.WorkspaceSettings(x_axis=STEP_AXIS)
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def sweep_report(entity: str, project: str, title: str, group: str) -> Any:
    """A report about the runs of a group, not saved: settings against results, then the curves."""
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
    """The panels of a section; the verdicts of runs are compared as values of their summaries."""
    from wandb_workspaces.reports import v2 as wr

    if section == "Verdict":
        return [wr.RunComparer(diff_only="split")]
    tables = [wr.WeavePanelSummaryTable(table_name=SAMPLES)] if section == "Samples" else []
    return [*(line_plot(panel) for panel in SECTIONS[section]), *tables]


def line_plot(panel: Panel) -> Any:
    """A panel of the data in the terms of wandb-workspaces."""
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
