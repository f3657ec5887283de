"""The API for scripts and notebooks; the list of verbs."""

import copy
import csv
import os
import pkgutil
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import dpo_dist
from dpo_dist import api, train
from dpo_dist.config.verbs import VERBS
from dpo_dist.data.config import Ranked, Truncation
from dpo_dist.data.encode import EncodedExample
from dpo_dist.data.example import Example
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import open_dataset
from dpo_dist.foundation.errors import ConfigError, ReferenceModelError
from dpo_dist.tools.compare import __main__ as compare
from dpo_dist.tools.pairs import __main__ as pairs
from dpo_dist.verbs import precompute
from tests.support import tiny
from tests.support.families import tiny_causal_lm, tiny_config, with_rope
from tests.support.packing import plain_logps
from tests.support.records import TEXT, jsonl


@pytest.mark.parametrize(
    "name",
    [
        *("objective.losses:preference_loss", "data:read_records", "data:encode_record"),
        *("reference.store:LogpStore", "config.load:load_run_config"),
    ],
)
def test_public_names_keep_their_place(name: str) -> None:
    assert callable(pkgutil.resolve_name(f"dpo_dist.{name}"))


def test_a_command_of_another_verb_than_train_is_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    first = next(line for line in page.splitlines() if line.startswith("    dpo-dist compare"))
    config = api.load_run_config(shlex.split(first)[2:])
    assert config.compare.models == ["base=./base", "output/a"]
    assert [source.path for source in config.data.eval] == ["held_out.jsonl"]


