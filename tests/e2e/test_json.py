"""`--json`: one document that the schema describes; the words of an error repair a command by themselves."""

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
from dpo_dist.tools.selftest.checks import Check
from tests.support.launch import ROOT, TWO_PROCESSES, constants, environment
from tests.support.parent import context, start_parent
from tests.support.warm import ENVIRONMENT, launcher_variables, run_warm, run_warm_apart, start_module, wait
from tests.support.warm_launch import fork_python
from tests.unit.tools.pages.made_run import made_run

RUN = "model.path=model model.dtype=fp32 data.train=[train.jsonl] tracking=off trainer.global_batch_pairs=6"
MOST_ROUNDS = 4
# fmt: off
BROKEN = [
    ("a misspelt key", f"train {RUN} loss.betta=0.2", "loss.beta=0.2"),
    ("a key without its section", f"train {RUN} max_steps=3", "trainer.max_steps=3"),
    ("a key of another verb", f"train {RUN} pairs.limit=3", ""),
    ("a misspelt value", f"train {RUN} optim.schedule=cosin", "optim.schedule=cosine"),
    ("a value outside its bounds", f"train {RUN} optim.lr=0", ""),
    ("a value of another type", f"train {RUN} trainer.max_steps=many", ""),
    ("a text for a list", "train model.path=model model.dtype=fp32 data.train=train.jsonl",
     "data.train=[train.jsonl]"),
    ("a misspelt preset", f"train {RUN} loss=ipoo", "loss=ipo"),
    ("a misspelt data file", "train model.path=model model.dtype=fp32 data.train=[trian.jsonl]",
     "data.train=[train.jsonl]"),
    ("a misspelt file in an entry", "train model.path=model 'data.train=[{path: trian.jsonl, weight: 2}]'",
     "'data.train=[{path: train.jsonl, weight: 2}]'"),
    ("a misspelt value in an entry",
     "train model.path=model 'data.train=[{path: train.jsonl, format: sharegpt}]'",
     "'data.train=[{path: train.jsonl, format: auto}]'"),
    ("a misspelt model folder", "train model.path=./modle model.dtype=fp32 data.train=[train.jsonl]",
     "model.path=model"),
    ("options of TRL",
     "train --model_name_or_path model --dataset_name train.jsonl --learning_rate 5e-6 --beta=0.1 "
     "--report_to none --max_length 512 --loss_type ipo --plot_loss", "optim.lr=5e-6 loss=ipo loss.beta=0.1"),
    ("a loss option without effect", f"train {RUN} loss=ipo loss.options.gamma=1", "loss=ipo"),
    ("a kind that contradicts labels", f"train {RUN} data.unpair=true loss.kind=ipo",
     "loss=kto data.unpair=true"),
    ("two sources of evaluation data", f"train {RUN} data.eval=[eval.jsonl] data.eval_share=0.2",
     "data.eval=[eval.jsonl]"),
    ("evaluations without data", f"train {RUN} trainer.eval_every=5", ""),
    ("a kernel without its precision", f"train {RUN} model.attention=flash_attention_2",
     "model.attention=sdpa"),
    ("a reference without its adapter", f"train {RUN} reference=adapter", "reference=adapter"),
    ("spaces around =", f"train {RUN} loss.beta = 0.2", "loss.beta=0.2"),
    ("an option's value that another one has", f"train {RUN} --config-dir . --max_length 99 --seed 99",
     "--config-dir . data.max_length=99 trainer.seed=99"),
    ("a right option with the same value", f"train {RUN} --config-dir other --run_name other",
     "--config-dir other run.name=other"),
    ("a word without its key", "compare model.dtype=fp32 ./model ./other data.eval=[eval.jsonl]",
     "compare.models=[./model,./other]"),
    ("a misspelt option", f"train {RUN} --confg-dir . loss.beta=0.2", "--config-dir . loss.beta=0.2"),
    ("a resumed run that never was", f"train {RUN} run.resume=must", "run.resume=auto"),
    ("a list for a swept key", f"sweep {RUN} loss.beta=[0.1,0.2]", "loss.beta=0.1,0.2"),
    ("a search without its keys", f"sweep {RUN} data.eval=[eval.jsonl] optim.lr=interval(1e-7,1e-5)",
     "sweep.trials=20 sweep.by=eval_rewards/accuracies"),
    ("a search by options", f"sweep {RUN} data.eval=[eval.jsonl] optim.lr=interval(1e-7,1e-5) --trials 3 "
     "--by rewards/margins", "sweep.trials=3 sweep.by=eval_rewards/margins"),
    ("a later word of the same key", f"train {RUN} model.dtype=float32", "model.dtype=fp32"),
    ("two equals signs", f"train {RUN} loss.beta==0.2", ""),
    ("a misspelt verb", f"trian {RUN}", "train"),
    ("a loss in place of a verb", f"orpo {RUN}", "train loss=orpo"),
    ("many mistakes", f"train {RUN} loss.betta=1 optim.lr=0 loss=ipoo pairs.limit=3 epochs=2",
     "loss.beta=1 loss=ipo"),
]
# fmt: on


