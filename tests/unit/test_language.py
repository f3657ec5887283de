"""Docstrings, strings and pages use the field's words (docs/architecture.md, glossary) in plain sentences."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    file
    for folder in ("dpo_dist", "benchmarks", "examples", "scripts")
    for file in (ROOT / folder).rglob("*.py")
)
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").glob("*.md")]
    if page.name != "log.md"  # dated records keep their words
)
# A sentence has a subject that names a thing, not a clause.
CLAUSE = re.compile(r"(what|that which|how|where|who|whom|whose|which|why|whatever)\b", re.IGNORECASE)
# Has, is, prints, returns, uses, removes, fixes or a field's own word is meant.
WORDS = re.compile(
    r"\b(mend(s|ed|ing)?|tells?|told|stands?|stood|holds?|lies|dearest|kin|speaker|data sets?"
    r"|leav(e|es|ing)( [\w.]+){0,2} out|left out)\b",
    re.IGNORECASE,
)


def strings(source: str) -> Iterator[tuple[int, str, bool]]:
    """Line, text and whether it is a docstring, of every text with more than one word."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value, id(node) in docstrings


def faults(source: str) -> list[str]:
    found = []
    for line, text, is_docstring in strings(source):
        if CLAUSE.match(text.strip()) and (is_docstring or text.startswith("what ")):
            found.append(f"{line}: begins with a clause: {text.strip()[:60]}")
        found += [f"{line}: {word[0]!r} in {text.strip()[:60]!r}" for word in WORDS.finditer(text)]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_texts_are_plain(file: Path) -> None:
    assert faults(file.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_plain(page: Path) -> None:
    assert [word[0] for word in WORDS.finditer(page.read_text())] == []


@pytest.mark.parametrize(
    ("source", "is_fault"),
    [
        ('"""What a step does."""', True),
        ('"""One step."""', False),
        ('raise ConfigError("the store holds nothing")', True),
        ('raise ConfigError("x", remedy="leave run.dir out")', True),
        ('raise ConfigError("x", remedy="remove run.dir")', False),
        ('f"what {key} means"', True),
    ],
)
def test_a_fault_is_found(source: str, is_fault: bool) -> None:
    assert bool(faults(source)) == is_fault
