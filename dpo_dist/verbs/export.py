"""Write a checkpoint as a plain model folder: `dpo-dist export run.dir=output/run-1a2b3c4d`.

Takes the configuration of the run in `run.dir`; needs one process and no GPU. `export.checkpoint` names the
checkpoint (default: the one in `model/`), `export.output` the folder, which transformers loads, or peft if
it is an adapter. `export.merge=true` adds an adapter to its base. `hf upload
ORG/NAME FOLDER` sends the folder to the hub.
"""

import os
import sys

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.extensions import hook
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.console import console_on, warnings_off
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.training.start.named_models import find_export_paths


def main(config: RunConfig) -> int:
    """Write the folder and print its path; return the exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    console = console_on(sys.stderr, config.console.style)
    checkpoint, output = find_export_paths(config)
    with warnings_off():
        # Slow to import: errors above appear at once.
        from dpo_dist.training.export import export_model  # noqa: PLC0415

        export_model(config, checkpoint, output, console, hook("run_card") or (lambda *_, **__: ""))
    paths = {"checkpoint": str(checkpoint), "output": str(output)}
    console.result("exported", paths, [f"written: {output}"])
    return ExitCode.completed


if __name__ == "__main__":
    run_verb(main, verb="export")
