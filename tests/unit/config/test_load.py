"""Words compose to one typed, frozen run: defaults, experiments, YAML files, presets, the command line."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hydra
import pytest

from dpo_dist.config import keys
from dpo_dist.config.keys import config_dir
from dpo_dist.config.losses import LossKind, LossTermConfig, SimpoOptions, SyncReferenceConfig
from dpo_dist.config.schema import UNSET, AdapterConfig, Offload, TrainerConfig
from dpo_dist.data.config import SourceConfig
from tests.support.own_loss import OWN
from tests.unit.config.support import RUN, configured, error_of, written_and_read

PRESETS = sorted(config_dir().glob("*/*.yaml"))
EXPERIMENTS = [file.stem for file in PRESETS if file.parent.name == "experiment"]
GROUPS = [(file.parent.name, file.stem) for file in PRESETS if file.parent.name != "experiment"]
HEADER = "# @package _global_\n"
MINE = """
model: {path: m}
data: {train: [a.jsonl, {path: b, limit: 3}]}
loss: {kind: ipo, beta: 0.3, options: {length_average: false}}
optim.lr: 2e-6
parallelism: ddp
sampling: {prompts: 4, max_new_tokens: 64}
data.eval_share: 0.1
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files of keys."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(MINE)
    Path("seed.yml").write_text("trainer: {seed: 3}\nloss: {beta: 0.4}\n")
    Path("conf/experiment").mkdir(parents=True)
    return tmp_path


