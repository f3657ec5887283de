"""Overrides become one typed, frozen run; every mistake in them is told with the key that was meant."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_dist.config import command_line
from dpo_dist.config.describe import settings, title
from dpo_dist.config.keys import key_types
from dpo_dist.config.load import config_dir, from_yaml, load_run_config, run_digest, run_dir, to_yaml
from dpo_dist.config.loss_kinds import LossConfig, LossKind, LossTermConfig
from dpo_dist.config.schema import Dtype, Offload, ReferenceMode, RunConfig, SourceConfig
from dpo_dist.errors import ConfigError

ROOT = Path(__file__).parents[3]
RUN = ["model.path=m", "data.train=[a.jsonl]"]
GROUPS = sorted(
    (file.parent.name, file.stem)
    for file in config_dir().glob("*/*.yaml")
    if file.parent.name != "experiment"
)
EXPERIMENTS = sorted(file.stem for file in (config_dir() / "experiment").glob("*.yaml"))
Verb = Callable[..., subprocess.CompletedProcess[str]]


def error_of(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_run_config([*RUN, *overrides])
    return caught.value


# What a composed run is


def test_overrides_win_over_the_experiment() -> None:
    config = load_run_config(["+experiment=qwen7b", "loss.beta=0.2", "optim.lr=5e-6", "model.dtype=fp32"])
    assert (config.loss.beta, config.optim.lr, config.model.dtype) == (0.2, 5e-6, Dtype.fp32)
    assert (config.model.path, config.reference.offload) == ("Qwen/Qwen2.5-7B", Offload.cpu)
    assert config.trainer.global_batch_pairs == 128


def test_experiments_can_be_stacked() -> None:
    config = load_run_config(["+experiment=[qwen7b,smoke]"])
    assert (config.model.path, config.trainer.max_steps) == ("Qwen/Qwen2.5-7B", 4)


def test_sources_are_typed_whether_written_short_or_long() -> None:
    config = load_run_config(["model.path=m", "data.train=[a.jsonl,{path: b, limit: 5, weight: 2}]"])
    assert config.data.train == [SourceConfig("a.jsonl"), SourceConfig("b", limit=5, weight=2.0)]


def test_terms_are_typed() -> None:
    config = load_run_config([*RUN, "loss.terms=[{kind: sigmoid},{kind: sft, weight: 0.1}]"])
    assert config.loss.terms == [LossTermConfig(LossKind.sigmoid), LossTermConfig(LossKind.sft, 0.1)]


def test_the_run_is_frozen() -> None:
    config = load_run_config(RUN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.loss.beta = 1.0  # type: ignore[misc]


def test_shared_folders_follow_the_root() -> None:
    config = load_run_config([*RUN, "run.root=/scratch/me"])
    assert (config.data.cache, config.reference.store) == ("/scratch/me/encoded", "/scratch/me/reference")


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_preset_composes(group: str, name: str) -> None:
    needed = [override for override in RUN if not override.startswith(group)]
    going_with = {"none": ["loss=sft"], "adapter": ["model.adapter={r: 8}"]}
    besides = going_with.get(name, []) if group == "reference" else []
    config = load_run_config([*needed, *besides, f"{group}={name}"])
    if group == "loss":
        kinds = [LossKind.sigmoid, LossKind.sft] if name == "sigmoid_sft" else [LossKind[name]]
        assert list(config.loss.kinds) == kinds


def test_every_loss_has_a_preset() -> None:
    presets = {name for group, name in GROUPS if group == "loss"}
    assert set(LossKind.__members__) <= presets
    assert presets - set(LossKind.__members__) == {"sigmoid_sft"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment: str) -> None:
    alone = experiment != "smoke"
    assert load_run_config([*([] if alone else RUN), f"+experiment={experiment}"]).run.name != "run"


def test_every_key_has_a_type_that_can_be_told() -> None:
    for key, hint in key_types(RunConfig).items():
        assert hint is not None, key
    assert key_types(RunConfig)["loss.beta"] is float


@pytest.mark.parametrize(
    "overrides",
    [
        ["+experiment=qwen7b"],
        [*RUN, "tracking=off", "tracking.tags=['on','1']"],
        [*RUN, "loss.terms=[{kind: ipo}]", "trainer.max_seconds=1.5", "run.dir=/x/y"],
    ],
)
def test_written_configuration_reads_back_equal(overrides: list[str]) -> None:
    config = load_run_config(overrides)
    assert from_yaml(to_yaml(config)) == config


def test_written_configuration_is_an_experiment(tmp_path: Path, verb: Verb) -> None:
    config = load_run_config([*RUN, "loss.beta=0.3"])
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "again.yaml").write_text(to_yaml(config))
    assert verb("--config-dir", str(tmp_path), "+experiment=again").stdout.strip() == config.run.dir


# The folder of a run


def folder(*overrides: str) -> str:
    return str(load_run_config([*RUN, *overrides]).run.dir)


@pytest.mark.parametrize(
    "change",
    ["loss.beta=0.2", "model.path=n", "data.train=[b.jsonl]", "optim.lr=2e-6", "trainer.seed=1", "loss=ipo"],
)
def test_what_defines_the_result_changes_the_folder(change: str) -> None:
    assert folder(change) != folder()


@pytest.mark.parametrize(
    "change",
    [
        "trainer.micro_batch_tokens=100",
        "trainer.stop_after_steps=3",
        "trainer.max_seconds=3",
        "trainer.save_every=7",
        "model.gradient_checkpointing=full",
        "model.gradient_checkpointing=2",
        "model.compile=true",
        "model.liger=true",
        "model.attention=sdpa",
        "parallelism=zero2",
        "parallelism.offload_parameters=cpu",
        "reference.offload=cpu",
        "tracking=off",
        "run.resume=must",
        "loss.beta=1e-1",
    ],
)
def test_hardware_and_habits_do_not_change_the_folder(change: str) -> None:
    assert folder(change) == folder()


def test_the_folder_is_named_after_root_and_name() -> None:
    config = load_run_config([*RUN, "run.root=/r", "run.name=n"])
    assert run_dir(config).parent == Path("/r")
    assert run_dir(config).name.startswith("n-")
    assert folder("run.dir=/mine") == "/mine"


# What tells runs apart


def test_settings_tell_what_differs_and_the_usual() -> None:
    told = settings(load_run_config([*RUN, "loss=simpo", "optim.lr=5e-7", "data.truncation=drop"]))
    assert told == {
        "model.path": "m",
        "data.train": [{"path": "a.jsonl"}],
        "data.truncation": "drop",
        "loss.kind": "simpo",
        "loss.beta": 2.0,
        "loss.simpo_gamma": 1.0,
        "reference.mode": "none",
        "optim.lr": 5e-7,
        "trainer.epochs": 1.0,
        "trainer.global_batch_pairs": 64,
        "trainer.seed": 0,
    }
    assert json.loads(json.dumps(told)) == told
    told = settings(
        load_run_config([*RUN, "loss=sigmoid_sft", "model.adapter={r: 8}", "trainer.save_every=7"])
    )
    assert told["loss.terms"] == [{"kind": "sigmoid"}, {"kind": "sft", "weight": 0.1}]
    assert told["model.adapter"] == {"r": 8}
    assert not {"loss.kind", "trainer.save_every"} & set(told)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["loss=ipo", "run.name=mine"], "mine ipo beta=0.1 lr=1e-06 {digest}"),
        (["loss=sft", "optim.lr=2e-5"], "run sft lr=2e-05 {digest}"),
        (
            ["loss=sigmoid_sft", "trainer.seed=3", "run.dir=/x/there"],
            "there sigmoid+sft beta=0.1 lr=1e-06 seed=3",
        ),
        (["model.adapter={r: 8, variant: dora}"], "run sigmoid beta=0.1 lr=1e-06 dora r=8 {digest}"),
    ],
)
def test_a_title_tells_what_people_compare(overrides: list[str], name: str) -> None:
    config = load_run_config([*RUN, *overrides])
    assert title(config, Path(str(config.run.dir))) == name.format(digest=run_digest(config))


# Mistakes


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("loss.betta=0.2", "loss.beta"),
        ("beta=0.2", "loss.beta"),
        ("lr=1e-5", "optim.lr"),
        ("optim.learning_rate=1", "optim."),
        ("+loss.gamma=1", "loss."),
        ("++loss.gamma=1", "loss."),
        ("training.epochs=2", "trainer.epochs"),
        ("loss={betta: 1}", "loss.beta"),
        ("data.train=[{path: a, limt: 3}]", "limit"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, meant: str) -> None:
    error = error_of(override)
    assert error.what.startswith("there is no key")
    assert meant in error.remedy


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.beta=abc", "a number"),
        ("loss.beta=true", "a number"),
        ("loss.beta=null", "a number"),
        ("trainer.max_steps=1.5", "a whole number or null"),
        ("model.gradient_checkpointing=maybe", "none, full, or n of 2 or more"),
        ("model.gradient_checkpointing=1", "none, full, or n of 2 or more"),
        ("model.trust_remote_code=maybe", "true or false"),
        ("data.train=a.jsonl", "a list in brackets: [a,b]"),
        ("data.train=[{path: a, limit: many}]", "a whole number or null"),
        ("data.train=[3]", "a path, a hub name or a mapping with path"),
        ("optim.betas=[a,b]", "a number"),
        ("loss.kind=sigmoyd", "one of sigmoid, "),
        ("loss.kind=dpo", "one of sigmoid, "),
        ("loss=simpoo", "one of simpo, "),
        ("+experiment=qwen", "one of qwen7b"),
        ("+experiment=[qwen,smoke]", "one of qwen7b"),
    ],
)
def test_wrong_value_tells_what_is_expected(override: str, expected: str) -> None:
    assert error_of(override).expected.startswith(expected)


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("experiment=qwen7b", "write +experiment=qwen7b"),
        ("+loss.beta=0.2", "write loss.beta=0.2"),
        ("trainer.seed=1,2", "one job for each value"),
        ("loss=3", "choose one of aot, aot_unpaired"),
        ("loss.beta", "quotes"),
        ("loss.beta=[1", "quotes"),
        ("data.train=[{limit: 3}]", "set data.train[0].path"),
        ("loss.terms=[{weight: 1}]", "set loss.terms[0].kind"),
    ],
)
def test_misused_override_tells_what_to_write(override: str, remedy: str) -> None:
    assert remedy in error_of(override).remedy


def test_missing_model_names_the_presets() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is not set") as caught:
        load_run_config([])
    assert "qwen2_5_7b" in caught.value.remedy


def test_unknown_interpolation_names_the_key() -> None:
    assert "data.cache" in error_of("data.cache=${run.rot}/x").where


def test_an_unknown_name_in_a_term_is_told_with_its_place() -> None:
    error = error_of("loss.terms=[{kind: sigmoid},{kin: sft}]")
    assert error.where == "loss.terms[1].kin"
    assert (error.expected, error.remedy) == ("loss.terms[1].kind", "did you mean kind?")


# Presets of the command line and of an experiment


def test_a_preset_of_the_command_line_counts_after_an_experiment() -> None:
    config = load_run_config(["+experiment=qwen7b", "trainer=default"])
    assert config.trainer.global_batch_pairs == 64
    assert config.trainer.micro_batch_tokens == 16384, "what the preset does not say stays the experiment's"
    config = load_run_config(["+experiment=qwen7b", "trainer=default", "trainer.global_batch_pairs=32"])
    assert config.trainer.global_batch_pairs == 32


def test_a_loss_of_the_command_line_replaces_the_experiments_whole() -> None:
    config = load_run_config(["+experiment=qwen7b_lora", "loss=simpo", "loss.simpo_gamma=0.7"])
    assert (config.loss.kind, config.loss.beta, config.loss.simpo_gamma) == (LossKind.simpo, 2.0, 0.7)
    assert config.model.adapter is not None


def test_an_option_that_an_experiment_sets_for_its_own_loss_is_gone_with_it(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nloss: {kind: simpo, simpo_gamma: 0.3}\nreference: {mode: none}\n"
    )
    config = load_run_config([*RUN, "+experiment=mine", "loss=ipo"], tmp_path)
    assert (config.loss, config.reference.mode) == (LossConfig(LossKind.ipo), ReferenceMode.cached)
    assert load_run_config([*RUN, "+experiment=mine"], tmp_path).loss.simpo_gamma == 0.3


@pytest.mark.parametrize(
    ("overrides", "mode"),
    [
        (RUN, "cached"),
        ([*RUN, "loss=simpo"], "none"),
        ([*RUN, "loss.reference_free=true"], "none"),
        ([*RUN, "loss.terms=[{kind: sft},{kind: simpo}]"], "none"),
        ([*RUN, "loss=sigmoid_sft"], "cached"),
        ([*RUN, "model.adapter={r: 8}"], "adapter"),
        ([*RUN, "model.adapter={r: 8}", "model.quantization=nf4", "parallelism=ddp"], "adapter"),
        ([*RUN, "model.adapter={r: 8}", "loss=orpo"], "none"),
        ([*RUN, "model.adapter={r: 8}", "reference.path=other"], "cached"),
        ([*RUN, "model.adapter={r: 8}", "reference=cached"], "cached"),
        (["+experiment=qwen7b"], "cached"),
        (["+experiment=qwen7b", "loss=simpo"], "none"),
        (["+experiment=qwen7b", "loss.kind=sft"], "none"),
        (["+experiment=qwen7b", "reference=none", "loss=cpo"], "none"),
        (["+experiment=qwen7b", "model.adapter={r: 8}"], "adapter"),
        (["+experiment=qwen7b_lora"], "adapter"),
        (["+experiment=qwen7b_lora", "model.adapter=null"], "cached"),
        (["+experiment=qwen7b_sft", "loss=ipo"], "cached"),
    ],
)
def test_the_reference_follows_loss_and_model(overrides: list[str], mode: str) -> None:
    config = load_run_config(overrides)
    assert config.reference.mode == mode
    assert from_yaml(to_yaml(config)) == config, "config.yaml records the mode that was found"
    offload = Offload.cpu if mode == "cached" and "+experiment=qwen7b" in overrides else Offload.none
    assert config.reference.offload is offload


@pytest.mark.parametrize("mode", ["cached", "none", "adapter"])
def test_a_mode_that_an_experiment_records_does_not_fight_the_command_line(mode: str, tmp_path: Path) -> None:
    before = {"none": ["loss=simpo"], "adapter": ["model.adapter={r: 8}"]}.get(mode, [])
    (tmp_path / "experiment").mkdir()
    written = to_yaml(load_run_config([*RUN, *before]))
    (tmp_path / "experiment" / "again.yaml").write_text(written.replace("  dir: ", "  # dir: "))
    assert f"mode: {mode}" in written
    for loss, wanted in (("sft", "none"), ("ipo", "adapter" if mode == "adapter" else "cached")):
        config = load_run_config(["+experiment=again", f"loss={loss}"], tmp_path)
        assert config.reference.mode == wanted
    assert load_run_config(["+experiment=again", "model.adapter=null"], tmp_path).model.adapter is None


def test_a_mode_that_is_found_names_the_same_run_as_one_that_is_said() -> None:
    assert folder() == folder("reference=cached")
    assert folder("loss=simpo") == folder("loss=simpo", "reference=none")
    assert folder("model.adapter={r: 8}") == folder("model.adapter={r: 8}", "reference=adapter")


def test_an_option_of_the_command_line_that_the_mode_does_not_use_is_still_an_error() -> None:
    error = error_of("loss=simpo", "reference.offload=cpu")
    assert error.where == "reference.offload, reference.mode"


# The command line of a verb


@pytest.fixture
def verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Verb:
    """Run the tiny verb in an empty folder, as a program of its own."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tests" / "support" / "tiny_verb.py"), *arguments]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        assert not list(work.iterdir()), "the command line left something behind"
        return done

    return run


