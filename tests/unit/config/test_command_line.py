"""Command line of a verb: options, exit codes, help, and one printed block for an error of the user."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import torch
import yaml

import dpo_dist.__main__
from dpo_dist.compat.convert import __main__ as convert
from dpo_dist.config.command_line import explain, run_verb, split_words, usage
from dpo_dist.config.keys import all_keys, group_folders, section_meanings, verb_keys
from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.config.verbs import EVERY_VERB, VERBS
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.process import WORLD_VARIABLES
from dpo_dist.tools.chat import __main__ as chat
from dpo_dist.tools.report import __main__ as report
from dpo_dist.verbs import store
from tests.support import tiny_verb

ROOT = Path(__file__).parents[3]
TINY = [sys.executable, str(ROOT / "tests" / "support" / "tiny_verb.py")]
RUN = ["model.path=m", "data.train=[a.jsonl]"]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Verb = Callable[..., Ended]


def leave(code: int) -> NoReturn:
    raise SystemExit(code)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def verb(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """Run the tiny verb in this process, in an empty folder."""
    monkeypatch.chdir(work)
    monkeypatch.setattr(os, "_exit", leave)

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["tiny_verb.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_verb(tiny_verb.main)
        assert not list(work.iterdir()), "the command line left a file behind"
        return Ended(int(str(ended.value.code)), *capsys.readouterr())

    return run


def test_an_error_has_escapes_in_place_of_the_control_characters_of_a_name(verb: Verb) -> None:
    ended = verb("model.path=m", "loss.beta='a\x1b[31m\x07.jsonl'")
    assert ended.code == 2
    assert "\\x1b[31m\\x07" in ended.err
    assert not set("\x1b\x07") & set(ended.err)


@pytest.mark.parametrize(
    ("of_exit", "code", "said"),
    [(143, 143, "ended by SIGTERM\n"), (255, 255, ""), ("a text", 1, "a text\n"), (None, 0, "")],
)
def test_an_exit_of_the_work_keeps_its_code(
    of_exit: int | str | None, code: int, said: str, verb: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(_config: object) -> NoReturn:
        raise SystemExit(of_exit)

    monkeypatch.setattr(tiny_verb, "main", work)
    assert verb(*RUN) == (code, "", said)


@pytest.mark.slow
def test_a_verb_has_the_same_run_directory_in_every_process(
    verb: Verb, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With JSON objects on standard output, what a library prints is on standard error."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    json_style = [*TINY, *RUN, "console.style=json"]
    program = subprocess.run(json_style, cwd=work, capture_output=True, text=True, check=False)
    run_dir = f"{load_run_config(RUN).run.dir}\n"
    assert (program.returncode, program.stdout, program.stderr) == (75, "", run_dir)
    assert verb(*RUN) == (75, run_dir, "")


def test_a_document_has_every_mistake_and_the_words_of_all(verb: Verb) -> None:
    ended = verb(*RUN, "loss.betta=1", "optim.lr=0", "pairs.limit=3", "--json")
    error = json.loads(ended.out)["error"]
    assert (error["code"], len(error["mistakes"])) == (ended.code, 3) == (2, 3)
    remedies = [mistake["remedy"] for mistake in error["mistakes"]]
    assert "did you mean loss.beta=1?" in remedies
    assert all(remedy in error["remedy"] for remedy in remedies)
    assert "this command has 3 mistakes" in ended.err, "people read standard error"
    assert list(json.loads(verb("--help", "loss.beta", "--json").out)) == ["kind", "text"]
    bug = verb(*RUN, "run.name=fail", "--json")
    assert json.loads(bug.out)["error"]["title"] == "bug"
    assert "Traceback" in bug.err
    assert json.loads(verb(*RUN, "run.name=stop", "--json").out)["error"]["code"] == 130
    assert "to do:" in verb(*RUN, "loss.betta=1").err, "the next program prints no document"


@pytest.mark.slow
def test_beside_a_document_nothing_is_on_standard_output(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped has no result."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ended = subprocess.run([*TINY, *RUN, "--json"], cwd=work, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "", f"{load_run_config(RUN).run.dir}\n")


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1]
    return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.slow
def test_other_ranks_print_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for the launcher, which ends them when rank 0 has printed its error and exited."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with subprocess.Popen([*TINY, *RUN, "loss.betta=0.2"], stderr=subprocess.PIPE, text=True) as rank_1:
        while not catches_sigterm(rank_1.pid):
            time.sleep(0.02)
        rank_1.terminate()
        _, printed = rank_1.communicate(timeout=240)
    assert (rank_1.returncode, printed) == (2, "")


def test_a_rank_whose_error_is_its_own_prints_it(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert "there is no key" in verb(*RUN, "loss.betta=0.2").err
    assert len(waited) == 1


def test_an_interrupt_is_one_line_and_a_bug_keeps_its_traceback(verb: Verb) -> None:
    assert verb(*RUN, "run.name=stop") == (130, "", "interrupted\n")
    ended = verb(*RUN, "run.name=fail")
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert "RuntimeError: a bug of the program" in ended.err


def test_cfg_prints_the_configuration_of_the_run(verb: Verb) -> None:
    shown = verb("--cfg", "job", *RUN, "loss.beta=0.2")
    assert shown.code == 0
    assert "beta: 0.2" in shown.out
    shown = verb(*RUN, "loss=simpo", "--cfg=job")
    assert "mode: none" in shown.out, "the resolved mode, not the composed one"
    assert verb("--cfg", "job", *RUN, "loss.beta=0").code == 2
    beta = json.loads(verb("--cfg", "schema").out)["$defs"]["LossConfig"]["properties"]["beta"]
    assert (beta["default"], beta["exclusiveMinimum"]) == (0.1, 0)


def test_a_command_that_only_names_its_run_is_told_what_to_begin_with(verb: Verb, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(load_run_config([*RUN, f"run.dir={tmp_path}", "loss.beta=0.3"])))
    ended = verb(f"run.dir={tmp_path}", "trainer.max_steps=5")
    assert ended.code == 2
    assert "dpo-dist train RUN/config.yaml" in ended.err
    shown = verb("--cfg", "job", str(config), "trainer.max_steps=5")
    assert shown.code == 0
    found = yaml.safe_load(shown.out)
    assert (found["loss"]["beta"], found["trainer"]["max_steps"], found["run"]["dir"]) == (
        0.3,
        5,
        str(tmp_path),
    )


def test_help_and_version(verb: Verb) -> None:
    assert verb("--version") == (0, f"dpo_dist {dpo_dist.__version__}\n", "")
    ended = verb("--help")
    assert ended.code == 0
    for text in ("dpo-dist [launch] train", "loss: aot, aot_unpaired", "--config-dir", "optim        AdamW"):
        assert text in ended.out
    assert "default:  0.1\n" in verb("--help", "loss.beta").out
    assert "did you mean loss.beta, a number, > 0?" in verb("-h", "loss.betta").err
    assert "did you mean weight?" in verb("-h", "data.train[0].wieght").err
    of_compare = usage("", "", verb_keys("compare"), group_folders())
    listed = set(re.findall(r"^  (\w+):? ", of_compare, re.MULTILINE))
    assert {"compare", "data", "parallelism", "experiment"} <= listed
    assert not listed & {"optim", "trainer", "samples", "tracking", "doctor", "export", "loss"}


@pytest.mark.parametrize("name", ["sweep", "precompute", "evaluate", "doctor", "plan", "export"])
def test_help_of_a_verb_that_takes_a_training_run_has_its_keys(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        run_verb(tiny_verb.main, verb=name)
    listed = set(re.findall(r"^  (\w+):? ", capsys.readouterr().out, re.MULTILINE))
    assert {"loss", "optim", "trainer", "parallelism", "experiment"} <= listed


def facts(key: str) -> dict[str, str]:
    """The labelled lines of an explanation."""
    lines = [line.strip().partition(":") for line in explain(key, group_folders()).splitlines()[1:]]
    return {label: text.strip() for label, _, text in lines}


def test_every_key_and_section_is_explained() -> None:
    for key, row in all_keys().items():
        explained = facts(key)
        assert explained["meaning"] == row.meaning != ""
        assert explained["type"]
        assert explained["default"]
        assert explained["verbs"] == ", ".join(row.verbs) != ""
        assert explained["digest"].startswith("part of" if row.defines_result else "not part of")
    for section, meaning in section_meanings().items():
        text = explain(section, group_folders())
        assert text.startswith(f"{section}: {meaning}")
        for key in all_keys():
            assert (f"\n  {key} " in text) == key.startswith(f"{section}.")


def test_the_facts_of_some_keys() -> None:
    assert facts("loss.beta")["type"] == "a number, > 0"
    assert facts("trainer.max_steps")["type"] == "a whole number or null, >= 1"
    assert facts("loss.options.gamma")["kinds"] == "simpo"
    assert facts("model.path")["default"] == "none, it must be set"
    assert facts("data.train[0].weight") == facts("data.train.weight") == facts("data.train[].weight")
    assert facts("data.train.weight")["verbs"] == "train, precompute"
    assert "presets: parallelism=ddp|zero2|zero3|" in explain("parallelism", group_folders())
    assert "presets: +experiment=demo|" in explain("experiment", group_folders())


def test_the_verbs_are_the_programs_with_a_configuration() -> None:
    package = Path(dpo_dist.__file__).parent
    modules = {file for file in package.rglob("*.py") if "\n    run_verb(main" in file.read_text()}
    names = {".".join(file.relative_to(package.parent).with_suffix("").parts) for file in modules}
    configured = set(EVERY_VERB.split())
    assert {VERBS[verb].module for verb in configured} == {name.removesuffix(".__main__") for name in names}
    assert {verb for row in all_keys().values() for verb in row.verbs} == configured


@pytest.mark.parametrize(
    "option",
    [
        *("USE_FSDP=true", "DYNAMO_BACKEND=inductor", "GRADIENT_CLIPPING=9.0", "DEEPSPEED_ZERO_STAGE=2"),
        *(
            "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=cpu",
            "DEEPSPEED_OFFLOAD_PARAM_DEVICE=cpu",
            "MIXED_PRECISION=fp16",
        ),
    ],
)
def test_options_of_a_launcher_are_refused(option: str, verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*f"ACCELERATE_{option}".split("="))
    ended = verb(*RUN)
    assert (ended.code, ended.out) == (2, "")
    assert f"ACCELERATE_{option}" in ended.err


def test_an_option_of_a_launcher_that_agrees_is_accepted(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1")
    assert verb(*RUN).err == ""


def test_a_verb_without_check_refuses_the_option(verb: Verb) -> None:
    ended = verb("--check", *RUN)
    assert ended.code == 2
    assert "this verb has no --check" in ended.err


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("merge", "write dpo-dist export run.dir=RUN export.merge=true"),
        ("dpo", "write dpo-dist train"),
        ("resume", "write dpo-dist train RUN/config.yaml"),
        ("version", "write dpo-dist --version"),
        ("grpo", "not offered: there is no online RL"),
        ("evluate", "did you mean evaluate?"),
        ("+experiment=smollm2", "write the verb first: dpo-dist train +experiment=smollm2"),
        ("mine.yaml", "write the verb first: dpo-dist train mine.yaml"),
        ("xyzzy", "there is no verb 'xyzzy'"),
        ("--check", "write the verb first: dpo-dist train --check"),
        ("list", "write dpo-dist report output/*"),
        ("init", "write dpo-dist train model.path=MODEL 'data.train=[FILE]' --cfg job > my.yaml"),
    ],
)
def test_a_verb_that_is_not_there_names_the_one_that_is(
    verb: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dpo-dist", verb])
    assert dpo_dist.__main__.main() == 2
    assert said in capsys.readouterr().out.splitlines()[-1]


def test_the_list_has_the_verbs_of_a_run_before_those_of_tools(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dpo-dist", "--help"])
    assert dpo_dist.__main__.main() == 0
    runs, tools = capsys.readouterr().out.split("look at data, models and runs:")
    assert {"train", "export"} <= {line.split()[0] for line in runs.splitlines() if line}
    assert {"doctor", "convert"} <= {line.split()[0] for line in tools.splitlines() if line}


def test_the_version_does_not_read_the_keys() -> None:
    program = "import sys, dpo_dist.__main__ as main; main.main(); print('pydantic' in sys.modules)"
    command = [sys.executable, "-c", program, "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [f"dpo_dist {dpo_dist.__version__}", "False"]


@pytest.mark.parametrize("option", ["-m", "--multirun"])
def test_train_with_the_option_of_hydra_is_the_sweep(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dpo-dist", "train", "loss.beta=0.1,0.2", option, "my.yaml"])
    programs = []
    monkeypatch.setattr(os, "execv", lambda _, program: programs.append(program))
    dpo_dist.__main__.main()
    assert programs == [[sys.executable, "-m", VERBS["sweep"].module, "loss.beta=0.1,0.2", "my.yaml"]]


GPUS = [f"nvidia{number}" for number in range(4)]


@pytest.mark.parametrize(
    ("typed", "files", "variables", "launched"),
    [
        ("train a=1", GPUS, {}, "--num_processes 4 train a=1"),
        ("evaluate a=1 --check", GPUS, {}, "--num_processes 4 evaluate a=1 --check"),
        ("train --processes 2 a=1", GPUS, {}, "--num_processes 2 train a=1"),
        ("train a=1 --processes=2", [], {}, "--num_processes 2 train a=1"),
        ("train a=1 --processes 1", GPUS, {}, ""),
        ("train a=1", GPUS[:1], {}, ""),
        ("train --help", GPUS, {}, ""),
        ("doctor a=1", GPUS, {}, ""),
        ("train a=1", GPUS, {"LOCAL_RANK": "0"}, ""),
        ("train a=1", GPUS, {"SLURM_JOB_ID": "7"}, ""),
    ],
)
def test_a_verb_of_several_processes_starts_one_for_each_gpu_outside_of_a_launcher(
    typed: str,
    files: list[str],
    variables: dict[str, str],
    launched: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in WORLD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(dpo_dist.__main__, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(files))
    monkeypatch.setattr(sys, "argv", ["dpo-dist", *typed.split()])
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _python, words: started.append(words))
    dpo_dist.__main__.main()
    [[_python, _option, module, *arguments]] = started
    verb, *rest = typed.replace(" --processes 1", "").split()
    if launched:
        assert (module, arguments) == ("dpo_dist.verbs.launch", launched.split())
    else:
        assert (module, arguments) == (VERBS[verb].module, rest)


def test_a_number_of_processes_that_nothing_can_start_is_an_error() -> None:
    for typed in ("--processes 2", "--processes 0"):
        [mistake] = split_words(typed.split()).mistakes
        assert "dpo-dist VERB --processes N" in mistake.remedy
    with pytest.raises(ConfigError, match="invalid int value"):
        split_words(["--processes", "all"])


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (["python", "-u", "-X", "dev", "-m", "dpo_dist"], ["-u", "-X", "dev"]),  # launchers give -u
        (["python", "-m", "dpo_dist"], []),
        (["python", "/bin/dpo-dist"], []),
    ],
)
def test_a_verb_has_the_options_of_the_python_that_started_it(
    before: list[str], kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "plan", "a=-m"])
    monkeypatch.setattr(sys, "orig_argv", [*before, "plan", "a=-m"])
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _python, words: started.append(words))
    dpo_dist.__main__.main()
    assert started == [[sys.executable, *kept, "-m", "dpo_dist.tools.plan", "a=-m"]]


def test_a_verb_without_a_configuration_runs_once_under_a_launcher() -> None:
    """Only `run_verb` lets several processes work together, and rank 0 print."""
    assert [name for name, verb in VERBS.items() if not (verb.is_configured or verb.is_one_process)] == []


def test_a_verb_of_options_prints_its_mistakes_as_the_others_do() -> None:
    for module in (chat, convert, report, store):
        with pytest.raises(ConfigError, match="the following arguments are required"):
            module.main([])


@pytest.mark.parametrize(("launched", "ends"), [({"TORCHELASTIC_RUN_ID": "none"}, True), ({}, False)])
def test_of_several_processes_only_the_first_one_is_a_verb_of_one_process(
    launched: dict[str, str], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod may set RANK without a launcher."""
    monkeypatch.setattr(sys, "argv", ["dpo-dist", "report", "output/a"])
    for name, value in {"RANK": "1", **launched}.items():
        monkeypatch.setenv(name, value)
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _python, words: started.append(words))
    dpo_dist.__main__.main()
    assert bool(started) is not ends