def write(**files: str) -> None:
    """Write files of the own folder: `loss__mine` is conf/loss/mine.yaml."""
    for name, text in files.items():
        file = Path("conf", f"{name.replace('__', '/')}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def alone(typed: str, **options: str) -> Any:
    return configured(typed, run=[], **options)


def test_values_are_typed() -> None:
    sources = "data.train=[a.jsonl,{path:b,limit:5,weight:2}]"
    config = configured(f"{sources} reference=live loss.sync_reference={{every:512,mixup:0.3}}")
    assert config.data.train == [SourceConfig("a.jsonl"), SourceConfig("b", limit=5, weight=2.0)]
    assert config.loss.sync_reference == SyncReferenceConfig(512, 0.3)
    terms = configured("loss.terms=[{kind:sigmoid},{kind:sft,weight:0.1}]").loss.terms
    assert terms == [LossTermConfig(LossKind.sigmoid), LossTermConfig(LossKind.sft, 0.1)]
    adapter = configured("model.adapter.r=8 model.adapter.target_modules=[q_proj]").model.adapter
    assert adapter == AdapterConfig(8, target_modules=["q_proj"])
    config = configured("run.root=/scratch/me")
    assert (config.data.cache, config.reference.store) == ("/scratch/me/encoded", "/scratch/me/reference")


def test_keys_in_a_mapping_are_texts() -> None:
    config = configured("'data.template_arguments={a: [{1: x, b: y}]}'")
    assert config.data.template_arguments == {"a": [{"1": "x", "b": "y"}]}
    assert written_and_read(config) == config


def test_a_value_to_be_filled_in_changes_nothing() -> None:
    Path("open.yaml").write_text("trainer: {seed: '???', max_steps: 5}")
    assert configured("open.yaml").trainer == TrainerConfig(max_steps=5)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_preset_composes(group: str, name: str) -> None:
    needed = [word for word in RUN if not word.startswith(group)]
    further = {"none": "loss=sft", "adapter": "model.adapter.r=8", "custom": f"loss.function={OWN}"}
    further |= {"distill": "teacher.path=teacher"}
    config = configured(f"{further.get(name, '')} {group}={name}", run=needed)
    if group == "loss":
        assert config.loss.kinds == (("sigmoid", "sft") if name == "sigmoid_sft" else (name,))


def test_every_loss_has_a_preset() -> None:
    assert {name for group, name in GROUPS if group == "loss"} == {*LossKind, "sigmoid_sft"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment: str) -> None:
    run = RUN if experiment == "smoke" else []
    assert configured(f"+experiment={experiment}", run=run).run.name != "run"


def test_a_text_is_as_typed_and_is_read_back_from_a_written_configuration() -> None:
    texts = "run.name=1e3 compare.models=[\\'on\\',\\'1\\'] model.adapter={path:sft}"
    config = configured(f"{texts} trainer.max_seconds=1.5")
    assert (config.run.name, config.compare.models) == ("1e3", ["on", "1"])
    assert written_and_read(config) == config


def test_the_command_line_wins_over_experiments_which_can_be_stacked() -> None:
    config = alone("+experiment=qwen7b loss.beta=0.2 optim.lr=5e-6 model.dtype=fp32")
    assert (config.loss.beta, config.optim.lr, config.model.dtype) == (0.2, 5e-6, "fp32")
    assert (config.model.path, config.trainer.global_batch_pairs) == ("Qwen/Qwen2.5-7B", 128)
    config = alone("+experiment=[qwen7b,smoke]")
    assert (config.model.path, config.trainer.max_steps) == ("Qwen/Qwen2.5-7B", 4)
    adapter = alone("+experiment=qwen7b_lora model.adapter.alpha=16").model.adapter
    assert adapter == AdapterConfig(64, 16.0)
    config = alone("+experiment=qwen7b compare.models=[a,b] data.eval=[e]", verb="compare")
    assert config.optim.lr == alone("+experiment=qwen7b").optim.lr, "one may serve several verbs"


def test_a_preset_of_the_command_line_applies_after_an_experiment() -> None:
    config = alone("+experiment=qwen7b_lora data=hh_rlhf model=llama3_1_8b")
    assert (config.data.truncation, config.data.max_length) == ("keep_end", 2048)
    assert config.model.path.startswith("meta-llama/")
    assert config.model.adapter is not None, "a key that the preset lacks has the experiment's value"
    assert alone("+experiment=qwen7b data=hh_rlhf").data.max_length == 1024, "not that of its preset"
    config = alone("+experiment=qwen7b trainer=default trainer.global_batch_pairs=32")
    assert config.trainer == TrainerConfig(global_batch_pairs=32), "one without values restores defaults"
    config = alone("+experiment=qwen7b_lora loss=simpo loss.options.gamma=0.7")
    assert (config.loss.kind, config.loss.beta) == (LossKind.simpo, 2.0)
    assert config.loss.options == SimpoOptions(0.7)


@pytest.mark.parametrize("typed", ["loss=ipo loss={beta:0.3}", "loss={beta:0.3} loss=ipo"])
def test_a_preset_and_a_mapping_of_its_group_both_count(typed: str) -> None:
    loss = configured(typed).loss
    assert (loss.kind, loss.beta) == (LossKind.ipo, 0.3)


@pytest.mark.parametrize(
    ("typed", "mode"),
    [
        ("model.path=m", "cached"),
        ("model.path=m loss=simpo", "none"),
        ("model.path=m reference.mode=none", "none"),
        ("model.path=m loss.terms=[{kind:sft},{kind:simpo}]", "none"),
        ("model.path=m model.adapter.r=8", "adapter"),
        ("model.path=m model.adapter.r=8 reference.path=other", "cached"),
        ("model.path=m model.adapter.r=8 reference=cached", "cached"),
        ("+experiment=qwen7b", "cached"),
        ("+experiment=qwen7b loss.kind=sft", "none"),
        ("+experiment=qwen7b model.adapter.r=8", "adapter"),
        ("+experiment=qwen7b_lora model.adapter=null", "cached"),
        ("+experiment=qwen7b_sft loss=ipo", "cached"),
    ],
)
def test_the_reference_follows_loss_and_model(typed: str, mode: str) -> None:
    config = alone(typed)
    assert config.reference.mode == mode
    assert written_and_read(config) == config, "config.yaml has the resolved mode"
    offload = Offload.cpu if mode == "cached" and "+experiment=qwen7b" in typed.split() else Offload.none
    assert config.reference.offload is offload
    assert alone(f"{typed} reference={mode}").identity.digest == config.identity.digest


def test_a_verb_can_work_without_a_model() -> None:
    assert alone("data.train=[a.jsonl]", verb="doctor").model.path == UNSET
    assert "model=NAME" in error_of("data.train=[a.jsonl]", verb="train", run=[]).remedy


# Files of one's own.


def test_a_file_is_the_same_run_as_its_keys_on_the_command_line() -> None:
    config = alone("mine.yaml", verb="train")
    assert (config.loss.kind, config.loss.beta, config.optim.lr) == ("ipo", 0.3, 2e-6)
    assert (config.parallelism.kind, config.data.train[1].limit) == ("ddp", 3)
    typed = "data.train=[a.jsonl,{path:b,limit:3}] loss=ipo loss.beta=0.3 loss.options.length_average=false"
    same = configured(f"{typed} optim.lr=2e-6 data.eval_share=0.1")
    assert config.identity.digest == same.identity.digest != alone("mine.yaml loss.beta=0.2").identity.digest


@pytest.mark.slow
def test_files_are_merged_left_to_right_and_the_command_line_wins() -> None:
    assert alone("mine.yaml seed.yml").loss.beta == 0.4
    config = alone("seed.yml mine.yaml")
    assert (config.loss.beta, config.trainer.seed) == (0.3, 3)
    assert alone("seed.yml mine.yaml loss.beta=0.2").loss.beta == 0.2
    config = alone("mine.yaml loss=simpo")
    assert (config.loss.kind, config.loss.beta, config.loss.options) == ("simpo", 2.0, SimpoOptions(1.0))
    Path("off.yaml").write_text("defaults: [tracking: off]\n")
    assert alone("mine.yaml off.yaml").tracking.to == []
    Path("pairs.yaml").write_text("data: hh_rlhf\n")
    config = alone("mine.yaml pairs.yaml data=ultrafeedback data.eval=[]")
    assert config.data.truncation == "keep_start", "not that of the preset before it"
    Path("preset.yaml").write_text("loss: hinge\ntracking: off\ntrainer: {seed: 4}\ndoctor.fail_on: error\n")
    config = alone("+experiment=qwen7b_sft preset.yaml seed.yml", verb="train")
    assert (config.model.path, config.loss.kind, config.loss.beta) == ("Qwen/Qwen2.5-7B", "hinge", 0.4)
    assert (config.trainer.seed, config.doctor.fail_on, config.tracking.to) == (3, "error", [])


@pytest.mark.parametrize(
    ("files", "kind", "beta"),
    [
        (["loss: simpo\nloss.beta: 2.5\n"], "simpo", 2.5),
        (["loss.beta: 3\nloss: simpo\n"], "simpo", 3.0),
        (["loss: {kind: simpo, options: {gamma: 1.5}}\n", "loss: ipo\n"], "ipo", 0.1),
        (["loss: {beta: 0.3}\n", "loss: simpo\n"], "simpo", 2.0),
        (["loss: simpo\n", "loss.beta: 2.5\n"], "simpo", 2.5),
        (["# @package _global_\ndefaults:\n- override /loss: simpo\nloss: {beta: 0.7}\n"], "simpo", 0.7),
    ],
)
def test_a_preset_of_a_file_is_below_its_own_keys_and_replaces_earlier_ones(
    files: list[str], kind: str, beta: float
) -> None:
    for number, text in enumerate(files):
        Path(f"{number}.yaml").write_text(text)
    loss = configured(" ".join(f"{number}.yaml" for number in range(len(files)))).loss
    assert (loss.kind, loss.beta) == (kind, beta)


@pytest.mark.slow
def test_hydra_composes_lists_of_defaults_and_packages_of_an_own_folder() -> None:
    write(
        loss__softer="defaults: [ipo, _self_]\nbeta: 0.05\n",
        loss__slow="# @package _global_\nloss: {kind: hinge}\noptim: {lr: 1e-8}\n",
        experiment__base="# @package _global_\noptim: {lr: 3e-6}\ntrainer: {seed: 1, epochs: 3}\n",
        experiment__mine="# @package _global_\ndefaults: [base, override /loss: softer]\ntrainer: {seed: 2}",
        experiment__plain=HEADER + "defaults: [base, override /loss: softer, _self_]\ntrainer: {seed: 4}\n",
        experiment__above="# @package _global_\ndefaults: [plain, _self_]\ntrainer: {seed: 6}\n",
        experiment__below="# @package _global_\ndefaults: [_self_, base]\ntrainer: {seed: 7, max_steps: 8}\n",
        cluster__a="# @package _global_\nparallelism: {kind: zero2}\n",
        cluster__b=HEADER + "reference: {offload: cpu}\ndefaults: [{override /tracking: 'off'}]\n",
        sampling__many="prompts: 64\n",
    )
    inside = Path("conf/loss/team/ipo.yaml")
    inside.parent.mkdir()
    inside.write_text("kind: ipo\nbeta: 0.9\n")
    config = configured("--config-dir conf loss=team/ipo")
    assert (config.loss.kind, config.loss.beta) == ("ipo", 0.9), "a preset in a folder of its group"
    config = configured(
        "--config-dir conf +experiment=mine +cluster=[a,b] sampling=many data.eval=[e] trainer.eval_every=5"
    )
    assert (config.loss.kind, config.loss.beta, config.optim.lr) == ("ipo", 0.05, 3e-6)
    assert (config.trainer.seed, config.trainer.epochs, config.sampling.prompts) == (2, 3, 64)
    of_clusters = config.parallelism.kind, config.reference.offload, config.tracking.to
    assert of_clusters == ("zero2", "cpu", [])
    seed, loss, above = [
        configured(f"--config-dir conf {words}")
        for words in ("+experiment=plain", "+experiment=plain loss=simpo", "+experiment=above")
    ]
    assert (above.loss.beta, above.trainer.seed, above.trainer.epochs) == (0.05, 6, 3), "files in files"
    assert (seed.trainer.seed, seed.trainer.epochs, seed.loss.beta) == (4, 3, 0.05)
    below = configured("--config-dir conf +experiment=below").trainer
    assert (below.seed, below.max_steps) == (1, 8), "a file that comes after _self_ wins"
    assert (loss.loss.kind, loss.loss.beta) == ("simpo", 2.0)
    config = configured("--config-dir conf loss=slow")
    assert (config.loss.kind, config.optim.lr) == ("hinge", 1e-8)
    config = configured("--config-dir conf '+experiment=[plain,smoke]'")
    assert (config.trainer.seed, config.trainer.max_steps) == (4, 4), "in the order of the command"


def test_an_own_folder_may_have_its_own_root_and_presets_of_the_same_name() -> None:
    write(
        config="defaults: [{loss: ipo}, {model: null}, _self_]\ntrainer: {seed: 5}\n",
        loss__ipo="{kind: ipo, beta: 0.9}",
    )
    config = configured("--config-dir conf model=qwen2_5_7b", run=RUN[1:])
    assert (config.loss.kind, config.loss.beta, config.trainer.seed) == ("ipo", 0.9, 5)


def test_a_wrong_key_is_named_with_the_file_that_hydra_composed() -> None:
    write(
        loss__mine="betta: 1\n",
        experiment__base="# @package _global_\ntrainer: {sede: 1}\n",
        experiment__mine="# @package _global_\ndefaults: [base, override /loss: mine]\nrunn: {name: x}\n",
    )
    text = error_of("--config-dir conf +experiment=mine").block()
    for place in ("loss/mine.yaml:1", "experiment/base.yaml:2", "experiment/mine.yaml:3"):
        assert f"{place}: there is no key" in text
    write(experiment__mine="defaults: [gone]\n")
    text = error_of("--config-dir conf +experiment=mine optim.lr=0 loss.betta=1").block()
    assert "there is no experiment named 'gone'" in text
    assert "optim.lr=0" in text, "mistakes of words are found, too"
    assert "loss.betta=1" in text
    write(trainer__mine="max_steps: [1\n")
    assert "trainer/mine.yaml:2" in error_of("--config-dir conf trainer=mine").block()
    write(loss__mine="betta: 1\n")
    assert error_of("--config-dir conf loss=mine").where == "loss/mine.yaml:1"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (HEADER + "hydra: {run: {dir: x}}\n", "there is no key 'hydra'"),
        ("# @package hydra.run\ndir: x\n", "there is no key 'hydra'"),
        (HEADER + "defaults: [base, override /loss: ipo]\n", "there is no experiment named 'base'"),
        (HEADER + "defaults: [override /loss: ipoo]\n", "did you mean loss=ipo?"),
        (HEADER + "defaults: [optional override /model: gone]\n", "there is no model named 'gone'"),
        (HEADER + "defaults: [override /hydra/job_logging: none]\n", "there is no key 'hydra'"),
        (HEADER + "defaults: [/loss: ipo]\n", "it lists 'override /GROUP: NAME'"),
        (HEADER + "defaults: [/loss@loss: ipo]\n", "use 'override loss: ipo'"),
        (HEADER + "defaults: [override /loss: '${pick}']\npick: ipo\n", "interpolation '${pick}'"),
        (HEADER + "defaults: [mine]\n", "this cannot be read"),
        (HEADER + "loss: ipo\n", "write 'override /loss: ipo' into the list of defaults"),
        (HEADER + "loss.beta: 0.3\n", "write loss.beta as keys inside of keys, 'loss: {beta: ...}'"),
        ("trainer: {seed: 5}\n", "experiment/mine.yaml:1\n  to do:    begin the file of an experiment with"),
    ],
)
def test_an_experiment_that_hydra_reads_otherwise_is_an_error(content: str, text: str) -> None:
    write(experiment__mine=content)
    assert text in error_of("--config-dir conf +experiment=mine").block()


