"""What the documentation names exists, and what exists is named where a list claims to be whole."""

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks.performance_numbers import table
from dpo_dist.config.keys import key_types
from dpo_dist.config.loss_kinds import LossKind
from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import ExitCode
from dpo_dist.report.metrics_log import PHASES
from scripts.write_key_docs import pages

ROOT = Path(__file__).parents[2]

PACKAGE = ROOT / "dpo_dist"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]
KEYS = key_types(RunConfig)
SECTIONS = "|".join(name for name in KEYS if "." not in name)


def first_column(page: str, heading: str) -> list[str]:
    """What stands in backticks in the first column of the table with that heading."""
    text = (ROOT / "docs" / page).read_text()
    table = text.split(f"\n| {heading} |", 1)[1].split("\n\n", 1)[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def reasons_in_code() -> set[str]:
    """The reasons with which records are refused; those made up of parts end as `identical_after_...`."""
    found = set()
    for module in (PACKAGE / "data").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BadRecord":
                reason = node.args[0]
                if isinstance(reason, ast.Constant):
                    found.add(reason.value)
                else:
                    found |= {"identical_after_encoding", "identical_after_truncation"}
    return found


def test_every_reason_for_a_bad_record_is_described() -> None:
    described = first_column("data.md", "reason")
    assert len(described) == len(set(described))
    assert set(described) == reasons_in_code()


def test_every_kind_of_loss_is_described() -> None:
    assert sorted(first_column("losses.md", "kind")) == sorted(LossKind)


def test_tables_of_keys_and_losses_are_those_of_the_declarations() -> None:
    stale = [page.name for page, text in pages().items() if page.read_text() != text]
    assert stale == [], "run scripts/write_key_docs.py"


def test_every_phase_of_a_step_is_described() -> None:
    assert first_column("scaling.md", "metric") == [f"time/{phase}" for phase in PHASES]


def test_every_module_is_listed_and_no_other() -> None:
    modules = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"}
    assert set(first_column("architecture.md", "module")) == modules


def test_every_exit_code_is_described() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    described = re.findall(r"^\| (\d+) \| (\w+)", text.split("\n## Exit codes\n")[1], re.MULTILINE)
    assert {int(code): meaning for code, meaning in described} == {
        ExitCode.completed: "completed",
        ExitCode.failed: "failed",
        ExitCode.invalid: "error",
        ExitCode.diverged: "diverged",
        ExitCode.preempted: "preempted",
    }


def test_defaults_are_those_of_the_schema() -> None:
    """Where a page says ``key (number)``."""
    config = RunConfig()
    told = {}
    for page in PAGES:
        told |= dict(re.findall(r"`(\w+\.\w+)` \(([\d.]+)[);]", page.read_text()))
    assert len(told) > 5
    for key, number in told.items():
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == float(number), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_keys_and_linked_files_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(rf"\b(?:{SECTIONS})\.[a-z_]+(?=[`=\s,:;)])", text)
    files = (".py", ".html", ".yaml", ".json")
    assert [key for key in named if key not in KEYS and not key.endswith(files)] == []
    tests = re.findall(r"`(tests/[^`]+)`", text)
    assert [test for test in tests if not (ROOT / test).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_tables_of_performance_are_those_of_its_measurements() -> None:
    """`benchmarks/draw_performance.py` was run after the last `benchmarks/curves.py`."""
    page = (ROOT / "docs" / "performance.md").read_text()
    measurements = ROOT / "docs" / "performance.json"
    parts = json.loads(measurements.read_text()) if measurements.is_file() else {}
    assert [name for name, part in parts.items() if table(name, part) not in page] == []
