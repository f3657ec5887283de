"""Test this machine in about five minutes: `dpo-dist selftest`, on one GPU or all GPUs of a node.

Nothing is downloaded: weights are random in real shapes, and pairs are invented. The table says which kernels
are exact, and whether every way of training gives the same steps; selftest.json has the same. Exit code 1: a
check failed, or nothing could be compared.
"""

from dpo_dist.foundation.signals import end_at_signals, raise_terminated, stop_signals

if __name__ == "__main__":
    end_at_signals()  # the imports take seconds

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo_dist.foundation.console import console_on
from dpo_dist.foundation.errors import Arguments, ExitCode, exit_after
from dpo_dist.foundation.files import for_json
from dpo_dist.foundation.process import outside_of_launch
from dpo_dist.foundation.streams import (
    json_stream,
    kept_document,
    output_descriptor,
    print_line,
    reserve_output,
)
from dpo_dist.tools.selftest.checks import (
    Check,
    Fault,
    check_attention,
    compare_ways,
    describe_gpus,
    list_versions,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    parser = Arguments(prog="dpo-dist selftest", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", default=Path("selftest.json"))
    options = parser.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    output: Path = options.output.absolute()
    is_writable = all(os.access(path, os.W_OK) for path in (output.parent, output) if path.exists())
    if output.is_dir() or not output.parent.is_dir() or not is_writable:
        parser.error(f"argument --output: {output} is not a file in a writable folder")
    reserve_output()  # libraries must not print into the table
    table = json_stream() if kept_document() is None else sys.stderr
    for name in os.environ.keys() - outside_of_launch(os.environ).keys():
        del os.environ[name]  # else processes that are started here would join the world of this one
    for number in stop_signals():
        signal.signal(number, raise_terminated)
    start = time.monotonic()
    checks = list[Check]()
    code = ExitCode.findings
    verdict = "stopped before all checks were done"
    content: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": socket.gethostname(),
    }
    try:
        with tempfile.TemporaryDirectory(prefix="selftest-", dir=output.parent) as folder:
            for check in _checks(Path(folder)):
                print_line(f"{check.outcome:<8}  {check.name:<40}  {check.seen}", table)
                checks.append(check)
        code, verdict = _verdict(checks)
    finally:
        seconds = time.monotonic() - start
        print_line(f"verdict: {verdict} ({seconds:.0f} s; {options.output})", table)
        content |= {"seconds": seconds, "verdict": verdict, "checks": [check._asdict() for check in checks]}
        is_screen = output.exists() and os.path.samestat(output.stat(), os.fstat(output_descriptor()))
        if not is_screen:
            output.write_text(json.dumps(for_json(content), indent=1) + "\n", encoding="utf-8")
        console_on(table, "plain").result("selftest", content, [])
    return code


def _verdict(checks: Sequence[Check]) -> tuple[ExitCode, str]:
    import torch  # noqa: PLC0415  (slow)

    faulty = [check.name for check in checks if check.outcome == "failed"]
    if faulty:
        return ExitCode.findings, f"{len(faulty)} of {len(checks)} checks failed: {', '.join(faulty)}"
    if not any("allowed" in check.values and check.outcome == "passed" for check in checks):
        return ExitCode.findings, "no two ways of training could be compared"
    gpus = torch.cuda.device_count()
    machine = "these GPUs"
    if gpus == 1:
        machine = "this GPU; sharding over several was not tried"
    elif not gpus:
        machine = "one CPU process; without a GPU no GPU kernel and no sharding was tried"
    return ExitCode.completed, f"every way of training that was tried gives the same steps on {machine}"


def _checks(folder: Path) -> Iterator[Check]:
    """Yield the checks; those that start processes come before this process uses a GPU."""
    import torch  # noqa: PLC0415  (slow)

    gpus = torch.cuda.device_count()
    device = torch.device("cuda" if gpus else "cpu")
    groups = {
        "versions": list_versions(gpus),
        "steps": compare_ways(folder, gpus),
        "GPU": describe_gpus(gpus),
        "attention": check_attention(device),
    }
    for name, checks in groups.items():
        try:
            yield from checks
        except Exception as error:  # a broken check must not hide the others
            yield Fault.of(error).check(name)


if __name__ == "__main__":
    exit_after(main)
