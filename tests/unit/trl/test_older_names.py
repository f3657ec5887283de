"""Older scripts of TRL: arguments in today's words, left out with a line, or one error that lists them."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import AutoTokenizer, TrainingArguments
from transformers.integrations import integration_utils

from dpo_dist import trl as guest
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.installed import install_extra
from dpo_dist.trl.older_names import _GONE, _RENAMED, _REWRITTEN, _WITHOUT_EFFECT
from tests.unit.trl.test_trainers import arguments, assert_same, load, trainer_of

pytestmark = pytest.mark.slow


OLDER = {
    "evaluation_strategy": ("steps", {"eval_strategy": "steps"}),
    "warmup_ratio": (0.1, {"warmup_steps": 0.1}),
    "per_gpu_train_batch_size": (3, {"per_device_train_batch_size": 3}),
    "per_gpu_eval_batch_size": (3, {"per_device_eval_batch_size": 3}),
    "no_cuda": (True, {"use_cpu": True}),
    "push_to_hub_model_id": ("a/b", {"hub_model_id": "a/b"}),
    "push_to_hub_token": ("x", {"hub_token": "x"}),
    "rpo_alpha": (0.5, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "group_by_length": (True, {"train_sampling_strategy": "group_by_length"}),
    "adafactor": (True, {"optim": "adafactor"}),
    "include_inputs_for_metrics": (True, {"include_for_metrics": ["inputs"]}),
    "padding_value": (7, {}),
    "label_pad_token_id": (-100, {}),
    "overwrite_output_dir": (True, {}),
    "use_mps_device": (True, {}),
    "force_use_ref_model": (True, {}),
    "base_model_attribute_name": ("model", {}),
    "use_logits_to_keep": (True, {}),
    "reference_free": (False, {}),
    "generate_during_eval": (False, {}),
    "max_prompt_length": (None, {}),
    "is_encoder_decoder": (None, {}),
    "rpo_alpha off": (None, {}),
    "warmup_ratio off": (0.0, {"warmup_steps": 0}),
}


def values(args: Any, names: Any) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


@pytest.mark.parametrize("case", OLDER)
def test_an_older_name_is_todays_with_a_line(case: str, caplog: pytest.LogCaptureFixture) -> None:
    name, (value, today) = case.removesuffix(" off"), OLDER[case]
    args = (
        guest.DPOConfig("out", **{name: value}, use_cpu=True)
        if name != "no_cuda"
        else guest.DPOConfig("out", no_cuda=True)
    )
    wanted = trl.DPOConfig("out", **({"use_cpu": True} | today))
    fields = {field.name for field in dataclasses.fields(trl.DPOConfig)} - {"logging_dir"}
    assert {name: str(value) for name, value in values(args, fields).items()} == {
        name: str(value) for name, value in values(wanted, fields).items()
    }
    (line,) = [record.getMessage() for record in caplog.records if "dpo_dist" in record.getMessage()]
    assert line.startswith(f"dpo_dist: DPOConfig: {name} is ")
    assert all(word in line for word in today if "token" not in word and value not in (None, 0.0))


def test_what_is_gone_is_one_error_that_lists_all(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError) as caught:
        guest.DPOConfig("out", max_prompt_length=512, reference_free=True, padding_value=0, beta=0.2)
    assert "max_prompt_length, reference_free" in caught.value.got
    assert "cut or filter the texts" in str(caught.value.remedy)
    assert "CPOTrainer" in str(caught.value.remedy)
    with pytest.raises(TypeError, match="no_such_thing"):
        guest.DPOConfig("out", no_such_thing=1)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="bf16 runs there")
def test_bf16_without_an_accelerator_is_computed_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    assert guest.DPOConfig("out", bf16=True).use_cpu
    assert "use_cpu is True, because there is no accelerator" in caplog.text


def test_no_older_name_is_one_of_today() -> None:
    older = {*_RENAMED, *_REWRITTEN, *_WITHOUT_EFFECT, *_GONE}
    assert len(older) >= 35
    for config in (trl.DPOConfig, trl.KTOConfig):
        names = {field.name for field in dataclasses.fields(config)}
        assert older.isdisjoint(names)
        assert {*_RENAMED.values()} <= names


def test_a_config_is_trls_also_for_its_parser(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(guest.KTOConfig("out", use_cpu=True), trl.KTOConfig)
    parser = guest.TrlParser((guest.ScriptArguments, guest.DPOConfig, guest.ModelConfig))
    words = [
        "--dataset_name",
        "d",
        "--output_dir",
        "out",
        "--beta",
        "0.3",
        "--use_cpu",
        "True",
        "--model_name_or_path",
        "m",
        "--lora_r",
        "4",
    ]
    script, args, model = parser.parse_args_and_config(args=[*words, "--use_peft"])
    assert (script.dataset_name, args.beta, model.model_name_or_path) == ("d", 0.3, "m")
    assert isinstance(args, guest.DPOConfig)
    assert guest.get_peft_config(model).r == 4


def test_a_file_of_a_config_is_read_without_this_package(tmp_path: Path) -> None:
    class Own(guest.DPOConfig):  # type: ignore[misc]
        pass

    for kind, of_trl in ((guest.DPOConfig, trl.DPOConfig), (guest.KTOConfig, trl.KTOConfig)):
        args = kind("out", beta=0.3, use_cpu=True)
        torch.save(args, tmp_path / "training_args.bin")
        copied = torch.load(tmp_path / "training_args.bin", weights_only=False)
        assert type(copied) is of_trl
        assert copied.to_dict() == args.to_dict()
    assert type(copy.copy(Own("out", use_cpu=True))) is Own
    assert dataclasses.replace(args, beta=0.4).beta == 0.4


@pytest.mark.parametrize("plain", [False, True])
def test_a_trainer_takes_what_older_trainers_took(
    plain: bool, folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"max_steps": 2, "logging_steps": 1, "learning_rate": 0.05, "optim": "sgd", "report_to": "none"}
    given |= {"per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    kind = TrainingArguments if plain else guest.DPOConfig
    args = kind("out", bf16=False, **given)
    ours = guest.DPOTrainer(
        load(folder),
        load(folder / "reference"),
        args=args,
        beta=0.3,
        max_length=40,
        loss_type="ipo",
        label_pad_token_id=-100,
        max_prompt_length=None,
        train_dataset=pairs,
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )
    ours.train()
    same = {"max_steps": 2, "gradient_checkpointing": not plain}
    today = {"lr_scheduler_type": "linear", "beta": 0.3, "max_length": 40, "loss_type": ["ipo"], **same}
    theirs = trainer_of(trl, folder, pairs, **today)
    theirs.train()
    assert_same(ours, theirs)
    said = caplog.text
    assert "tokenizer is now processing_class" in said
    assert ("its arguments are now a DPOConfig" if plain else "beta is now an argument of DPOConfig") in said


def test_unknown_arguments_of_a_trainer_are_pythons_error(folder: Path, pairs: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_thing'"):
        guest.DPOTrainer(str(folder), args=arguments(), train_dataset=pairs, no_such_thing=1)
    with pytest.raises(ConfigError) as caught:
        guest.DPOTrainer(str(folder), args=arguments(), train_dataset=pairs, max_prompt_length=3, tools=[1])
    assert caught.value.got == "max_prompt_length, tools"


def test_a_name_that_trl_does_not_have_is_pythons_error() -> None:
    with pytest.raises(AttributeError):
        guest.no_such_thing  # noqa: B018


def test_without_trl_the_error_is_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_dist.trl.is_installed", lambda _: False)
    for name in ("DPOTrainer", "SFTTrainer"):
        with pytest.raises(ImportError) as caught:
            exec(f"from dpo_dist.trl import {name}")
        assert install_extra("trl") in str(caught.value)
        assert "trl" in install_extra("trl").removeprefix("pip install ")


def test_the_room_imports_trl_when_it_is_used() -> None:
    code = "import sys, dpo_dist.trl; print({'trl', 'torch'} & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"


def test_scripts_import_all_of_trl_by_the_same_line(caplog: pytest.LogCaptureFixture) -> None:
    for name in {*trl.__all__, "__version__"} - {"DPOConfig", "DPOTrainer", "KTOConfig", "KTOTrainer"}:
        assert getattr(guest, name) is getattr(trl, name)
    exec("from dpo_dist.trl import DPOTrainer, SFTConfig, SFTTrainer")
    assert "SFTTrainer is TRL's own" in caplog.text
    assert " DPOTrainer is TRL's own" not in caplog.text
    with pytest.raises(AttributeError):
        guest.no_such_name  # noqa: B018


def test_an_argument_that_trl_does_not_have_is_a_type_error_with_its_words() -> None:
    """Scripts leave out one name after another, as TRL names them."""
    pending = {
        "max_prompt_length": 64,
        "max_completion_length": 64,
        "evaluation_strategy": "no",
        "generate_during_eval": True,
        "no_such_thing": 1,
    }
    unknown = ["max_prompt_length", "max_completion_length", "generate_during_eval", "no_such_thing"]
    for name in unknown:
        with pytest.raises(TypeError) as caught:
            guest.DPOConfig("out", use_cpu=True, **pending)
        assert isinstance(caught.value, ConfigError)
        words = f"DPOConfig.__init__() got an unexpected keyword argument {name!r}"
        assert str(caught.value).startswith(words)
        del pending[name]
    assert guest.DPOConfig("out", use_cpu=True, **pending).eval_strategy == "no"


@pytest.mark.parametrize("place", ["a config", "a trainer"])
def test_a_limit_of_prompts_is_left_out_if_none_is_longer(
    place: str, folder: Path, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def made(limit: int, data: Any, **given: Any) -> Any:
        limits = {"max_prompt_length": limit}
        args = arguments(max_steps=2, **(limits if place == "a config" else {}))
        given |= {} if place == "a config" else limits
        model = load(folder)
        return guest.DPOTrainer(
            model,
            load(folder / "reference"),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            **given,
        )

    theirs = trainer_of(trl, folder, pairs, max_steps=2)
    longest = max(map(len, theirs.train_dataset["prompt_ids"]))
    ours = made(longest, pairs)
    assert ours.args.max_prompt_length == longest, "scripts read it"
    assert f"max_prompt_length={longest} is left out: no prompt is longer" in caplog.text
    for trainer in (theirs, ours):
        trainer.train()
    assert_same(ours, theirs)
    with pytest.raises(TypeError, match=f"a prompt of {longest} tokens") as caught:
        made(longest - 1, pairs)
    assert str(caught.value).startswith("DPOConfig.__init__() got an unexpected keyword argument")
    with pytest.raises(TypeError, match=f"a prompt of {longest} tokens"):
        made(longest - 1, pairs.select([0]), eval_dataset=pairs)
    with pytest.raises(TypeError, match="prompts of an unknown length"):
        made(longest, pairs.to_iterable_dataset())


def test_the_folder_of_tensorboard_is_what_replaced_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    guest.DPOConfig("out", use_cpu=True, logging_dir="board")
    assert integration_utils.TensorBoardCallback(tb_writer=object()).logging_dir == "board"
    assert "logging_dir is now the variable TENSORBOARD_LOGGING_DIR" in caplog.text
    caplog.clear()
    guest.DPOConfig("out", use_cpu=True, logging_dir=None)
    assert "logging_dir is left out" in caplog.text
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "board"
