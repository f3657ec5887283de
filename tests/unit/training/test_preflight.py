"""Checks before torch is imported, `--check`, and the files that a failed start leaves."""

import contextlib
import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.batching.sampler import steps_in_words
from dpo_dist.config.load import load_run_config
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import CheckpointError, ConfigError, DataError, DpoDistError, RunOutcome
from dpo_dist.foundation.files import locked
from dpo_dist.foundation.types import CheckReport
from dpo_dist.training.reporting.metrics_log import MetricsLog
from dpo_dist.training.run import find_start
from dpo_dist.training.start.dry_run import dry_run
from dpo_dist.training.start.inputs import load_inputs
from dpo_dist.training.start.open_run import Run, open_run
from dpo_dist.training.start.preflight import check_start, checked_console
from dpo_dist.training.start.run_state import RunState, write_state
from tests.support import tiny
from tests.support.alone import ALONE
from tests.support.families import tiny_family
from tests.support.image_model import image_pair, write_image_model, write_pictures
from tests.support.invented import write_pairs
from tests.support.other_user import error_for_other_user, shared_folder
from tests.support.records import jsonl, user
from tests.support.remedies import words_to_write
from tests.support.sft_adapter import write_sft_adapter
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    write_model(folder / "model")
    write_pairs(folder / "train.jsonl", 12, seed=1)
    return folder


def run_of(assets: Path, root: Path, *overrides: str) -> RunConfig:
    usual = [f"model.path={assets}/model", f"data.train=[{assets}/train.jsonl]", f"run.root={root}/output"]
    usual += ["trainer.global_batch_pairs=1", "data.text_as_messages=false"]
    return load_run_config([*usual, *overrides])


def refused(config: RunConfig) -> DpoDistError:
    with pytest.raises(DpoDistError) as caught:
        check_start(config, trains=True)
    return caught.value


