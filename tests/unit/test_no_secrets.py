"""No tracked file has a key: shapes of real tokens and private keys, outside of tests that invent them."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHAPES = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{40,}|glpat-[\w-]{20,}"
    rb"|xox[abpr]-[\w-]{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|eyJ[\w-]{20,}\.eyJ[\w-]{20,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    rb"|(?i:(?:api_?key|secret|password|token)[\"']?\s*[:=]\s*[\"'][A-Za-z0-9+/]{32,}[\"'])"
)


def found_in(content: bytes) -> list[bytes]:
    """The keys in a file."""
    return [match.group()[:12] for match in SHAPES.finditer(content)]


def test_no_tracked_file_has_a_secret() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    files = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    found = {str(file.relative_to(ROOT)): found_in(file.read_bytes()) for file in files if file.is_file()}
    assert {file: keys for file, keys in found.items() if keys} == {}


def test_the_scan_sees() -> None:
    for key in (
        "hf_" + "a1" * 17,
        "AKIA" + "A1" * 8,
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        "sk-" + "a-1_" * 10,
    ):
        assert found_in(key.encode())