def test_verb_runs_with_the_same_folder_in_every_process(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    done = [verb(*RUN)]
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    done.append(verb(*RUN))
    assert [(one.returncode, one.stdout.strip()) for one in done] == [(75, folder())] * 2
    assert not done[0].stderr


def test_a_users_mistake_is_one_block(verb: Verb) -> None:
    done = verb(*RUN, "loss.betta=0.2")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "configuration error: there is no key 'loss.betta'",
        "  where:    command line: loss.betta=0.2",
        "  expected: loss.beta",
        "  to do:    did you mean loss.beta?",
    ]


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1]
    return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)


def test_other_ranks_stay_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for the launcher, which ends them when rank 0 has printed its error and left."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, str(ROOT / "tests" / "support" / "tiny_verb.py"), *RUN, "loss.betta=0.2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as rank_1:
        while not catches_sigterm(rank_1.pid):
            time.sleep(0.02)
        rank_1.terminate()
        _, told = rank_1.communicate(timeout=30)
    assert (rank_1.returncode, told) == (2, "")


def test_a_rank_that_nobody_ends_is_alone_with_its_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(command_line.time, "sleep", waited.append)
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)
    error = ConfigError("no such folder", where="model.path")
    command_line._print(error)
    assert capsys.readouterr().err == error.block() + "\n"
    assert len(waited) == 1
    error.reporting_rank = 0
    command_line._print(error)
    assert (capsys.readouterr().err, len(waited)) == ("", 1), "another rank prints it"


