"""Rounds: their order, models, references and seeds; failures and restarts at every stage."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError, DpoDistError, ExitCode
from dpo_dist.foundation.files import write_text
from dpo_dist.tools.launching import launcher_command
from dpo_dist.tools.pairs.rounds import run_rounds

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')


def config(*overrides: str) -> RunConfig:
    return load_run_config(
        [
            *("model.path=base", "data.train=[prompts.jsonl]", "run.dir=run", "pairs.method=samples"),
            *("pairs.function=m:f", "pairs.rounds=2", *overrides),
        ]
    )


class Verbs:
    def __init__(self, **fails: int) -> None:
        self.configs: list[dict[str, Any]] = []
        self.order: list[str] = []
        self.fails = fails

    def __call__(self, command: str) -> int:
        words = shlex.split(command)
        verb, folder = words[3], Path(words[5])
        content = yaml.safe_load((folder / "experiment" / "round.yaml").read_text())
        run = Path(content["run"]["dir"])
        number = int(run.name if verb == "pairs" else run.parent.name)
        self.configs.append(content)
        self.order.append(f"{verb}{number}")
        if (code := self.fails.pop(f"{verb}{number}", 0)) != 0:
            return code
        if verb == "train":
            (run / "model").mkdir(parents=True, exist_ok=True)
            facts = {"steps": 5, "final": {"rewards/accuracies": 0.75}}
            write_text(run / "dpo_metrics" / "summary.json", json.dumps(facts))
            return 0
        # The mean score is 0.25, 0.5, 0.75, 1.0 in rounds 1 to 4.
        samples = [{"content": f"{number}-{n}", "score": float(n < number)} for n in range(4)]
        write_text(run / "pairs" / "samples.jsonl", json.dumps({"responses": samples, "unused": []}))
        if number == 4 or self.fails.pop(f"full_disk{number}", 0):
            return ExitCode.invalid
        write_text(run / "pairs" / "pairs.jsonl", '{"prompt": "p", "chosen": "a", "rejected": "b"}')
        return 0

    def of(self, verb: str) -> list[dict[str, Any]]:
        return [one for one, name in zip(self.configs, self.order, strict=True) if name.startswith(verb)]


def do(verbs: Verbs, *overrides: str) -> tuple[int, list[str]]:
    said: list[str] = []
    return run_rounds(config(*overrides), said.append, verbs), said


WHOLE = ["pairs1", "train1", "pairs2", "train2", "pairs3"]


def test_each_policy_gives_the_next_samples_and_reference() -> None:
    verbs = Verbs()
    code, said = do(verbs, "trainer.seed=7", "pairs.part=1/2")
    assert (code, verbs.order) == (ExitCode.completed, WHOLE)
    sampling1, training1, sampling2, training2, last = verbs.configs
    assert [one["model"]["path"] for one in (sampling1, training1)] == ["base", "base"]
    assert sampling2["model"]["path"] == training2["model"]["path"] == "run/rounds/1/train/model"
    assert last["model"]["path"] == "run/rounds/2/train/model"
    samplings = (sampling1, sampling2, last)
    assert [(one["trainer"]["seed"], one["pairs"]["part"]) for one in samplings] == [
        *((7, "1/2"), (8, "2/2"), (9, "1/2"))
    ]
    assert [one["pairs"]["rounds"] for one in (sampling1, training1)] == [0, 0]
    assert training2["data"]["train"][0]["path"] == "run/rounds/2/pairs/pairs.jsonl"
    assert training1["reference"]["store"] == training2["reference"]["store"]
    assert said[-1] == "the last policy: run/rounds/2/train/model"
    assert "round 1: 4 responses, 1 pairs, mean score 0.2500" in said
    assert "after round 2: samples of run/rounds/2/train/model" in said
    assert [line.split() for line in said[-5:-1]] == [
        *(["policy", "mean", "score", "pairs", "accuracy"], ["at", "the", "start", "0.2500", "1", "0.750"]),
        *(["after", "round", "1", "0.5000", "1", "0.750"], ["after", "round", "2", "0.7500", "1", "-"]),
    ]
    rows = json.loads(Path("run/rounds/rounds.json").read_text())["rounds"]
    assert [row["samples"]["mean_score"] for row in rows] == [0.25, 0.5, 0.75]
    assert [row["training"] and row["training"]["steps"] for row in rows] == [5, 5, None]
    assert rows[0]["training"]["accuracy"] == 0.75


@pytest.mark.parametrize(
    ("overrides", "paths"),
    [
        (["pairs.reference=first"], [None, "base"]),
        (["reference.path=other", "pairs.reference=first"], ["other", "other"]),
        (["reference.path=other"], ["other", None]),
        (["loss=simpo", "pairs.reference=first"], [None, None]),
    ],
)
def test_the_reference_is_the_first_one_or_the_previous_policy(overrides: Any, paths: Any) -> None:
    verbs = Verbs()
    do(verbs, *overrides)
    assert [one["reference"]["path"] for one in verbs.of("train")] == paths


def test_finished_rounds_are_not_repeated_and_further_ones_end_when_all_scores_are_equal() -> None:
    do(Verbs())
    verbs = Verbs()
    assert do(verbs)[0] == ExitCode.completed
    assert verbs.order == []
    _, said = do(verbs, "pairs.rounds=6")
    assert verbs.order == ["train3", "pairs4"]
    assert "round 4: no two responses" in said[-7]
    assert said[-1] == "the last policy: run/rounds/3/train/model"


@pytest.mark.parametrize(
    ("stage", "how", "raised"),
    [("pairs1", 2, ExitCode.invalid), ("train1", 3, ExitCode.diverged), ("train2", -9, ExitCode.failed)],
)
def test_a_stage_that_fails_is_continued(stage: str, how: int, raised: ExitCode) -> None:
    with pytest.raises(DpoDistError, match=f"round {stage[-1]} failed") as caught:
        do(Verbs(**{stage: how}))
    assert caught.value.exit_code == raised
    verbs = Verbs()
    assert do(verbs)[0] == ExitCode.completed
    assert verbs.order == WHOLE[WHOLE.index(stage) :]


def test_samples_whose_pairs_cannot_be_written_do_not_end_the_rounds() -> None:
    with pytest.raises(DpoDistError, match="round 2 failed"):
        do(Verbs(full_disk2=1))
    assert do(verbs := Verbs())[0] == ExitCode.completed
    assert verbs.order == WHOLE[2:]


ADAPTER = ("model.adapter={r: 2, alpha: 4}",)


def test_an_adapter_is_merged_before_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[tuple[str, str]] = []

    def merge(adapter: Path, folder: Path, *_: Any) -> None:
        if not merged:  # killed while it merges
            merged.append(("", ""))
            raise KeyboardInterrupt
        merged.append((str(adapter), str(folder)))
        folder.mkdir()

    monkeypatch.setattr("dpo_dist.training.export.merge_adapter", merge)
    verbs = Verbs()
    with pytest.raises(KeyboardInterrupt):
        do(verbs, *ADAPTER)
    code, said = do(verbs, *ADAPTER)
    assert (code, said[-1]) == (ExitCode.completed, "the last policy: run/rounds/2/policy")
    assert verbs.order == [*WHOLE[:2], *WHOLE[1:]]
    assert merged[1:] == [(f"run/rounds/{n}/train/model", f"run/rounds/{n}/policy") for n in (1, 2)]
    policies = [one["model"]["path"] for one in verbs.configs[2:]]
    assert policies == ["base", *["run/rounds/1/policy"] * 2, "run/rounds/2/policy"]
    assert {one["reference"]["mode"] for one in verbs.of("train")} == {"adapter"}
    quantized, verbs = ("model.quantization=nf4", "parallelism=ddp", "run.dir=run2"), Verbs()
    do(verbs, *ADAPTER, "pairs.reference=first", *quantized)
    first, second = (one["reference"] for one in verbs.of("train"))
    assert first["mode"] == "adapter"
    assert [second[key] for key in ("mode", "path", "quantization")] == ["cached", "base", "nf4"]


@pytest.mark.parametrize(
    ("overrides", "of_training"),
    [((), None), (("data.eval_share=0.1", "sampling.prompts=0"), None), (("data.eval_share=0.1",), 9)],
)
def test_trainings_sample_as_the_rounds_do_if_they_sample(
    overrides: tuple[str, ...], of_training: int | None
) -> None:
    verbs = Verbs()
    assert do(verbs, "sampling.max_new_tokens=9", *overrides)[0] == 0
    assert {one["sampling"]["max_new_tokens"] for one in verbs.of("pairs")} == {9}
    assert {one["sampling"]["max_new_tokens"] for one in verbs.of("train")} == {of_training}


def test_other_settings_are_refused_once_a_stage_is_finished() -> None:
    with pytest.raises(DpoDistError, match="sampling of round 1"):
        do(Verbs(pairs1=2), "pairs.function=m:mistyped")
    do(Verbs())
    changed = r"loss\.beta: 0\.1 before, 0\.2 now; pairs\.samples: 4 before.*sampling\.top_k: 0"
    with pytest.raises(ConfigError, match=changed):
        do(Verbs(), "loss.beta=0.2", "pairs.samples=8", "sampling.top_k=5")
    assert do(Verbs(), "trainer.save_every=7")[0] == ExitCode.completed


def test_a_secret_which_no_file_has_is_no_other_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "a-secret-name")
    for _ in range(2):
        assert do(Verbs(), "pairs.function=m:a-secret-name")[0] == ExitCode.completed


@pytest.mark.parametrize(("gpus", "words"), [(0, ""), (1, ""), (2, " -m dpo_dist launch")])
def test_several_gpus_have_a_process_each(gpus: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert launcher_command() == shlex.quote(sys.executable) + words


def test_a_preempted_training_ends_the_command_with_its_code() -> None:
    code, said = do(Verbs(train1=75))
    assert code == ExitCode.preempted
    assert "the same command continues" in said[-1]


def test_only_sampling_asks_a_server_which_may_move_between_starts() -> None:
    server, verbs = "sampling.endpoint.url=http://127.0.0.1:9/v1", Verbs(pairs2=1)
    with pytest.raises(DpoDistError):
        do(verbs, server)
    do(verbs, server.replace(":9", ":10"), "sampling.endpoint.parallel=3")
    assert {each["sampling"]["endpoint"]["url"] for each in verbs.of("train")} == {None}
    assert [each["sampling"]["endpoint"]["url"][-5:-3] for each in verbs.of("pairs")] == [
        ":9",
        ":9",
        "10",
        "10",
    ]


def test_without_a_judge_the_last_training_is_the_end_and_the_teacher_stays() -> None:
    """The reference of `reverse_kl` is its teacher in each round, where others take the policy before."""
    verbs = Verbs()
    words = ["pairs.function=null", "pairs.samples=1", "loss=reverse_kl", "reference.path=teacher"]
    code, said = do(verbs, *words)
    assert (code, verbs.order) == (ExitCode.completed, WHOLE[:-1])
    assert [one["reference"]["path"] for one in verbs.of("train")] == ["teacher", "teacher"]
    assert said[-1] == "the last policy: run/rounds/2/train/model"