def test_a_package_of_an_experiment_is_hydras() -> None:
    write(
        experiment__mine="# @package model\npath: other\n", loss__mine="defaults: [ipo, _self_]\nbeta: 0.7\n"
    )
    config = configured("--config-dir conf +experiment=mine loss=mine", run=RUN[1:])
    assert (config.model.path, config.loss.kind, config.loss.beta) == ("other", "ipo", 0.7)


@pytest.mark.parametrize(
    ("root", "typed", "text"),
    [
        ("- a\n", "", "config.yaml"),
        ("hydra: {}\n", "", "there is no key 'hydra'\n  where:    config.yaml:1"),
        ("trainer: {seed: 5}\n", "loss=ipo", "Could not override 'loss'. No match in the defaults list."),
    ],
)
def test_an_own_root_that_cannot_be_composed_is_an_error(root: str, typed: str, text: str) -> None:
    write(config=root)
    assert text in error_of(f"--config-dir conf {typed}").block()


def test_threads_load_their_own_configurations() -> None:
    kinds = ["ipo", "simpo"] * 4
    with ThreadPoolExecutor(4) as pool:
        assert [
            config.loss.kind for config in pool.map(configured, [f"loss={kind}" for kind in kinds])
        ] == kinds


def test_a_program_with_hydra_keeps_its_own() -> None:
    write(config="{}")
    with hydra.initialize_config_dir(version_base=None, config_dir=str(Path("conf").resolve())):
        configured("loss=ipo")
        assert hydra.compose("config") == {}


