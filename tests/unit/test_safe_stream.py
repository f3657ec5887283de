"""Standard streams that are closed, full or without a reader."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_dist.foundation.streams import print_line

ROOT = Path(__file__).parents[2]
WRITER = """
import os, sys
from dpo_dist.foundation.streams import open_closed_streams, print_line, print_result
open_closed_streams()
file = open("file", "w")
assert file.fileno() > 2
{call}
os.write(1, b"")
"""


def ended(call: str, redirection: str, folder: Path) -> tuple[int, str]:
    """Return the exit code of a program that prints, and what it has printed on the streams that are left."""
    command = f'"$0" -c "$1" {redirection}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}", sys.executable, WRITER.format(call=call)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (folder / "file").read_text() == ""
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("call", "redirection"),
    [("print_line", "| true"), ("print_result", "| true"), ("print_result", ">&- 2>&- <&-")],
)
def test_an_output_that_is_closed_is_no_error(call: str, redirection: str, tmp_path: Path) -> None:
    assert ended(f'{call}("na\\xefve")', redirection, tmp_path) == (0, "")


def test_standard_output_can_be_reserved_for_objects(tmp_path: Path) -> None:
    program = (
        "import os, sys; from dpo_dist.foundation.streams import *; reserve_output(); reserve_output(); "
        "print('chatter'); os.system('echo of a child'); print('{}', file=json_stream()); "
        "os.write(output_descriptor(), b'[]')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n[]"
    assert sorted(done.stderr.splitlines()) == ["chatter", "of a child"]


def test_a_full_disk_is_an_error_of_a_result_alone(tmp_path: Path) -> None:
    assert ended('print_line("text")', ">/dev/full", tmp_path) == (0, "")
    code, printed = ended('print_result("text")', ">/dev/full", tmp_path)
    assert code == 1
    assert "No space left on device" in printed


def test_a_printed_line_has_escapes_in_place_of_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_line("damaged: a\x1b[31m\u202e\nsecond line")
    assert capsys.readouterr().out == "damaged: a\\x1b[31m\\u202e\nsecond line\n"