@pytest.mark.parametrize(
    ("package", "overrides", "without"),
    [
        ("liger-kernel", "model.fused=liger", "model.fused=none"),
        ("flash-attn", "model.attention=flash_attention_2", "model.attention=auto"),
        ("flash-attn-3", "model.attention=flash_attention_3", "model.attention=auto"),
        (
            "bitsandbytes",
            "model.adapter.r=8 model.quantization=nf4 parallelism=ddp",
            "model.quantization=null",
        ),
        ("bitsandbytes", "reference.quantization=int8", "reference.quantization=null"),
        ("mlflow", "tracking.to=[wandb,mlflow,trackio]", "tracking.to=[wandb]"),
    ],
)
def test_a_missing_package_is_an_error_before_anything_is_read(
    package: str, overrides: str, without: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every module is there: flash-attn-4 has one with the name of flash-attn's."""

    def version(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.0"

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("mlflow", "trackio") else name
    )
    error = refused(run_of(assets, tmp_path, *overrides.split()))
    assert isinstance(error, ConfigError)
    assert "not installed" in error.message
    if package not in ("mlflow", "flash-attn-3"):
        assert error.remedy.startswith(f"pip install '{package}>=")
    if package == "mlflow":
        assert error.message == "mlflow and trackio are not installed"
        assert error.remedy == "pip install mlflow trackio, or set 'tracking.to=[wandb]'"
    assert words_to_write(error.remedy) == [without]


def test_all_faults_that_a_start_can_see_are_one_error(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else name)
    (tmp_path / "file").touch()
    words = [
        "tracking.to=[trackio]",
        "reference.path=./gone",
        "model.path=./gone",
    ]
    words += ["data.train=[one.jsonl,two.jsonl]", f"run.root={tmp_path}/file/out", "parallelism.shard_size=3"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = refused(run_of(assets, tmp_path, *words))
    places = " ".join(part.where for part in error.parts)
    for place in (
        *("tracking.to", "parallelism.shard_size", "model.path", "reference.path"),
        *("one.jsonl", "two.jsonl", "run.dir", "data.cache", "reference.store"),
    ):
        assert place in places
    assert len(error.parts) == 9


def test_all_faults_of_a_stage_of_a_check_are_one_error(assets: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n' * 20)
    (tmp_path / "worse.jsonl").write_text('{"text": 2}\n' * 20)
    sources = f"data.train=[{tmp_path}/bad.jsonl,{assets}/train.jsonl,{tmp_path}/worse.jsonl]"
    with pytest.raises(DpoDistError) as caught:
        dry_run(run_of(assets, tmp_path, sources))
    assert len(caught.value.parts) == 2
    others = ["metrics.function=gone:mean", "reference.path=./gone"]
    with pytest.raises(DpoDistError) as caught:
        dry_run(run_of(assets, tmp_path, sources, *others))
    assert {part.where for part in caught.value.parts} == {"metrics.function", "reference.path"}, (
        "not data yet"
    )


def test_a_model_without_a_tokenizer_is_an_error(assets: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (assets / "model").iterdir():
        if "token" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    error = refused(run_of(assets, tmp_path / "out", f"model.path={folder}"))
    assert "no tokenizer" in error.message
    start = write_sft_adapter(folder, tmp_path / "sft")
    for file in (assets / "model").glob("*token*"):
        (start / file.name).write_bytes(file.read_bytes())
    check_start(run_of(assets, tmp_path / "out", f"model.path={folder}", f"model.adapter={{path: {start}}}"))


@pytest.mark.parametrize("closed", ["model.safetensors", "config.json", "tokenizer.json", ""])
def test_a_model_that_this_user_may_not_read_is_not_said_to_be_missing(closed: str, assets: Path) -> None:
    with shared_folder() as folder:
        shutil.copytree(assets / "model", folder / "model")
        for file in (folder / "model").iterdir():
            file.chmod(0o644)
        config = run_of(folder, folder / "out", "data.train=[pairs.jsonl]", f"model.path={folder}/model")
        (folder / "model" / closed).chmod(0)
        error = error_for_other_user(lambda: check_start(config))
    assert "this user may not read" in error
    assert f"{folder / 'model' / closed}, as user" in error


# Failed starts


def fail_late(config: RunConfig, error: Exception) -> None:
    with pytest.raises(type(error)), checked_console(config):
        raise error


def test_a_users_error_removes_a_run_directory_that_has_not_trained(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after other errors and earlier starts, nor that of another job, nor on another rank."""
    config = run_of(assets, tmp_path)
    folder = RunFolder(config.run.path)
    fail_late(config, DataError("too many bad records"))
    assert not folder.path.exists()
    refused(run_of(assets, tmp_path, "data.eval=[/nowhere/a.jsonl]"))
    assert not folder.path.exists()
    with contextlib.ExitStack() as other_job:
        with pytest.raises(ConfigError), checked_console(config):  # noqa: PT012
            other_job.enter_context(locked(folder.lock, "trains", "wait"))
            raise ConfigError("another process trains", remedy="wait")
        assert folder.lock.exists()
    fail_late(config, ConfigError("of a second start"))
    assert folder.rank_log(0).is_file()
    with pytest.raises(DataError), checked_console(other := run_of(assets, tmp_path / "late")):  # noqa: PT012
        MetricsLog.open(RunFolder(other.run.path), None)
        raise DataError("found at a later step, before the first row and the first checkpoint")
    assert RunFolder(other.run.path).log_history.is_file()
    fail_late(other := run_of(assets, tmp_path / "bug"), RuntimeError("a fault of the program"))
    assert RunFolder(other.run.path).rank_log(0).is_file()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    fail_late(other := run_of(assets, tmp_path / "rank"), ConfigError("on all ranks, of which 0 removes"))
    assert RunFolder(other.run.path).path.is_dir()


@pytest.mark.parametrize("trains", [False, True])
def test_only_training_compiles_the_kernel_of_its_optimizer(
    trains: bool, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[dict[str, Any]] = []

    def join(deepspeed_config: dict[str, Any], *_: object) -> contextlib.AbstractContextManager[None]:
        joined.append(deepspeed_config["zero_optimization"])
        raise ConfigError("joined")

    monkeypatch.setattr("dpo_dist.distributed.processes.join.join_world", join)
    config = run_of(assets, tmp_path, "parallelism.offload_optimizer=cpu")
    with pytest.raises(ConfigError, match="joined"), open_run(config, Console(None), trains=trains):
        pass
    assert ("offload_optimizer" in joined[0]) is trains


def test_only_the_first_node_checks(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_start(run_of(assets, tmp_path, "data.train=[/only/there.jsonl]"))


@pytest.mark.parametrize("key", ["sequence_parallel", "experts", "shard_size"])
def test_processes_that_do_not_divide_into_groups_are_an_error(
    key: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(assets, tmp_path, f"parallelism.{key}=3")
    check_start(config, trains=True)  # `--check` before the launch
    with (
        pytest.raises(ConfigError, match="cannot be divided into groups"),
        checked_console(config, trains=True),
    ):
        raise AssertionError  # one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="cannot be divided into groups"):
        check_start(config, trains=True)


# --check


def test_a_check_prints_its_findings_and_leaves_no_files(assets: Path, tmp_path: Path) -> None:
    config = run_of(assets, tmp_path, f"data.eval=[{{path: {assets}/train.jsonl, limit: 5}}]")
    check_start(config)
    text = str(dry_run(config))
    assert "check passed" in text
    assert " (new)\n" in text
    assert "examines all records" in text
    assert "12 of 12 records kept" in text
    assert "data.eval[0]:  " in text
    assert "5 of 5 records kept" in text
    assert "cached, store" in text
    assert not list(tmp_path.iterdir())


def length(report: CheckReport) -> list[str]:
    """What a check says of the run's length."""
    return [text for label, text in report.facts if label == "training"]


@pytest.mark.usefixtures("without_models")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("trainer.global_batch_pairs=4", ["3 steps of 4 pairs"]),
        ("trainer.global_batch_pairs=5 trainer.epochs=2", ["5 steps of 5 pairs"]),
        ("'data.train=[{{path: {0}/train.jsonl, weight: 2}}]'", ["24 steps of 1 pair"]),
        ("trainer.max_steps=7", ["7 steps of 1 pair"]),
        ("'data.eval=[{{path: {0}/train.jsonl, limit: 5}}]'", ["12 steps of 1 pair"]),
        ("'data.eval=[{{path: {0}/train.jsonl, limit: 5}}]' data.drop_eval_prompts=true",
         ["7 steps of 1 pair"]),
        ("data.eval_share=0.3", ["8 steps of 1 pair"]),
        ("'data.train=[{0}/many.csv]'", []),
    ],
)  # fmt: skip
def test_a_check_says_the_length_of_a_run_whose_data_it_has_read(
    overrides: str, said: list[str], assets: Path, tmp_path: Path
) -> None:
    """Of 12 records all are read; of many the first 1,024."""
    lines = [f"q {number},good {number},bad {number}\n" for number in range(2000)]
    folder = tmp_path / "data"
    shutil.copytree(assets, folder)
    (folder / "many.csv").write_text("".join(["prompt,chosen,rejected\n", *lines]))
    config = run_of(assets, tmp_path, "model.dtype=fp32", *shlex.split(overrides.format(folder)))
    assert length(dry_run(config)) == said
    assert length(dry_run(config, trains=False)) == []
    if said:
        inputs = load_inputs(Run(config, ALONE, Console(None)), trains=True)
        assert [steps_in_words(inputs.sampler)] == said


@pytest.mark.usefixtures("without_models")
@pytest.mark.parametrize(
    ("overrides", "where", "remedy"),
    [
        ("trainer.global_batch_pairs=1000", "trainer.global_batch_pairs", "set trainer.global_batch_pairs=2"),
    ],
)
def test_a_start_refuses_by_the_words_of_the_check(
    overrides: str, where: str, remedy: str, assets: Path, tmp_path: Path
) -> None:
    config = run_of(assets, tmp_path, "model.dtype=fp32", *shlex.split(overrides))
    errors = []
    for work in (dry_run, lambda config: load_inputs(Run(config, ALONE, Console(None)), trains=True)):
        with pytest.raises(ConfigError) as caught:
            work(config)
        errors.append(caught.value.block())
    assert errors[0] == errors[1]
    assert (caught.value.where, caught.value.remedy) == (where, remedy)
    dry_run(run_of(assets, tmp_path, *shlex.split(overrides), *words_to_write(caught.value.remedy)))


@pytest.mark.parametrize("place", ["/", "{0}", "{0}/work/..", "~", "{0}/runs"])
def test_a_run_directory_of_other_things_is_refused(
    place: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "home").mkdir()
    leave_run(run_of(assets, tmp_path, f"run.dir={tmp_path}/runs/first"), RunOutcome.preempted, ())
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    error = refused(run_of(assets, tmp_path, f"run.dir={place.format(tmp_path)}"))
    assert error.where == "run.dir"
    assert "run.dir" in error.remedy
    for other in ("run.dir=.", f"run.dir={tmp_path}/runs/first", f"run.dir={tmp_path}/runs/second"):
        check_start(run_of(assets, tmp_path, other), trains=True)
    check_start(run_of(assets, tmp_path, f"run.dir={tmp_path}"))  # nothing is trained there


def test_a_check_warns_of_an_adapter_at_a_rate_for_all_weights(assets: Path, tmp_path: Path) -> None:
    for rate, warned in (("1e-6", True), ("2e-4", False)):
        text = str(dry_run(run_of(assets, tmp_path, "model.adapter={r: 4}", f"optim.lr={rate}")))
        assert ("warning: optim.lr=1e-06 is a rate for training all weights" in text) == warned


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            "loss=sft data.eval_share=0.5 trainer.eval_every=1 trainer.keep_best=eval_rewards/accuracies",
            "not have this metric",
        ),
        ("data.eval_share=0.5 trainer.eval_every=1 trainer.keep_best=eval_loss/easy", "not have this metric"),
        ("'data.train=[{{path: {0}/train.jsonl, weight: 0.01}}]'", "no pair of a source would be drawn"),
        ("optim.warmup=13", "the warm-up is longer than the run"),
        ("trainer.global_batch_pairs=13", "a step has more pairs than the training data"),
        ("data.eval_share=0.5 trainer.global_batch_pairs=12", "a step has more pairs than the training data"),
    ],
)
def test_a_check_refuses_options_that_do_not_fit_the_data(
    overrides: str, text: str, assets: Path, tmp_path: Path
) -> None:
    config = run_of(assets, tmp_path, *shlex.split(overrides.format(assets)))
    with pytest.raises((ConfigError, DataError), match=text):
        dry_run(config)
    assert not list(tmp_path.iterdir())