def test_a_fault_of_the_program_keeps_its_traceback(verb: Verb) -> None:
    done = verb(*RUN, "run.name=fail")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: a fault of the program" in done.stderr


@pytest.mark.parametrize("arguments", [["--multirun", "trainer.seed=1,2"], ["hydra.mode=MULTIRUN"]])
def test_multirun_is_refused(arguments: list[str], verb: Verb) -> None:
    done = verb(*arguments, *RUN)
    assert done.returncode == 2
    assert "for each value" in done.stderr


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("loss: {betta: 1}", "loss.betta in experiment/mine.yaml"),
        ("loss: {beta: x}", "loss.beta in experiment/mine.yaml"),
        ("tracking: {wandb: off}", "put the word in quotes"),
        ("loss: {beta: [1", 'mine.yaml", line 2'),
        ("defaults: [{override /loss: ipoo}]", "did you mean loss=ipo?"),
    ],
)
def test_mistakes_in_own_files(content: str, told: str, tmp_path: Path, verb: Verb) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}")
    done = verb("--config-dir", str(tmp_path / "conf"), *RUN, "+experiment=mine")
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_hydras_own_questions_are_answered(verb: Verb) -> None:
    shown = verb("--cfg", "job", *RUN, "loss.beta=0.2")
    assert shown.returncode == 0
    assert "beta: 0.2" in shown.stdout
    helped = verb("--help")
    assert helped.returncode == 0
    assert "loss: aot, aot_unpaired" in helped.stdout


