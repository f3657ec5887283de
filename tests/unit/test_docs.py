"""Names in the documentation exist, and lists in it are complete."""

import re
from pathlib import Path

import pytest

from dpo_dist.config.keys import run_keys
from dpo_dist.config.losses import LossKind
from dpo_dist.config.user_code import FOREIGN_CODE
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.objective.metrics import ENTROPIES, PAIR_METRICS
from dpo_dist.objective.router import AUX_LOSS, BUSIEST, Z_LOSS
from scripts.write_key_docs import CELL, pages

ROOT = Path(__file__).parents[2]

PACKAGE = ROOT / "dpo_dist"
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / name for name in ("launch/README.md", "conf/experiment/README.md", "benchmarks/log.md")),
]
KEYS = run_keys()
ROOMS = "|".join(path.name for path in PACKAGE.iterdir() if path.is_dir())
SECTIONS = "|".join(name for name in KEYS if "." not in name)


def first_column(page: str, heading: str) -> list[str]:
    """Return the names in backticks in the first column of the table with that heading."""
    text = (ROOT / "docs" / page).read_text()
    table = text.split(f"\n| {heading} |", 1)[1].split("\n\n", 1)[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_reason_for_a_bad_record_is_described() -> None:
    code = "".join(module.read_text() for module in (PACKAGE / "data").rglob("*.py"))
    reasons = set(re.findall(r'(?:BadRecord|UnusableRecordError)\(\s*"(\w+)"', code))
    reasons |= {"identical_after_encoding", "identical_after_truncation"}  # composed there
    assert sorted(first_column("data.md", "reason")) == sorted(reasons)


def test_every_metric_and_every_kind_of_loss_is_described() -> None:
    routers = (AUX_LOSS, BUSIEST, Z_LOSS)
    assert sorted(first_column("watching.md", "metric")) == sorted(PAIR_METRICS + ENTROPIES + routers)
    assert sorted(first_column("losses.md", "kind")) == sorted(LossKind)


def test_tables_of_keys_and_losses_are_those_of_the_declarations() -> None:
    stale = [page.name for page, text in pages().items() if page.read_text() != text]
    assert stale == [], "run scripts/write_key_docs.py"


def test_every_exit_code_is_described() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    described = re.findall(r"^\| (\d+) \| (\w+)", text.split("\n## Exit codes\n")[1], re.MULTILINE)
    words = {code: code.name for code in ExitCode} | {ExitCode.invalid: "error", ExitCode.lost: "process"}
    assert {int(code): word for code, word in described} == words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_keys_modules_and_tests_exist(page: Path) -> None:
    text = page.read_text()
    prose = re.sub(r"```(python|diff).*?```", "", text, flags=re.DOTALL)
    named = re.findall(rf"(?<![\w.])(?:{SECTIONS})\.[a-z_]+(?=[`=\s,:;)])", prose)
    files = (".py", ".html", ".png", ".yaml", ".json", ".jsonl", ".md", ".sbatch")
    assert [key for key in named if key not in KEYS and not key.endswith(files)] == []
    tests = re.findall(r"`(tests/[^`]+)`", text)
    assert [test for test in tests if not (ROOT / test).exists()] == []
    promises = re.findall(r"`((?:unit|dist|e2e)/[\w./]+\.py)`", text)
    assert [test for test in promises if not (ROOT / "tests" / test).exists()] == []
    modules = re.findall(rf"`((?:{ROOMS})/[\w/]+\.py)`", text)
    assert [module for module in modules if not (PACKAGE / module).exists()] == []


def test_every_key_that_runs_code_is_on_the_page_about_security() -> None:
    listed = (ROOT / "docs" / "reliability.md").read_text().partition("### Code runs only if")[2]
    assert [key for key in FOREIGN_CODE if f"`{key}" not in listed.partition("\n### ")[0]] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_cells_of_tables_are_phrases(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    seen = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", prose)  # links without their addresses
    rows = [line for line in seen.splitlines() if line.startswith("| ")]
    cells = [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    assert [cell for cell in cells if len(cell) > CELL] == []


def test_pages_write_a_verb_in_one_way() -> None:
    pages = "\n".join(page.read_text() for page in PAGES if page.stem != "CHANGELOG")
    assert re.findall(r"-m dpo_dist\.(?!train\b)\w+|python -m dpo_dist\.train", pages) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_the_readme_begins_with_the_commands_of_users_and_of_developers() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:12]
    assert {"./scripts/quickstart.sh", "./scripts/test.sh"} <= {
        line.split("#")[0].strip() for line in first_screen
    }
    assert (ROOT / ".ci" / "run").read_text().endswith("exec ./scripts/test.sh\n")