def test_a_check_refuses_tokens_without_an_embedding(assets: Path, tmp_path: Path) -> None:
    tiny_family("llama", len(tiny.qwen()) // 2).save_pretrained(tmp_path / "model")
    tiny.qwen().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="a token without an embedding"):
        dry_run(run_of(assets, tmp_path, f"model.path={tmp_path}/model", "model.dtype=fp32"))


def test_a_check_names_what_is_not_read_and_counts_numbers_of_the_loss(assets: Path, tmp_path: Path) -> None:
    others = {f"field_{n}": n for n in range(14)} | {"a text " * 9: 1}
    record = {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": 1, "votes_chosen": 3, **others}
    (tmp_path / "data.jsonl").write_text(json.dumps(record | {"votes_rejected": 1}) + "\n")
    text = str(dry_run(run_of(assets, tmp_path, f"data.train=[{tmp_path}/data.jsonl]")))
    [line] = [line for line in text.splitlines() if "not read" in line]
    assert line.split() == [
        "not",
        "read:",
        *(f"field_{n}," for n in range(11)),
        "field_11",
        "and",
        "3",
        "more",
    ]
    assert "1 margin, 1 soft_label" in text


def leave_run(config: RunConfig, outcome: RunOutcome, left: tuple[str, ...]) -> None:
    folder = RunFolder(config.run.path)
    folder.path.mkdir(parents=True)
    write_state(folder, RunState(outcome, 8, dict(config.identity.recorded)))
    for name in left:
        (folder.path / name).parent.mkdir(parents=True)
        (folder.path / name).touch()


LEFT_MODEL = "model/model.safetensors"
LEFT_RESULTS = "checkpoints/step-000008/state.json", "dpo_metrics/summary.json"


@pytest.mark.parametrize(
    ("outcome", "left", "overrides", "text"),
    [
        (RunOutcome.preempted, (), [], "its checkpoints are missing"),
        (RunOutcome.preempted, (LEFT_MODEL,), [], "its checkpoints are missing"),
        (RunOutcome.completed, (LEFT_MODEL,), ["trainer.epochs=2"], "its checkpoints are missing"),
        (RunOutcome.completed, (LEFT_MODEL,), ["run.resume=never"], "has results of a run"),
        (RunOutcome.preempted, LEFT_RESULTS, ["run.resume=never"], r"run \(checkpoints, dpo_metrics\), and"),
        (None, (), ["run.resume=must"], "no checkpoint to resume from"),
    ],
)
def test_a_check_and_a_start_refuse_run_directories(
    outcome: RunOutcome | None,
    left: tuple[str, ...],
    overrides: list[str],
    text: str,
    assets: Path,
    tmp_path: Path,
) -> None:
    place = f"run.dir={tmp_path}/run"
    if outcome is not None:
        leave_run(run_of(assets, tmp_path, place), outcome, left)
    config = run_of(assets, tmp_path, place, *overrides)
    for work in (dry_run, lambda config: find_start(Run(config, ALONE, Console(None)))):
        with pytest.raises(CheckpointError, match=text):
            work(config)
    assert text not in str(dry_run(config, trains=False)), "a verb that does not train"


def test_a_check_refuses_records_that_the_loss_cannot_use(assets: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "Say hello.", "completion": "Hello!"}')
    with pytest.raises(DataError, match="sigmoid cannot use 1 of 1 examples") as caught:
        dry_run(run_of(assets, tmp_path, f"data.train=[{tmp_path}/data.jsonl]"))
    assert caught.value.remedy


MISFITS = [
    ("cohere2", "parallelism.sequence_parallel=3", "heads of this model cannot be divided", ""),
    ("cohere2", "loss.router={aux_coefficient: 0.1}", "no load-balancing loss", ""),
    ("cohere2", "loss.router={aux_coefficient: 0.1}", "no load-balancing loss", "aux_coefficient=null"),
    ("nemotron_h", "parallelism.sequence_parallel=2", "needs layers that mix tokens", "nemotron_h"),
    ("mpt", "data.max_length=9000", "too few positions", "or less"),
    ("gpt_oss", "model.gradient_checkpointing=9", "no layer would be checkpointed", "every 9 layers"),
    ("gpt_oss", "model.adapter={target_modules: [q_prj]}", "adapter's target", "name existing layers"),
    (
        "deepseek_v3",
        "model.adapter={r: 2}",
        "peft would adapt other layers",
        "set 'model.adapter.target_modules=[",
    ),
    (
        "falcon_h1",
        "model.adapter={r: 2}",
        "'out_proj' is incompatible",
        "target_modules=[down_proj,gate_proj,in_proj,k_proj,o_proj,q_proj,up_proj,v_proj]'",
    ),
    (
        "qwen3_next",
        "model.adapter={r: 2}",
        "peft would adapt other layers",
        "[in_proj_ba,in_proj_qkvz,k_proj,o_proj,out_proj,q_proj,shared_expert_gate,v_proj]'",
    ),
]


def start_without_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    # A world without DeepSpeed loads inputs, as far as the digests of the model's files.
    monkeypatch.setattr("dpo_dist.training.start.inputs.digest_on_every_node", None)
    monkeypatch.setattr(
        "dpo_dist.training.start.inputs.unsharded_loading", lambda _: contextlib.nullcontext()
    )


@pytest.mark.parametrize(("family", "option", "named", "told"), MISFITS)
def test_options_that_no_module_of_the_model_has_are_refused_before_files_are_read(
    family: str,
    option: str,
    named: str,
    told: str,
    assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_family(family, len(tiny.qwen())).save_pretrained(tmp_path / "model")
    tiny.qwen().save_pretrained(tmp_path / "model")
    config = run_of(assets, tmp_path, f"model.path={tmp_path}/model", "model.dtype=fp32", option)
    start_without_digests(monkeypatch)
    for work in (dry_run, lambda run: load_inputs(Run(run, ALONE, Console(None)), trains=True)):
        with pytest.raises(ConfigError, match=named) as caught:
            work(config)
        assert told in str(caught.value)
        assert caught.value.where.startswith(option.partition("=")[0])


def test_a_model_with_fewer_positions_than_tokens_is_a_warning_at_start(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(Run, "warn", lambda _, text: warned.append(text))
    start_without_digests(monkeypatch)
    folder = write_model(tmp_path / "model", longest=1000)
    for longest, are_more in ((1001, False), (1002, True)):
        config = run_of(assets, tmp_path, f"model.path={folder}", f"data.max_length={longest}")
        with pytest.raises(TypeError):  # where digests would be made
            load_inputs(Run(config, ALONE, Console(None)), trains=True)
        assert ["1,000 positions" in text for text in warned] == [True] * are_more
        assert ("warning: data.max_length=1,002 is more than" in str(dry_run(config))) is are_more


def test_a_base_that_does_not_stop_where_training_ends_turns_is_said_at_start(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Run, "say", lambda _, text: said.append(text))
    start_without_digests(monkeypatch)
    for tokenizer, is_said in ((tiny.llama3(), True), (tiny.qwen(), False)):
        folder = write_model(tmp_path / str(is_said), tokenizer)
        config = run_of(assets, tmp_path, f"model.path={folder}", "model.dtype=fp32")
        with pytest.raises(TypeError):  # where digests would be made
            load_inputs(Run(config, ALONE, Console(None)), trains=True)
        for lines in ("\n".join(said), str(dry_run(config))):
            assert ("the base itself stops at <|end_of_text|> (1), but" in lines) is is_said
        said.clear()


@pytest.fixture
def without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dpo_dist.training.start.inputs.unsharded_loading", lambda _: contextlib.nullcontext()
    )
    monkeypatch.setattr("dpo_dist.training.start.inputs._digest_models", lambda *_: (None, None))


@pytest.mark.usefixtures("without_models")
def test_a_run_whose_model_reads_images_warns_of_data_without_any(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Run, "warn", lambda _, text: said.append(text))
    options = f"model.path={write_image_model(tmp_path / 'model')}", "model.images.train=none"
    for data, is_said in ((assets / "train.jsonl", True), (write_pictures(tmp_path), False)):
        config = run_of(assets, tmp_path, *options, "model.dtype=fp32", f"data.train=[{data}]")
        load_inputs(Run(config, ALONE, Console(None)))
        assert ("no usable record of the train data has an image" in "\n".join(said)) is is_said
        text = str(dry_run(config))
        assert ("none of these records has an image: name the column" in text) is is_said
        assert (" with images" in text) is not is_said
        said.clear()


def test_records_with_tags_and_no_images_are_refused_with_the_column_to_name(
    assets: Path, tmp_path: Path
) -> None:
    options = (
        f"model.path={write_image_model(tmp_path / 'model')}",
        "model.images.train=none",
        "model.dtype=fp32",
    )
    pictures = write_pictures(tmp_path)
    tagged = [
        {
            "id": 7,
            "image_id": 8,
            "image_path": f"{colour} one.png",
            "prompt": [user("<image>?")],
            "chosen": "A.",
            "rejected": "B.",
        }
        for colour in ("red", "green")
    ]
    for mixed in ([], [image_pair("blue one.png", "It is blue.", "No.")]):
        file = jsonl(tmp_path, *tagged, *mixed)
        config = run_of(assets, tmp_path, *options, f"data.train=[{{path: {file}, weight: 2}}, {pictures}]")
        with pytest.raises(DataError, match=r"2 of [23] records cannot be used") as caught:
            dry_run(config)
        assert "name their column: fields: {images: COLUMN, ...}" in caught.value.remedy
    sides = "prompt: prompt, chosen: chosen, rejected: rejected"
    remedy = f"data.train=[{{path: {file}, fields: {{{sides}, images: image_path}}}}]"
    config = run_of(assets, tmp_path, *options, f"data.train=[{file}]")
    with pytest.raises(DataError, match="cannot be used"):
        dry_run(config)
    found = str(dry_run(run_of(assets, tmp_path, *options, remedy, "data.max_bad_share=0.4")))
    assert "2 of 3 records kept" in found
    few = run_of(assets, tmp_path, *options, f"data.train=[{file}]", "data.max_bad_share=0.7")
    assert "dropped: 2 image_count" in str(dry_run(few))


def test_options_of_gpus_are_refused_without_one_before_files_are_read(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(assets, tmp_path, "model.fused=liger")
    dry_run(config)  # where it is run, there may be a GPU
    start_without_digests(monkeypatch)
    with pytest.raises(ConfigError) as caught:
        load_inputs(Run(config, ALONE, Console(None)), trains=True)
    assert caught.value.where == "model.fused"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model_type": "t5"}, "t5"),
        ({"is_causal": False}, "not causal"),
        ({"use_bidirectional_attention": True}, "not causal"),
    ],
)
def test_a_check_refuses_a_model_that_is_not_causal(
    changed: dict[str, object], named: str, assets: Path, tmp_path: Path
) -> None:
    write_model(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ConfigError, match=named):
        dry_run(run_of(assets, tmp_path, f"model.path={tmp_path}/model"))


@pytest.mark.usefixtures("without_models")
def test_evaluation_pairs_that_are_trained_are_counted_not_the_training_pairs(
    assets: Path, tmp_path: Path
) -> None:
    lines = (assets / "train.jsonl").read_text().splitlines()
    other = json.dumps(json.loads(lines[2]) | {"chosen": "another one"})
    for name, rows in (("train", lines[:5]), ("eval", [lines[0]] * 3 + [lines[1], other, lines[7]])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    words = [f"data.train=[{tmp_path}/train.jsonl]", f"data.eval=[{tmp_path}/eval.jsonl]"]
    config = run_of(assets, tmp_path, *words, "data.drop_eval_prompts=false")
    counts = load_inputs(Run(config, ALONE, Console(None)), trains=True).counts["eval"]
    assert (counts["also_in_train"], counts["prompts_also_in_train"]) == (4, 5)
