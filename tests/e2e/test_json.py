"""`--json`: one document that the schema describes."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.verbs import VERBS
from tests.support.launch import ROOT, TWO_PROCESSES, environment
from tests.support.warm import ENVIRONMENT, launcher_variables, run_warm, run_warm_apart
from tests.support.warm_launch import fork_python
from tests.unit.tools.pages.made_run import made_run

RUN = "model.path=model model.dtype=fp32 data.train=[train.jsonl] tracking=off trainer.global_batch_pairs=6"


@pytest.fixture
def folder(assets: Path, tmp_path: Path) -> Path:
    for name in ("model", "train.jsonl", "eval.jsonl"):
        (tmp_path / name).symlink_to(assets / name)
    shutil.copytree(assets / "model", tmp_path / "other")
    return tmp_path


def document(words: list[str], folder: Path, size: int = 1) -> tuple[int, dict[str, Any]]:
    """Run a command with `--json`; return its exit code and the document on its standard output."""
    verb, arguments = words[0], [*words[1:], "--json"]
    variables = environment() | ENVIRONMENT
    if verb in VERBS:
        variables |= launcher_variables(TWO_PROCESSES) if size > 1 else {}
        prepare = fork_python if verb in ("launch", "sweep") else None
        module = VERBS[verb].module
        code, output, errors = run_warm_apart(module, arguments, variables, folder, 240, prepare, size)
    else:
        command = [sys.executable, "-m", "dpo_dist", *words, "--json"]
        ended = subprocess.run(
            command, env=variables, cwd=folder, capture_output=True, text=True, timeout=240, check=False
        )
        code, output, errors = ended.returncode, ended.stdout, ended.stderr
    [line] = output.splitlines() or pytest.fail(errors)
    found: dict[str, Any] = json.loads(line, parse_constant=pytest.fail)
    check_schema(found)
    return code, found


def check_schema(found: dict[str, Any]) -> None:
    """Compare a document with docs/output.schema.json; skip the test without the package that does."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "docs" / "output.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(found)


PAGE = (ROOT / "docs" / "agents.md").read_text()
COMMANDS = [
    "".join(found) for found in re.findall(r"^(?:\$ |    )dpo-dist (.*)$|^\| `dpo-dist ([^`]*)`", PAGE, re.M)
]
KINDS = dict(re.findall(r"^\| `dpo-dist ([^`]*)` \| `(\w+)`", PAGE, re.MULTILINE))
TRAINS = [command for command in COMMANDS if command.startswith("train") and "run.dir=" in command]


@pytest.fixture(scope="module")
def page_folder(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the page names, after the commands of the page that train."""
    made = tmp_path_factory.mktemp("agents")
    for name, source in (
        ("model", "model"),
        ("pairs.jsonl", "train.jsonl"),
        ("held_out.jsonl", "eval.jsonl"),
    ):
        (made / name).symlink_to(assets / source)
    [run] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (made / "run.yaml").write_text(run)
    for command in TRAINS:
        code, output = run_warm("train", shlex.split(command)[1:], environment() | ENVIRONMENT, 1, made, 240)
        assert code == 0, output
        assert (made / command.split("run.dir=")[1].split()[0] / "model").is_dir()
    return made


@pytest.mark.parametrize("typed", COMMANDS)
def test_a_command_on_the_page_for_agents_does_what_the_page_says(typed: str, page_folder: Path) -> None:
    """A document has the kind of the page and fits the schema; the error is the one on the page."""
    words = shlex.split(typed)
    if typed in TRAINS:  # a run that is complete would have no result
        shutil.rmtree(page_folder / typed.split("run.dir=")[1].split(maxsplit=1)[0])
    if "--json" not in words:
        module = VERBS[words[0]].module if words[0] in VERBS else "dpo_dist"
        arguments = words[words[0] in VERBS :]
        code, output, errors = run_warm_apart(
            module, arguments, environment() | ENVIRONMENT, page_folder, 240
        )
        assert code == 0, output + errors
        return
    code, found = document([word for word in words if word != "--json"], page_folder)
    if printed := re.findall(rf"^\$ dpo-dist {re.escape(typed)}\n(\{{.*)$", PAGE, re.MULTILINE):
        assert (code, found) == (2, json.loads(printed[0]))
        return
    assert code in ({0, 1} if words[0] == "doctor" else {0}), found
    assert found["kind"] == KINDS.get(typed, found["kind"])


@pytest.mark.parametrize(
    "typed",
    [
        "store info gone",
        "chat gone",
        "report gone",
        "convert gone.yaml",
        "plan --cfg",
        "export",
        f"train {RUN} loss.beta=0",
    ],
)
def test_every_error_is_a_document(typed: str, folder: Path) -> None:
    code, found = document(shlex.split(typed), folder)
    assert code == found["error"]["code"] == 2
    assert found["error"]["remedy"]


def test_a_report_has_the_verdict_and_the_findings_of_its_run(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    code, found = document(["report", str(run.path)], tmp_path)
    assert code == 0
    verdict = json.loads(run.summary.read_text())["verdict"]
    assert found["runs"][0]["verdict"] == verdict
    assert verdict["findings"]


ONE_STEP = [*shlex.split(RUN), "trainer.max_steps=1", "sampling.prompts=0", "run.dir=run"]


def test_several_processes_print_one_document(folder: Path) -> None:
    """Also of an error, and beside what they say on standard error."""
    for added, key in (("loss.beta=0.2", "kind"), ("run.dir=model", "error")):
        assert key in document(["train", *ONE_STEP, added], folder, size=2)[1]


def test_a_bug_on_every_process_of_a_launcher_is_one_document(folder: Path) -> None:
    program = folder / "bug.py"
    program.write_text(
        "import runpy, torch\nif __name__ == '__main__':\n"
        "    torch.Tensor.backward = lambda *_, **__: 1 // 0\n"
        "    runpy.run_module('dpo_dist.train', run_name='__main__')\n"
    )
    code, found = document(["launch", "--config_file", str(TWO_PROCESSES), str(program), *ONE_STEP], folder)
    assert found["error"]["code"] == code == 1
    assert "ZeroDivisionError" in found["error"]["message"]


def test_what_is_not_promised_breaks_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    error = {"code": 2, "message": "no", "remedy": "a"}
    for broken in (
        {},
        {"error": {}},
        {"error": {**error, "code": 0}},
        {"error": error, "kind": "check"},
        {"error": {**error, "remedy": {"text": "write loss.beta=1"}}},
        {"kind": "check", "verdict": "check failed", "facts": [], "hint": ""},
        {"kind": "sweep", "points": [{}]},
        {"kind": "report", "page": "x", "runs": []},
    ):
        with pytest.raises(jsonschema.ValidationError):
            check_schema(broken)
