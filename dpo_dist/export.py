"""Write a checkpoint as a plain model folder: `python -m dpo_dist.export run.dir=output/run-1a2b3c4d`.

Takes the configuration of the run in `run.dir`; one process, no GPU. `export.checkpoint` names the checkpoint
(default: the latest), `export.average` models to average in its place, `export.output` the folder, which
transformers loads, or peft if it is an adapter. `export.merge=true` adds an adapter to its base.
"""

import os
import sys

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.training.named_models import find_exported


def main(config: RunConfig) -> int:
    """Write the folder and print its path; return the exit code."""
    sources, output = find_exported(config)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Slow to import: errors above appear at once.
    from dpo_dist.foundation.console import console_on, warnings_off  # noqa: PLC0415

    console = console_on(sys.stderr, config.console.style)
    with warnings_off():
        from dpo_dist.insight.metrics.card import run_card  # noqa: PLC0415
        from dpo_dist.training.finish import export_average, export_model  # noqa: PLC0415

        if config.export.average:
            export_average(config, sources, output)
        else:
            export_model(config, sources[0], output, console, run_card)
    written = {"checkpoint": ", ".join(map(str, sources)), "output": str(output)}
    console.result("exported", written, [f"written: {output}"])
    return ExitCode.completed


if __name__ == "__main__":
    run_verb(main, verb="export")