@pytest.mark.parametrize(
    ("verb", "given", "key"),
    [
        (train, "data.train=[a.jsonl]", "model.path"),
        (precompute, "model.path=m", "data.train"),
        (pairs, "model.path=m", "data.train"),
        (compare, "model.path=m", "compare.models"),
    ],
)
def test_a_verb_names_the_key_that_it_lacks(verb: ModuleType, given: str, key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        verb.main(api.load_run_config([given]))
    assert raised.value.where == key


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dpo_dist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_verb_is_listed_and_started() -> None:
    package = Path(dpo_dist.__file__).parent
    files = {file for file in package.rglob("*.py") if 'if __name__ == "__main__"' in file.read_text()}
    names = {".".join(file.relative_to(package.parent).with_suffix("").parts) for file in files}
    programs = {name.removesuffix(".__main__") for name in names} - {"dpo_dist"}
    assert {row.module for row in VERBS.values()} == programs
    for arguments, code in ((("--help",), 0), (("trian",), 2)):
        listed = started(*arguments)
        assert (listed.returncode, listed.stderr) == (code, "")
        assert all(f"\n  {verb} " in listed.stdout for verb in VERBS)
    assert "did you mean train?" in listed.stdout
    failed = started("store", "info", "/nowhere")
    assert (failed.returncode, "no reference store" in failed.stderr) == (2, True)


def test_what_is_no_run_no_store_no_model_and_no_pair_is_named(tmp_path: Path) -> None:
    for read in (api.read_metrics, api.read_summary):
        with pytest.raises(ConfigError, match="cannot be read"):
            read(tmp_path)
    with pytest.raises(ReferenceModelError) as raised:
        api.open_stores(tmp_path / "missing")
    assert raised.value.where == str(tmp_path / "missing")
    with pytest.raises(ConfigError, match="not a causal language model"):
        api.token_logps("model", [])  # type: ignore[arg-type]
    model = tiny_causal_lm(tiny_config("llama")).eval()
    assert api.token_logps(model, []) == []
    with pytest.raises(ValueError, match="at least one pair"):
        api.pair_logps(model, [])


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"train": "pairs.jsonl"}, "data.train"),
        ({"train": [TEXT], "eval": {"prompt": ["q"]}}, "data.eval"),
        ({"train": [TEXT], "on_row": 3}, "on_row"),
    ],
)
def test_what_is_no_list_of_records_and_no_function_is_refused_first(
    given: dict[str, Any], where: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        api.train(["model.path=m", f"data.cache={tmp_path}/cache"], **given)
    assert raised.value.where == where
    assert not (tmp_path / "cache").exists()


def test_a_guest_restores_only_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANGED", "before")
    monkeypatch.setenv("DELETED", "before")
    before, cell_size = dict(os.environ), csv.field_size_limit()
    with api.as_guest():
        monkeypatch.setattr(type(os.environ), "clear", lambda _: pytest.fail("other threads read it"))
        os.environ.update({"CHANGED": "within", "ADDED": "within"})
        del os.environ["DELETED"]
        csv.field_size_limit(7)
    assert dict(os.environ) == before
    assert csv.field_size_limit() == cell_size


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_model_in_training_mode_is_an_error_and_one_in_evaluation_mode_is_left_as_it_was(
    rope_type: str,
) -> None:
    """Also one with rotary frequencies by length."""
    plain = tiny_causal_lm(with_rope(tiny_config("llama"), rope_type, 12)).train()
    modules, attention = dict(plain.named_modules()), plain.config._attn_implementation
    responses = tuple(np.full(length, 7, dtype=np.int32) for length in (3, 9))
    pair = EncodedExample(np.arange(5, 14, dtype=np.int32), responses)
    with pytest.raises(ConfigError, match="in evaluation mode"):
        api.pair_logps(plain, [pair])
    assert api.pair_logps(plain.eval(), [pair]).chosen.requires_grad
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        logits = copy.deepcopy(plain)(ids).logits
        first, second = (torch.cat(api.token_logps(plain, [pair])) for _ in range(2))
        assert torch.equal(first, second)
        torch.testing.assert_close(first, plain_logps(plain, [Example(pair.prompt_ids, pair.responses)]))
        assert torch.equal(plain(ids).logits, logits)
    assert (dict(plain.named_modules()), plain.config._attn_implementation) == (modules, attention)


def test_a_model_is_checked_once_and_again_for_longer_pairs() -> None:
    plain, forwards = tiny_causal_lm(tiny_config("llama")).eval(), list[object]()
    plain.model.register_forward_hook(lambda *_: forwards.append(None))

    def count(response_tokens: int) -> int:
        response = np.full(response_tokens, 7, dtype=np.int32)
        api.token_logps(plain, [EncodedExample(np.arange(5, 9, dtype=np.int32), (response, response))])
        done = len(forwards)
        forwards.clear()
        return done

    assert count(6) > 1
    assert (count(6), count(5)) == (1, 1)
    assert count(7) > 1
    plain.to(torch.float64)
    assert count(7) > 1


@pytest.mark.parametrize("truncation", Truncation)
@pytest.mark.parametrize("ranked", Ranked)
def test_pairs_are_those_of_training(ranked: Ranked, truncation: Truncation, tmp_path: Path) -> None:
    """Also of a ranking in which a response that no example uses is above the limits."""
    record = {"prompt": "the prompt " * 4, "responses": ["good", "long " * 40, "fair", "bad"]}
    scored = [record | {"scores": scores} for scores in ([3, 3, 2, 1], [4, 3, 2, 1])]
    short = {"prompt": "q", "responses": ["a", "b"], "scores": [2, 1]}
    source = api.SourceConfig(jsonl(tmp_path, *scored, short, {"prompt": "q"}))
    config = api.DataConfig(
        max_length=48, truncation=truncation, ranked=ranked, cache=str(tmp_path / "cache"), max_bad_share=1.0
    )
    pairs, bad = api.read_pairs(source, tiny.qwen(), config)
    dataset = open_dataset(Preparation([source], config, tiny.qwen(), "qwen").whole(), config)
    assert api.response_keys(pairs).tolist() == dataset.keys[:].tolist()
    assert len(bad) == dataset.counts["read"] - dataset.counts["kept"]


def test_pairs_with_images_are_not_scored_as_text(tmp_path: Path) -> None:
    kept, bad = api.read_pairs(jsonl(tmp_path, TEXT | {"images": ["a.png"]}), tiny.qwen())
    assert (kept, [record.reason for record in bad]) == ([], ["media_not_read"])
