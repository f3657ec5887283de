"""Log-probs of generated responses are those of a plain forward of transformers."""

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.generation.pairs.prompts import PromptList
from dpo_dist.generation.sampling.respond import Answer, Answers, find_model
from dpo_dist.insight.compare.responses import Speaker, response_logps
from dpo_dist.insight.compare.start import compared_models
from dpo_dist.model.load import load_packed
from tests.support.tiny_model import write_model


def row(prompt: list[int], *ids: list[int]) -> Answers:
    return Answers("key", [Answer(0, "", 1, True, True, ids=own) for own in ids], prompt_ids=prompt)


ROWS = [
    row([5, 6, 7], [8, 9, 10]),
    row([11], [12]),
    row([20, 21], []),
    row([3, 4]),
    row([9] * 12, [7, 8] * 4),
]


@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_sums_of_log_probs(tmp_path: Path, budget: int) -> None:
    folder = write_model(tmp_path / "model")
    device = torch.device("cpu")
    packed = load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32), 64, device).eval()
    found = response_logps(packed, ROWS, budget, device)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for logp, each in zip(found, ROWS, strict=True):
        if not each.answers:
            assert logp is None
            continue
        prompt, ids = each.prompt_ids, each.answers[0].ids
        with torch.no_grad():
            logps = plain(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        expected = sum(logps[len(prompt) + at - 1, token].item() for at, token in enumerate(ids))
        assert logp == pytest.approx(expected, abs=1e-4)


def responses_folder(tmp_path: Path, *overrides: str) -> str:
    """The name of the folder of a model's finished responses."""
    lines = ["data.eval=[held.jsonl]", f"run.root={tmp_path}", *overrides]
    config = load_run_config(lines, verb="compare")
    model = compared_models([f"{name}={tmp_path}/model" for name in "ab"])[0]
    prompts = PromptList(tmp_path / "prompts.jsonl", 1, 16, "digest", array("q", [0]))
    stages: Any = SimpleNamespace(finish=lambda *_: None)
    source = find_model(model.location, config)
    speaker = Speaker(model, source, config, stages, tmp_path, prompts)
    speaker.respond()
    return speaker.responses.folder.name


def test_responses_of_other_settings_are_not_used_again(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    template = tmp_path / "template.jinja"
    template.write_text("one")
    keys = [
        *("compare.max_new_tokens=9", "compare.temperature=0.5", "model.dtype=fp32"),
        *("data.max_length=99", "data.max_prompt_length=9", "data.template=literal"),
        *(
            "data.template_arguments={a: 1}",
            f"data.chat_template={template}",
        ),
    ]
    names = [responses_folder(tmp_path), *(responses_folder(tmp_path, key) for key in keys)]
    template.write_text("two")
    names.append(responses_folder(tmp_path, keys[-1]))
    assert len(set(names)) == len(names)
    assert responses_folder(tmp_path, "compare.prompts=9") == names[0]
