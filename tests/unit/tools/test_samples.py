"""Choice of the prompts of samples, and the evaluations that have them."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.config.schema import FolderConfig, ModelConfig, RunConfig
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.distributed.zero import FrozenEngine
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import PreferenceDataset, open_dataset
from dpo_dist.foundation import background, console
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.foundation.files import json_line, read_lines
from dpo_dist.model.files.stops import find_stop_ids
from dpo_dist.objective.metrics import PairValues
from dpo_dist.tools.report import samples
from dpo_dist.tools.report.recorder import write_worst
from dpo_dist.tools.report.samples import RunSamples, SamplePrompt, choose_prompts
from dpo_dist.tools.sampling.generate import Request, Sample
from dpo_dist.tools.sampling.settings import Sampling
from dpo_dist.training.start.open_run import Run
from tests.support import tiny
from tests.support.alone import ALONE
from tests.support.records import jsonl

TOKENIZER = tiny.qwen()
STOPS = find_stop_ids(TOKENIZER, DataConfig(), Path(), "model.path")
ROWS = [
    {"prompt": f"question {'very ' * n}{n // 2}", "chosen": f" right {n}", "rejected": f"wrong {n}"}
    for n in range(12)
]
# A prompt twice, with other responses.
ROWS.append({**ROWS[0], "chosen": "another", "rejected": "one"})


def dataset(folder: Path, rows: list[dict[str, Any]]) -> PreferenceDataset:
    folder.mkdir()
    source = SourceConfig(str(jsonl(folder, *rows)), label="held_out")
    config = DataConfig(cache=str(folder / "encoded"))
    return open_dataset(Preparation([source], config, TOKENIZER, "tiny").whole(), config)


def chosen(data: PreferenceDataset, count: int, seed: int = 0) -> list[str]:
    prompts = choose_prompts(data, TOKENIZER, STOPS, count, seed, Sampling(4), None)
    return [prompt.fields["prompt"] for prompt in prompts]


def test_prompts_follow_from_seed_and_contents_alone(tmp_path: Path) -> None:
    data = dataset(tmp_path / "one", ROWS)
    everything = chosen(data, 100)
    assert len(everything) == len(set(everything)) == 12
    assert chosen(data, 5) == everything[:5]
    assert chosen(dataset(tmp_path / "other", ROWS[::-1]), 100) == everything
    assert chosen(data, 5, seed=1) != everything[:5]


def test_prompts_leave_room_for_the_response(tmp_path: Path) -> None:
    data = dataset(tmp_path / "one", ROWS)
    lengths = sorted({data.lengths(index)[0] for index in range(len(data))})
    longest = lengths[2] + 20
    fitting = choose_prompts(data, TOKENIZER, STOPS, 100, 0, Sampling(20), longest)
    assert max(len(prompt.request.prompt_ids) for prompt in fitting) == lengths[2]
    assert 0 < len(fitting) < 12
    usual = choose_prompts(data, TOKENIZER, STOPS, 100, 0, Sampling(20, is_default=True), longest)
    assert len(usual) > len(fitting)
    for prompt in usual:
        assert 16 <= (prompt.request.room or 0) == min(20, longest - len(prompt.request.prompt_ids))


def test_responses_of_the_reference_are_read_for_the_same_prompts_and_settings_only(tmp_path: Path) -> None:
    run = Run(
        RunConfig(model=ModelConfig("unused"), run=FolderConfig(dir=str(tmp_path))), ALONE, Console(None)
    )
    prompts = tuple(
        SamplePrompt(Request(np.array([1], np.int32), key, 0), {"prompt_id": key}) for key in ("id", "other")
    )
    opened = RunSamples(run, Sampling(4, seed=3), prompts, STOPS, TOKENIZER)
    assert opened.read_reference() is None
    responses = [{"text": text, "tokens": 2, "finished": True} for text in ("a\u2028b", "c")]
    sampling = {
        "max_new_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 3,
        "is_default": False,
    }
    opened.run.folder.samples.mkdir()
    rows = [
        {**prompt.fields, "sampling": sampling, "responses": {"reference": response}}
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    opened.run.folder.samples_reference.write_text("".join(map(json_line, rows)), encoding="utf-8")
    assert opened.read_reference() == responses
    assert replace(opened, sampling=Sampling(5, seed=3)).read_reference() is None
    assert replace(opened, prompts=opened.prompts * 2).read_reference() is None


def test_responses_have_metrics_only_at_the_evaluations_of_the_run(tmp_path: Path) -> None:
    run = Run(
        RunConfig(model=ModelConfig("unused"), run=FolderConfig(dir=str(tmp_path))), ALONE, Console(None)
    )
    refusal = {"text": "I'm sorry, but I can't help with that.", "tokens": 9, "finished": True}
    prompts = [
        SamplePrompt(Request(np.array([1], np.int32), "id", 0), {"prompt_id": "id", "chosen": chosen})
        for chosen in ("Paris, of course.", "I cannot help with that.")
    ]
    usual = RunSamples(run, Sampling(4), tuple(prompts), STOPS, TOKENIZER, at_every_evaluation=False)
    usual = replace(usual, policy_starts_as_reference=True, reference=[refusal, refusal])
    policy = FrozenEngine.__new__(FrozenEngine)  # the reference's responses are those of step 0
    metrics = usual.write_responses(0, policy, is_last=False)
    assert (metrics["samples/length"], metrics["samples/prompts"]) == (9.0, 2.0)
    assert usual.write_responses(3, policy, is_last=False) == {}


def test_a_run_says_that_it_samples_while_it_takes_long_and_counts_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(console, "_FIRST_HEARTBEAT_SECONDS", 0.0)
    lines: list[str] = []

    def generate(*_: object, **__: object) -> list[Sample]:
        for _attempt in range(1000):
            if lines:
                break
            time.sleep(0.01)
        return [Sample([5], None)]

    monkeypatch.setattr(samples, "generate_together", generate)
    config = RunConfig(model=ModelConfig("unused"), run=FolderConfig(dir=str(tmp_path)))
    run = Run(config, ALONE, Console(LineScreen(lines.append)))
    prompt = SamplePrompt(Request(np.array([1], np.int32), "id", 0), {"prompt_id": "id", "chosen": "Yes."})
    asked = RunSamples(run, Sampling(4), (prompt,), STOPS, TOKENIZER)
    asked.run.folder.samples.mkdir()
    metrics = asked.write_responses(3, FrozenEngine.__new__(FrozenEngine), is_last=False)
    assert metrics["samples/prompts"] == 1.0
    assert lines[0].startswith("samples: responding to 1 prompt: ")


@pytest.mark.parametrize(("seconds", "asked"), [(1.0, 8), (25.0, 2), (400.0, 1)])
def test_by_default_a_slow_model_answers_as_many_prompts_as_fit_in_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, asked: int
) -> None:
    told: list[str] = []
    run = Run(
        RunConfig(model=ModelConfig("unused"), run=FolderConfig(dir=str(tmp_path))),
        ALONE,
        Console(LineScreen(told.append)),
    )
    run.folder.samples.mkdir()
    prompts = tuple(
        SamplePrompt(Request(np.array([1], np.int32), str(n), 0), {"prompt_id": str(n)}) for n in range(8)
    )
    now = 0.0

    def generate(model: object, requests: list[Request], *others: object, **options: object) -> list[Sample]:
        nonlocal now
        now += seconds * len(requests)
        return [Sample([5], None) for _ in requests]

    monkeypatch.setattr(samples, "generate_together", generate)
    monkeypatch.setattr(samples.time, "monotonic", lambda: now)
    usual = RunSamples(run, Sampling(4), prompts, STOPS, TOKENIZER, at_every_evaluation=False)
    usual.ask_reference(FrozenEngine.__new__(FrozenEngine))
    assert (len(usual.prompts), len(usual.reference or [])) == (asked, asked)
    assert any("sampling.prompts=8" in line for line in told) == (asked < 8)
    again = replace(usual, prompts=prompts, reference=None)
    assert again.read_reference() == usual.reference
    every = RunSamples(run, Sampling(4), prompts, STOPS, TOKENIZER)
    assert asked == 8 or every.read_reference() is None
    every.ask_reference(FrozenEngine.__new__(FrozenEngine))
    assert len(every.reference or []) == 8


def test_the_worst_labelled_records_have_their_reward_by_which_good_ones_should_rise(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "completion": f"answer {n}", "label": n < 2} for n in range(4)]
    columns = dict.fromkeys(set(PairValues.__dataclass_fields__) - {"custom"}, np.zeros(4, np.float32))
    columns |= {"margin": np.array([-0.5, 0.25, 0.75, -0.125], np.float32)}
    columns |= {"tokens_chosen": np.array([2, 2, 0, 0]), "tokens_rejected": np.array([0, 0, 2, 2])}
    file = tmp_path / "worst.jsonl"
    values = PairValues.from_columns(columns)
    records = dataset(tmp_path / "labelled", rows)
    write_worst(file, values, records, TOKENIZER, is_unpaired=True)
    good, bad = read_lines(file)
    assert (good["reward"], bad["reward"]) == (-0.5, 0.125)
    assert [list(each["responses"]) for each in (good, bad)] == [["good"], ["bad"]]
    assert "answer 0" in good["responses"]["good"]["text"]
    assert "answer 3" in bad["responses"]["bad"]["text"]
    learnt = replace(values, margin=np.abs(values.margin))
    write_worst(file, learnt, records, TOKENIZER, is_unpaired=True)
    assert not file.exists()
