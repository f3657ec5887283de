"""Train each point of a grid: `dpo-dist sweep +experiment=qwen7b loss.beta=0.05,0.1`.

Takes the arguments of `train`, with several values for some keys, in Hydra's words: 0.1,0.2 or range(1,4) or
choice(a,b). Points train one after another, each on all GPUs. The same command again resumes interrupted
points and skips finished ones. sweep.part=3/8 trains the third of eight parts, such as one job of a SLURM
array. launch/README.md explains the table at the end.
"""

from dpo_dist.foundation.signals import end_at_signals
from dpo_dist.tools.sweep.extension import SweepConfig
from dpo_dist.tools.sweep.folder import SweepFolder

if __name__ == "__main__":
    end_at_signals()  # the imports take seconds

import os
from pathlib import Path

from dpo_dist.foundation.console import open_console
from dpo_dist.foundation.errors import ConfigError, DpoDistError, ExitCode, raise_all
from dpo_dist.foundation.types import CheckReport
from dpo_dist.kit import RunFolder, check_start, run_verb
from dpo_dist.tools.sweep.points import Points, load_points
from dpo_dist.tools.sweep.training import is_finished, train_points


def main(points: Points) -> int:
    """Train the points that are not finished; return the exit code."""
    check_points(points)
    first = next(iter(points.values()))
    folder = SweepFolder(Path(first.run.root) / f"sweep-{first.run.name}")
    with open_console(folder.rank_log, first.console.style) as console:
        from dpo_dist.tools.sweep.results import sweep_lines, sweep_results  # noqa: PLC0415  (slow, prints)

        settings = first.section_of(SweepConfig)
        index, parts = settings.share
        points_of_part = list(points)[index::parts]
        unfinished = [words for words in points_of_part if not is_finished(points[words])]
        share = "" if parts == 1 else f", {len(points_of_part):,} of them in part {settings.part}"
        count = len(points_of_part) - len(unfinished)
        console.say(f"sweep: {len(points):,} points{share}, {count:,} finished")
        codes, ends, is_stopped = train_points(points, unfinished, folder, console)
        results = sweep_results(points, ends, folder)
        lines = [*sweep_lines(results, points, folder.report), f"sweep   {folder.sweep}"]
        if is_stopped:
            lines.append("stopped: the same command continues with the points that are not finished")
        console.result("sweep", results, lines)
    faults = [code for code in codes.values() if code not in (ExitCode.completed, ExitCode.preempted)]
    if faults and not is_stopped:
        return faults[0] if faults[0] in set(ExitCode) else ExitCode.failed
    return ExitCode.preempted if is_stopped or any(codes.values()) else ExitCode.completed


def check_points(points: Points) -> None:
    """Check of every point what needs no torch; raise one error with all mistakes."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "a sweep starts the processes of its points itself",
            where="accelerate launch",
            got=f"{os.environ['WORLD_SIZE']} processes",
            remedy="start one process: dpo-dist sweep ...; each point has all GPUs",
        )
    mistakes = list[DpoDistError]()
    for config in points.values():
        try:
            check_start(config, trains=True)
        except DpoDistError as error:
            mistakes.append(error)
    raise_all(mistakes)


def check(points: Points) -> CheckReport:
    """Check what points need before they use a GPU; return a fact for each, then what the first loads."""
    check_points(points)
    from dpo_dist.kit import dry_run, start_in_words  # noqa: PLC0415  (slow)

    first = next(iter(points.values()))
    report = dry_run(first)
    facts = []
    for words, config in points.items():
        facts.append((" ".join(words), f"{RunFolder(config.run.path)} ({start_in_words(config)})"))
    return report._replace(facts=[*facts, *report.facts])


if __name__ == "__main__":
    run_verb(main, check, verb="sweep", load_points=load_points)
