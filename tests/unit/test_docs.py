"""Names in the documentation exist, and lists in it are complete."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.command_line import saved_values, split_words, usage
from dpo_dist.config.keys import FIRST_KEYS, key_rows, run_keys
from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import LossKind
from dpo_dist.config.metrics import AGREEMENT, ENTROPIES, PAIR_METRICS
from dpo_dist.config.named_code import NAMED_CODE
from dpo_dist.config.verbs import VERBS
from dpo_dist.data.records import NOT_KEPT
from dpo_dist.foundation.errors import Arguments, ExitCode
from dpo_dist.objective.router import AUX_LOSS, BUSIEST
from dpo_dist.tools.sweep.points import load_points
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
    reasons |= {"identical_after_encoding", "identical_after_truncation", NOT_KEPT}  # composed there
    assert sorted(first_column("data.md", "reason")) == sorted(reasons)


def test_every_metric_and_every_kind_of_loss_is_described() -> None:
    others = (AGREEMENT, AUX_LOSS, BUSIEST)
    assert sorted(first_column("watching.md", "metric")) == sorted(PAIR_METRICS + ENTROPIES + others)
    assert sorted(first_column("losses.md", "kind")) == sorted(LossKind)


def test_tables_of_keys_and_losses_are_those_of_the_declarations() -> None:
    stale = [page.name for page, text in pages().items() if page.read_text() != text]
    assert stale == [], "run scripts/write_key_docs.py"


def test_keys_that_most_commands_name_stand_first() -> None:
    pages = (ROOT / "README.md", ROOT / "docs/getting_started.md")
    commands = [words for page in pages for words in commands_of(page.read_text()) if words[:1] == ["train"]]
    named = {word.partition("=")[0] for words in commands for word in words if "=" in word}
    assert {key for key in named & {*KEYS} if "." in key} - {*FIRST_KEYS} == set()
    assert first_column("configuration.md", "key") == [*FIRST_KEYS]
    listed = re.findall(r"^  (\w+\.\w+)  ", usage("dpo-dist train", "", KEYS, []), re.MULTILINE)
    assert listed == [*FIRST_KEYS]


def test_every_exit_code_is_described() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    described = re.findall(r"^\| (\d+) \| (\w+)", text.split("\n## Exit codes\n")[1], re.MULTILINE)
    words = {code: code.name for code in ExitCode} | {ExitCode.invalid: "error", ExitCode.lost: "process"}
    assert {int(code): word for code, word in described} == words
    [failed] = re.findall(r"^\| 1 \|.*", text, re.MULTILINE)
    with_findings = [
        verb for verb, row in VERBS.items() if "ExitCode.findings" in _program(row.module).read_text()
    ]
    assert "plan" in with_findings
    assert [verb for verb in with_findings if f"of `{verb}`" not in failed] == []


def _program(module: str) -> Path:
    file = ROOT / module.replace(".", "/")
    return file / "__main__.py" if file.is_dir() else file.with_suffix(".py")


def test_the_number_of_losses_is_one_number() -> None:
    with_formula = len(set(LossKind) - {LossKind.custom})
    assert f"**{with_formula} [losses](docs/losses.md), and your own**" in (ROOT / "README.md").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"DPO and {with_formula - 1} other [losses](docs/losses.md)" in changes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_keys_modules_and_tests_exist(page: Path) -> None:
    text = page.read_text()
    prose = re.sub(r"```(python|diff).*?```", "", text, flags=re.DOTALL)
    named = re.findall(rf"(?<![\w.])(?:{SECTIONS})\.[a-z_]+(?=[`=\s,:;)])", prose)
    files = (".py", ".html", ".png", ".svg", ".yaml", ".json", ".jsonl", ".md", ".sbatch")
    assert [key for key in named if key not in KEYS and not key.endswith(files)] == []
    tests = re.findall(r"`(tests/[^`]+)`", text)
    assert [test for test in tests if not (ROOT / test).exists()] == []
    promises = re.findall(r"`((?:unit|dist|e2e)/[\w./]+\.py)`", text)
    assert [test for test in promises if not (ROOT / "tests" / test).exists()] == []
    modules = re.findall(rf"`((?:{ROOMS})/[\w/]+\.py)`", text)
    assert [module for module in modules if not (PACKAGE / module).exists()] == []


def test_every_key_that_runs_code_is_on_the_page_about_security() -> None:
    listed = (ROOT / "docs" / "reliability.md").read_text().partition("### Code runs only if")[2]
    assert [key for key in NAMED_CODE if f"`{key}" not in listed.partition("\n### ")[0]] == []
    named = [row for row in key_rows() if "`module:function`" in row.meaning]
    assert len(named) > 5
    assert [row.name for row in named if not row.facts.runs] == []


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


def test_every_file_of_the_trainer_is_on_the_page_about_the_architecture() -> None:
    page = re.sub(r"```.*?```", "", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    named = " ".join(re.findall(r"`([^`]+)`", page))
    words = set(re.findall(r"\w+", named))
    files = [file for file in (ROOT / "dpo_dist").rglob("*.py") if not file.stem.startswith("__")]
    missing = {file for file in files if file.stem not in words and not {"tools", "compat"} & {*file.parts}}
    assert missing == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_the_readme_begins_with_the_commands_of_users_and_of_developers() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:12]
    assert {"./scripts/quickstart.sh", "./scripts/test.sh"} <= {
        line.split("#")[0].strip() for line in first_screen
    }
    assert (ROOT / ".ci" / "run").read_text().endswith("exec ./scripts/test.sh\n")


def commands_of(text: str) -> list[list[str]]:
    """The words after `dpo-dist` of a page's commands, those in its sentences too, without `launch`."""
    prose = re.sub(r"```(?!console)\w+\n.*?```", "", text, flags=re.DOTALL)
    lines = re.findall(r"^(?:    |\$ )(?:.*[ (])?(dpo-dist .*)$", prose.replace("\\\n", " "), re.MULTILINE)
    lines += re.findall(r"`(dpo-dist [^`]+)`", re.sub(r"```.*?```", "", prose, flags=re.DOTALL))
    found = []
    for line in lines:
        whole = re.sub(r" \[([A-Z-][^]]*)\]", r" \1", line.partition(" | ")[0])
        words = ["1" if word == "N" else word for word in shlex.split(whole, comments=True)[1:]]
        verbs = [at for at, word in enumerate(words) if word in VERBS and word != "launch"]
        words = words[verbs[0] :] if verbs else []
        if "..." in words:
            usual = ["model.path=MODEL", "data.train=[pairs.jsonl]"] if VERBS[words[0]].is_configured else []
            words = [words[0], *usual, *(word for word in words[1:] if word != "...")]
        found.append(words)
    return found