def test_a_shown_configuration_is_checked_too(verb: Verb) -> None:
    shown = verb("--cfg", "job", *RUN, "loss.beta=0")
    assert shown.returncode == 2
    assert "beta: 0" in shown.stdout
    assert "loss.beta is out of range" in shown.stderr
    shown = verb(*RUN, "loss=simpo", "--cfg=job", "-p", "reference")
    assert "mode: none" in shown.stdout, "what would run, not what was composed"


def test_who_reads_only_the_beginning_gets_no_traceback(verb: Verb) -> None:
    tiny = ROOT / "tests" / "support" / "tiny_verb.py"
    for arguments in (["--help"], ["--cfg", "job", *RUN]):
        command = [sys.executable, str(tiny), *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""


def test_a_verb_without_check_says_so(verb: Verb) -> None:
    done = verb("--check", *RUN)
    assert done.returncode == 2
    assert "this verb has no --check" in done.stderr


def test_own_experiments_are_found_wherever_the_option_stands(tmp_path: Path, verb: Verb) -> None:
    (tmp_path / "my conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nrun: {name: mine}\n")
    done = verb(*RUN, "--config-dir", str(tmp_path / "my conf"), "+experiment=mine", "loss.beta=0.3")
    assert done.returncode == 75, done.stderr
    assert "output/mine-" in done.stdout


def test_configuration_needs_no_torch() -> None:
    command = "import sys, dpo_dist.config.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode == 0
