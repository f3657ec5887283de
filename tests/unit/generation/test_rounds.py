"""Rounds: their order, models, references and seeds; failures and restarts at every stage."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError, DpoDistError, ExitCode
from dpo_dist.generation.pairs.rounds import (
    merge_adapter,
    read_samples,
    run_command,
    run_rounds,
)
from tests.support import tiny
from tests.support.tiny_model import write_model

FAKE = Path(__file__).parents[2] / "support" / "fake_verbs.py"


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')


def config(*overrides: str) -> RunConfig:
    return load_run_config(
        [
            *("model.path=base", "data.train=[prompts.jsonl]", "run.dir=run", "pairs.method=samples"),
            *("pairs.function=m:f", f"pairs.launcher='{sys.executable} {FAKE}'", "pairs.rounds=2"),
            *overrides,
        ]
    )


def do(*overrides: str) -> tuple[int, list[str]]:
    said: list[str] = []
    return run_rounds(config(*overrides), said.append), said


def calls() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]


def order() -> list[tuple[str, int]]:
    return [(call["verb"], call["round"]) for call in calls()]


WHOLE = [("pairs", 1), ("train", 1), ("pairs", 2), ("train", 2), ("pairs", 3)]


def test_each_policy_gives_the_next_samples_and_reference() -> None:
    code, said = do("trainer.seed=7")
    assert code == ExitCode.completed
    assert order() == WHOLE
    sampling1, training1, sampling2, training2, last = (call["config"] for call in calls())
    assert [one["model"]["path"] for one in (sampling1, training1)] == ["base", "base"]
    assert sampling2["model"]["path"] == training2["model"]["path"] == "run/rounds/1/train/model"
    assert last["model"]["path"] == "run/rounds/2/train/model"
    assert [one["trainer"]["seed"] for one in (sampling1, sampling2, last)] == [7, 8, 9]
    assert [one["pairs"]["rounds"] for one in (sampling1, training1)] == [0, 0]
    assert training2["data"]["train"][0]["path"] == "run/rounds/2/pairs/pairs.jsonl"
    assert training2["reference"]["path"] is None
    assert training1["reference"]["store"] == training2["reference"]["store"]
    assert "the last policy: run/rounds/2/train/model" in said


def test_the_first_reference_stays() -> None:
    do("pairs.reference=first")
    *_, training2, _ = (call["config"] for call in calls())
    assert training2["reference"]["path"] == "base"


def test_a_reference_of_the_users_own_is_kept_or_replaced() -> None:
    do("reference.path=other", "pairs.reference=first")
    do("reference.path=other", "pairs.reference=previous", "run.dir=run2")
    do("loss=simpo", "pairs.reference=first", "run.dir=run3")
    trainings = [call["config"]["reference"]["path"] for call in calls() if call["verb"] == "train"]
    assert trainings == ["other", "other", "other", None, None, None]


def test_rounds_take_one_part_of_the_prompts_after_the_other() -> None:
    do("pairs.prompt_parts=2")
    parts = [call["config"]["pairs"]["prompt_part"] for call in calls() if call["verb"] == "pairs"]
    assert parts == [0, 1, 0]


def test_scores_are_kept_round_by_round() -> None:
    _, said = do()
    rows = json.loads(Path("run/rounds/rounds.json").read_text())["rounds"]
    assert [row["samples"]["mean_score"] for row in rows] == [0.25, 0.5, 0.75]
    assert [row["training"] and row["training"]["steps"] for row in rows] == [5, 5, None]
    assert rows[0]["training"]["accuracy"] == 0.75
    assert "round 1: 4 responses, 1 pairs, mean score 0.2500" in said


def test_finished_rounds_are_not_repeated_and_more_can_follow() -> None:
    do()
    assert do()[0] == ExitCode.completed
    assert order() == WHOLE
    do("pairs.rounds=3")
    assert order() == [*WHOLE, ("train", 3), ("pairs", 4)]


@pytest.mark.parametrize(("verb", "number"), WHOLE)
def test_a_killed_stage_is_continued(verb, number) -> None:
    Path("fail").write_text(f"{verb} {number} kill")
    with pytest.raises(DpoDistError, match="signal 9") as caught:
        do()
    assert caught.value.exit_code == ExitCode.failed
    assert do()[0] == ExitCode.completed
    index = WHOLE.index((verb, number))
    assert order() == [*WHOLE[: index + 1], *WHOLE[index:]]


def test_exit_codes_of_trainings_survive_their_launcher() -> None:
    Path("fail").write_text("train 1 75")
    code, said = do()
    assert code == ExitCode.preempted
    assert "the same command continues" in said[-1]
    Path("fail").write_text("train 1 3")
    with pytest.raises(DpoDistError, match="training of round 1") as caught:
        do()
    assert caught.value.exit_code == ExitCode.diverged
    Path("fail").write_text("pairs 2 2")
    with pytest.raises(DpoDistError, match="sampling of round 2") as caught:
        do()
    assert caught.value.exit_code == ExitCode.invalid
    assert do()[0] == ExitCode.completed


def test_rounds_end_when_all_scores_are_equal() -> None:
    _, said = do("pairs.rounds=6")
    assert order()[-1] == ("pairs", 4)
    assert said[-1] == "the last policy: run/rounds/3/train/model"
    assert "round 4: no two responses" in said[-2]


def test_a_first_round_without_a_pair_is_an_error() -> None:
    """Nothing was trained: exit code 0 would say that there is a policy."""
    Path("fail").write_text("pairs 1 2")
    with pytest.raises(DpoDistError, match="sampling of round 1") as caught:
        do()
    assert caught.value.exit_code == ExitCode.invalid


ADAPTER = ("model.adapter={r: 2, alpha: 4}", "pairs.rounds=2")


def with_adapter(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[dict[str, Any]]:
    """Do rounds that train adapters, with a stand-in for merging; return the configurations of the stages."""

    def merge(adapter: Path, folder: Path, _: RunConfig) -> None:
        assert str(adapter).endswith("train/model")
        folder.mkdir()

    monkeypatch.setattr("dpo_dist.generation.pairs.rounds.merge_adapter", merge)
    code, said = do(*ADAPTER, *overrides)
    assert code == ExitCode.completed
    assert said[-1] == "the last policy: run/rounds/2/policy"
    return [call["config"] for call in calls()]


def test_an_adapter_is_merged_before_the_next_round(monkeypatch) -> None:
    _, training1, sampling2, training2, last = with_adapter(monkeypatch)
    assert training1["model"]["path"] == "base"
    assert sampling2["model"]["path"] == training2["model"]["path"] == "run/rounds/1/policy"
    assert last["model"]["path"] == "run/rounds/2/policy"
    assert training2["model"]["adapter"]["r"] == 2
    assert [one["reference"]["mode"] for one in (training1, training2)] == ["adapter", "adapter"]
    assert do(*ADAPTER)[0] == ExitCode.completed
    assert order() == WHOLE


def test_the_first_reference_of_adapters_is_the_first_base(monkeypatch) -> None:
    quantized = ("model.quantization=nf4", "parallelism=ddp")
    _, training1, _, training2, _ = with_adapter(monkeypatch, "pairs.reference=first", *quantized)
    assert training1["reference"]["mode"] == "adapter"
    reference = training2["reference"]
    assert [reference[key] for key in ("mode", "path", "quantization")] == [*("cached", "base", "nf4")]


def test_an_adapter_whose_merge_was_killed_is_merged_later(monkeypatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpo_dist.generation.pairs.rounds.merge_adapter", killed)
    with pytest.raises(KeyboardInterrupt):
        do(*ADAPTER)
    with_adapter(monkeypatch)
    assert order() == [*WHOLE[:2], *WHOLE[1:]]


@pytest.mark.parametrize("modules", [[], ["embed_tokens", "lm_head"]], ids=["matrices", "two copies"])
def test_a_merged_adapter_computes_the_same(modules: list[str], tmp_path: Path) -> None:
    """Also where embeddings and output layer are one weight in the base and two in the adapter."""
    base, adapter = write_model(tmp_path / "base"), tmp_path / "adapter"
    torch.manual_seed(1)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    lora.modules_to_save = modules or None
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".modules_to_save." in name:
                weight.add_(0.05 * torch.randn_like(weight))
    adapted.save_pretrained(adapter)
    tiny.qwen().save_pretrained(adapter)  # as a training writes it
    left = tmp_path / "policy.tmp-0123456789ab"
    left.mkdir()
    os.utime(left, (0, 0))
    merge_adapter(adapter, tmp_path / "policy", config("model.dtype=fp32", "reference.store=store"))
    assert not left.exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        difference = merged(ids).logits - adapted(ids).logits
        assert difference.abs().max() < 1e-4
        with adapted.disable_adapter():
            assert (merged(ids).logits - adapted(ids).logits).abs().max() > 0.1
    for file in adapter.glob("tokenizer*"):
        assert (tmp_path / "policy" / file.name).read_bytes() == file.read_bytes()


def test_other_settings_are_refused_in_the_same_folder() -> None:
    do()
    with pytest.raises(ConfigError, match=r"loss\.beta: 0\.1 before, 0\.2 now; pairs\.samples: 4 before"):
        do("loss.beta=0.2", "pairs.samples=8")
    assert do("trainer.save_every=7")[0] == ExitCode.completed


def test_a_mistake_that_no_stage_survived_can_be_corrected() -> None:
    Path("fail").write_text("pairs 1 2")
    with pytest.raises(DpoDistError, match="sampling of round 1"):
        do("pairs.function=m:mistyped")
    assert do()[0] == ExitCode.completed
    with pytest.raises(ConfigError, match=r"pairs\.function: m:f before"):
        do("pairs.function=m:mistyped")


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("pairs.method=scores", "pairs.method"),
        ("pairs.models=[other]", "pairs.models"),
        ("pairs.launcher=no-such-program", "pairs.launcher"),
        ('pairs.launcher="python \'x"', "pairs.launcher"),
    ],
)
def test_what_rounds_cannot_do_is_an_error(override, where) -> None:
    with pytest.raises(ConfigError) as caught:
        do(override)
    assert caught.value.where == where
    assert not Path("calls.jsonl").exists()


def test_rounds_are_not_started_by_several_processes(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="launcher"):
        do()


def test_a_second_start_in_the_same_folder_is_refused() -> None:
    def second(*_: Any) -> int:
        with pytest.raises(ConfigError, match="another process"):
            do()
        return ExitCode.failed

    with pytest.raises(DpoDistError, match="failed"):
        run_rounds(config(), lambda _: None, second)


def test_shares_of_won_comparisons_have_no_mean() -> None:
    endpoint = ("pairs.function=null", "pairs.endpoint.url=http://localhost:1/v1", "pairs.endpoint.model=m")
    for verdicts, means in (("compare", [None, None]), ("grade", [0.25, 0.5])):
        do(*endpoint, "pairs.rounds=1", f"pairs.endpoint.verdicts={verdicts}", f"run.dir={verdicts}")
        rows = json.loads(Path(verdicts, "rounds/rounds.json").read_text())["rounds"]
        assert [row["samples"]["mean_score"] for row in rows] == means


def test_every_scored_response_counts(tmp_path) -> None:
    scored = [{"content": "a", "score": 1.0}, {"content": "b", "score": 0.0}]
    unused = [{"content": " a", "score": 1.0}, {"content": "cut", "score": None}]
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps({"responses": scored, "unused": unused}) + "\n")
    found, widest = read_samples("policy", file, is_relative=False)
    assert found == {"policy": "policy", "prompts": 1, "responses": 3, "unscored": 1, "mean_score": 2 / 3}
    assert widest == 1.0
    assert read_samples("policy", file, is_relative=True)[0]["mean_score"] is None


# As accelerate does for one process: the launcher ends by a signal without its child.
LAUNCHER = "import subprocess, sys; sys.exit(min(subprocess.call([sys.executable, *sys.argv[1:]]), 1))"


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, SystemExit),
        (signal.SIGHUP, SystemExit),
        (signal.SIGUSR1, SystemExit),
    ],
)
def test_signals_are_passed_on(number, error) -> None:
    work = f"import os, time; os.kill(os.getppid(), {int(number)}); time.sleep(60)"
    with pytest.raises(error):
        run_command([sys.executable, "-c", work], Path("codes"))


@pytest.mark.parametrize("own_code", [1, 143, 0])
def test_sigterm_ends_the_rounds_with_its_own_code(own_code) -> None:
    work = (
        f"import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({own_code})); "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    with pytest.raises(SystemExit) as caught:
        run_command([sys.executable, "-c", work], Path("codes"))
    assert caught.value.code == 143


@pytest.mark.parametrize("code", [ExitCode.invalid, ExitCode.failed])
def test_a_process_that_the_launcher_ended_does_not_hide_the_reason(code) -> None:
    write = "import os; [open(os.environ['DPO_DIST_EXIT_CODES'] + f'.{rank}', 'w').write(code)"
    work = f"{write} for rank, code in enumerate(['{int(code)}', '143'])]; os._exit(1)"
    assert run_command([sys.executable, "-c", work], Path("codes")) == code


@pytest.mark.parametrize("code", [ExitCode.preempted, ExitCode.diverged, ExitCode.invalid])
def test_the_exit_code_of_a_verb_survives_its_launcher_and_sigterm(code) -> None:
    """The verb ends by its own code after SIGTERM, in a child of a launcher that ends with 1."""
    work = f"import os; from dpo_dist.config.command_line import run_verb; os.kill({os.getpid()}, 15); " + (
        f"run_verb(lambda _: {int(code)}, verb='pairs')"
    )
    ignoring = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    command = [sys.executable, "-c", ignoring + LAUNCHER, "-c", ignoring + work, "data.train=[x]"]
    assert run_command(command, Path("codes")) == code