COMMANDS = {
    shlex.join(words): words
    for page in PAGES
    if page.stem not in ("CHANGELOG", "log")  # they quote commands of other days, and in part
    for words in commands_of(page.read_text())
    # A name of a verb, and the example of a mistake.
    if len(words) > 1 and "learning_rate=1e-5" not in words
}

KEYS_OF_A_RUN = """
model: {path: MODEL, adapter: {r: 4}}
data: {train: [pairs.jsonl], eval: [other.jsonl]}
trainer: {ema_decay: 0.999}
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_command_of_a_page_is_one_that_the_program_takes(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and runs are there, with the keys that every run has; models and data are not."""
    verb, *others = words
    if "--processes" in others:  # a word for the command that starts the verb
        place = others.index("--processes")
        del others[place : place + 2]
    monkeypatch.chdir(tmp_path)
    named = [word for word in others if word.endswith(".yaml")]
    runs = [Path(word.removeprefix("run.dir=")) for word in others if word.startswith("run.dir=")]
    for file in [*map(Path, named), *(run / "config.yaml" for run in runs)]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(KEYS_OF_A_RUN)
    if not VERBS[verb].is_configured:
        assert_arguments_are_taken(verb, others, monkeypatch)
        return
    options = split_words([word for word in others if word != "--json"])
    assert options.mistakes == []
    if verb == "sweep":
        load_points(options.words)
    elif options.help is None and options.cfg is None:
        saved = saved_values(options, verb) if VERBS[verb].reuses_config else None
        load_run_config(options.words, verb=verb, saved=saved)


def verb_module(verb: str) -> Any:
    module = VERBS[verb].module
    package = importlib.util.find_spec(module).submodule_search_locations is not None
    return importlib.import_module(f"{module}.__main__" if package else module)


def assert_arguments_are_taken(verb: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb's parser takes them; the verb itself is not run."""

    class TakenError(Exception):
        pass

    parse = Arguments.parse_args

    def stop(self: Arguments, *arguments: Any) -> None:
        parse(self, *arguments)
        raise TakenError

    monkeypatch.setattr(Arguments, "parse_args", stop)
    monkeypatch.setattr("sys.argv", [verb, *words])
    with pytest.raises(TakenError):
        verb_module(verb).main()


def test_the_last_line_of_the_quickstart_runs_in_the_shell_that_sees_it(tmp_path: Path) -> None:
    """The script with programs that do nothing in place of its own, started from another folder."""
    folder = tmp_path / "a checkout"
    for name in ("python", "accelerate", "dpo-dist"):
        (program := folder / ".venv/bin" / name).parent.mkdir(parents=True, exist_ok=True)
        program.write_text('#!/usr/bin/env bash\necho "$(basename "$0") $*"\n')
        program.chmod(0o755)
    scripts = folder / "scripts"
    scripts.mkdir()
    for name, text in (("quickstart.sh", (ROOT / "scripts/quickstart.sh").read_text()), ("setup_env.sh", "")):
        (scripts / name).write_text(text)
        (scripts / name).chmod(0o755)
    (scripts / "setup_env.sh").write_text("#!/usr/bin/env bash\n")
    screen = subprocess.run(
        [scripts / "quickstart.sh"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    command = screen.stdout.splitlines()[-1].removeprefix("talk to it: ")
    ended = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout == f"dpo-dist chat {folder}/output/demo-dpo\n"
