"""Scans: no module loads a pickle, or code that is not asked for (ruff bans the rest); no file has a key."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPES = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{40,}|glpat-[\w-]{20,}"
    rb"|xox[abpr]-[\w-]{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|eyJ[\w-]{20,}\.eyJ[\w-]{20,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    rb"|(?i:(?:api_?key|secret|password|token)[\"']?\s*[:=]\s*[\"'][A-Za-z0-9+/]{32,}[\"'])"
)


def faults(source: str) -> Iterator[int]:
    """Yield the lines of a module that could load a pickle, or code without the user's word."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value == "_target_":
            yield node.lineno
        if isinstance(node, ast.Call):
            given = {word.arg: word.value for word in node.keywords}
            called = ast.unparse(node.func)
            loads = called.startswith("AutoModel") and called.endswith(".from_pretrained")
            trusts = given.get("trust_remote_code")
            if (loads and "use_safetensors" not in given) or (
                isinstance(trusts, ast.Constant) and trusts.value
            ):
                yield node.lineno


def test_no_module_loads_a_pickle_or_code_from_data() -> None:
    for file in (ROOT / "dpo_dist").rglob("*.py"):
        assert list(faults(file.read_text())) == [], file
    for source in (
        "AutoModelForCausalLM.from_pretrained('a')",
        "AutoTokenizer.from_pretrained('a', trust_remote_code=True)",
        "a = {'_target_': 'b'}",
    ):
        assert list(faults(source)), source


def test_no_tracked_file_has_a_secret() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    files = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert [file for file in files if file.is_file() and SHAPES.search(file.read_bytes())] == []
    for key in ("hf_" + "a1" * 17, "-----BEGIN RSA " + "PRIVATE KEY-----", "sk-" + "a-1_" * 10):
        assert SHAPES.search(key.encode()), "the scan sees"
