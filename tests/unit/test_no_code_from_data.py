"""Models are loaded from safetensors, and code beside them only if it is asked for; ruff bans the rest."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "dpo_dist"


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
    for file in PACKAGE.rglob("*.py"):
        assert list(faults(file.read_text())) == [], file
    for source in (
        "AutoModelForCausalLM.from_pretrained('a')",
        "AutoTokenizer.from_pretrained('a', trust_remote_code=True)",
        "a = {'_target_': 'b'}",
    ):
        assert list(faults(source)), source