def test_every_mistake_in_files_is_named_with_its_file() -> None:
    Path("bad.yaml").write_text("learning_rate: 1e-5\nloss: {betta: 1}\nlora_rank: 8\ntrainer: {seed: x}\n")
    text = error_of("bad.yaml gone.yaml epochs=2").block()
    for line in (
        "this command has 6 mistakes",
        "bad.yaml:1: there is no key 'learning_rate'; did you mean optim.lr=1e-05?",
        "bad.yaml:2: there is no key 'loss.betta'; did you mean loss.beta=1?",
        "bad.yaml:3: there is no key 'lora_rank'; did you mean model.adapter.r=8?",
        "bad.yaml:4 ('x'): trainer.seed cannot have this value",
        "gone.yaml (No such file or directory): this cannot be read",
        "epochs=2: there is no key 'epochs'; did you mean trainer.epochs=2?",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            "console: {style: off}",
            "mine.yaml:1\n  got:      false\n  expected: one of auto, plain",
        ),
        ("loss: {beta: [1", "mine.yaml:2"),
        ("loss.beta: 1\nloss: {beta: 2}", "loss.beta is given twice\n  where:    mine.yaml:2"),
        ("optim: {lr: '1e-6'}", "got:      '1e-6'\n  expected: a number"),
        ("optim: {betas: ['0.9', 0.95]}", "optim.betas[0] cannot have this value"),
        ("- a", "this file has no keys"),
        ("defaults: 5", "mine.yaml"),
        ("run: 3", "run cannot have this value\n  where:    mine.yaml:1"),
        ("loss: [sigmoid]", "loss cannot have this value\n  where:    mine.yaml:1"),
        ("\nloss: ipoo", "there is no loss named 'ipoo'\n  where:    mine.yaml:2"),
        ("experiment: gone", "there is no experiment named 'gone'\n  where:    mine.yaml:1"),
        ("defaults: [{override /loss: ipoo}]", "did you mean loss=ipo?"),
        ("defaults: [gone]", "there is no experiment named 'gone'"),
        ("data: {eval: [{path: a, limt: 3}]}", "mine.yaml:1\n  to do:    did you mean limit?"),
        ("data.eval: [{limit: 3}]", "data.eval[0].path is not set\n  where:    mine.yaml:1"),
    ],
)
def test_a_mistake_in_a_file_is_one_block(content: str, text: str) -> None:
    Path("mine.yaml").write_text(f"{content}\n")
    assert text in error_of("mine.yaml").block()


def test_a_file_may_name_an_experiment_as_a_command_does() -> None:
    Path("mine.yaml").write_text("experiment: smoke\nloss: ipo\n")
    assert configured("mine.yaml") == configured("+experiment=smoke loss=ipo")
    Path("mine.yaml").write_text("defaults: [smoke, override /loss: ipo]\n")
    assert configured("mine.yaml") == configured("+experiment=smoke loss=ipo")


def test_a_preset_that_is_edited_counts_in_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands of one process share what Hydra has composed."""
    shutil.copytree(config_dir(), folder := tmp_path / "edited")
    monkeypatch.setattr(keys, "config_dir", lambda: folder)
    assert [configured("loss=ipo").loss.beta, configured("loss=ipo").loss.beta] == [0.1, 0.1]
    (folder / "loss/ipo.yaml").write_text("kind: ipo\nbeta: 0.3\n")
    assert configured("loss=ipo").loss.beta == 0.3


def test_an_empty_section_has_no_keys(tmp_path: Path) -> None:
    (file := tmp_path / "my.yaml").write_text("sampling:\noptim:\nloss.sync_reference:\ntrainer: {seed: 3}")
    assert configured(run=[*RUN, str(file)]) == configured("trainer.seed=3")
