"""`python -m dpo_dist` (and the script `dpo-dist`) lists the verbs and starts one."""

import subprocess
import sys
from pathlib import Path

import dpo_dist
from dpo_dist.__main__ import VERBS


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dpo_dist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_verb_is_listed_and_started() -> None:
    files = Path(dpo_dist.__file__).parent.glob("*.py")
    programs = {file.stem for file in files if 'if __name__ == "__main__"' in file.read_text()}
    assert VERBS.keys() == programs - {"__main__"}
    for arguments, code in ((("--help",), 0), (("trian",), 2)):
        listed = started(*arguments)
        assert (listed.returncode, listed.stderr) == (code, "")
        assert all(f"\n  {verb} " in listed.stdout for verb in VERBS)
    failed = started("store", "info", "/nowhere")
    assert (failed.returncode, "no reference store" in failed.stderr) == (2, True)