@pytest.fixture
def folder(assets: Path, tmp_path: Path) -> Path:
    for name in ("model", "train.jsonl", "eval.jsonl"):
        (tmp_path / name).symlink_to(assets / name)
    shutil.copytree(assets / "model", tmp_path / "other")
    return tmp_path


def one_way(*_: object) -> list[Check]:
    """In place of the trainings of the selftest, which has a test of its own."""
    return [Check("steps of ddp", "passed", "equal", {"difference": 0.0, "allowed": 0.0})]


ONE_WAY = constants(**{"dpo_dist.tools.selftest.checks.compare_ways": one_way})


def document(words: list[str], folder: Path, size: int = 1) -> tuple[int, dict[str, Any]]:
    """Run a command with `--json`; return its exit code and the document on its standard output."""
    verb, arguments = words[0], [*words[1:], "--json"]
    variables = environment() | ENVIRONMENT
    if verb in VERBS:
        variables |= launcher_variables(TWO_PROCESSES) if size > 1 else {}
        prepare = {"launch": fork_python, "selftest": ONE_WAY}.get(verb)
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


def key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def repaired(words: list[str], remedy: dict[str, Any]) -> list[str]:
    """Return a command with the words of a remedy, as docs/agents.md says that they are meant."""
    left, place = list(words), len(words)
    for gone in remedy["remove"]:
        single = [at for at, word in enumerate(left) if gone in (word, key_of(word))]
        pair = [at + on for at in range(len(left)) for on in (0, 1) if " ".join(left[at : at + 2]) == gone]
        for at in reversed(single or pair):
            place = min(place, at)
            del left[at]
    for word in remedy["write"]:
        same = [index for index, other in enumerate(left) if "=" in word and key_of(other) == key_of(word)]
        if same:
            left[same[0]] = word
        else:
            left.insert(place, word)
            place += 1
    return left


@pytest.mark.parametrize(("typed", "wanted"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_the_words_of_an_error_repair_its_command(typed: str, wanted: str, folder: Path) -> None:
    words, said = shlex.split(f"{typed} --check"), list[str]()
    for _ in range(MOST_ROUNDS):
        code, found = document(words, folder)
        if code == 0:
            break
        assert code == found["error"]["code"] == 2, found
        said.append(f"{words}: {found['error']}")
        words = repaired(words, found["error"]["remedy"])
    assert said, "it is not broken"
    assert found.get("verdict", "").startswith("check passed"), "\n".join(said)
    assert {*shlex.split(wanted)} <= {*words}, "\n".join(said)


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


@pytest.mark.parametrize("typed", ["agent-docs --json", *COMMANDS])
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
    assert found.get("text", PAGE) == PAGE or words[0] != "agent-docs"


@pytest.mark.parametrize(
    "typed",
    [
        "store info gone",
        "chat gone",
        "report gone",
        "convert gone.yaml",
        "selftest --output gone/x.json",
        "plan --cfg",
        "export",
        f"train {RUN} loss.beta=0",
    ],
)
def test_every_error_is_a_document(typed: str, folder: Path) -> None:
    code, found = document(shlex.split(typed), folder)
    assert code == found["error"]["code"] == 2
    assert found["error"]["remedy"]["text"]


def test_the_selftests_document_may_be_kept_in_the_file_that_it_writes(tmp_path: Path) -> None:
    start_parent()
    output, errors = tmp_path / "selftest.json", tmp_path / "errors"
    variables = environment() | ENVIRONMENT
    module, words = VERBS["selftest"].module, ["--json"]
    started = start_module(context, module, words, variables, 1, tmp_path, output, ONE_WAY, errors)
    assert wait(started, 240) == 0
    assert json.loads(output.read_text())["kind"] == "selftest"


def test_a_report_has_the_verdict_and_the_findings_of_its_run(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    code, found = document(["report", str(run.path)], tmp_path)
    assert code == 0
    verdict = json.loads(run.summary.read_text())["verdict"]
    assert found["runs"][0]["verdict"] == verdict
    assert verdict["findings"]


ONE_STEP = [*shlex.split(RUN), "trainer.max_steps=1", "samples.prompts=0", "run.dir=run"]


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
    error = {"code": 2, "message": "no", "remedy": {"text": "a", "write": [], "remove": []}}
    for broken in (
        {},
        {"error": {}},
        {"error": {**error, "code": 0}},
        {"error": error, "kind": "check"},
        {"error": {**error, "remedy": "write loss.beta=1"}},
        {"kind": "check", "verdict": "check failed", "facts": [], "hint": ""},
        {"kind": "sweep", "points": [{}]},
        {"kind": "report", "page": "x", "runs": []},
    ):
        with pytest.raises(jsonschema.ValidationError):
            check_schema(broken)
