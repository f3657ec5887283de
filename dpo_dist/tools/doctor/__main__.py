"""Examine the data of a run before GPUs are spent: `dpo-dist doctor +experiment=qwen7b`.

Takes the configuration of the training run (also the one in `run.dir`), or `data.train` alone. Needs one
process, no GPU and no weights. Encodes the data into `data.cache`, where training finds them. Exit code 1:
findings (docs/data.md#the-doctor).
"""

import json
import logging
import os
import sys

from dpo_dist.data import DataSource
from dpo_dist.foundation.console import console_on
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.kit import (
    UNSET,
    RunConfig,
    check_rules,
    check_tokenizer_files,
    check_writable,
    local_model_folder,
    needs_of,
    run_verb,
)
from dpo_dist.tools.doctor.extension import DoctorConfig
from dpo_dist.tools.doctor.folder import DoctorFolder


def main(config: RunConfig) -> int:
    """Examine the data of `config`, write and print the report; return the exit code."""
    check_rules(config, needs_of("doctor"))
    for key, sources in {"data.train": config.data.train, "data.eval": config.data.eval}.items():
        for source in sources:
            DataSource(source, key).check()
    if config.model.path != UNSET:
        policy = local_model_folder(config.model.path, config.model.revision, needs_weights=False)
        starts_as_base = config.model.adapter is None or config.model.adapter.path is None
        if policy is not None and starts_as_base:  # an adapter may have its own tokenizer
            check_tokenizer_files(policy)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import warns about kernels
    # Imported late, so that the errors above appear at once.
    from dpo_dist.tools.doctor import page as pages  # noqa: PLC0415
    from dpo_dist.tools.doctor.examine import diagnose  # noqa: PLC0415

    folder = DoctorFolder(config.run.path)
    check_writable(folder.path)
    diagnosis = diagnose(config, console_on(sys.stderr, config.console.style).progress)
    exit_code = (
        ExitCode.findings if diagnosis.fails(config.section_of(DoctorConfig).fail_on) else ExitCode.completed
    )
    pages.write_doctor_report(folder, diagnosis, exit_code)
    pages.write_doctor_page(folder, diagnosis)
    content = json.loads(folder.doctor_report.read_text(encoding="utf-8"))
    lines = pages.diagnosis_lines(diagnosis, folder)
    console_on(sys.stdout, config.console.style).result("diagnosis", content, lines)
    return exit_code


if __name__ == "__main__":
    run_verb(main, verb="doctor")
