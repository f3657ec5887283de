"""The verb `doctor`, as far as it comes before the data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.doctor import main
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.insight.doctor import examine
from tests.support import tiny
from tests.support.doctor_data import clean_pairs, write
from tests.support.sft_adapter import write_sft_adapter
from tests.support.tiny_model import write_model


@contextmanager
def silent(title: str, unit: str) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


def test_a_missing_benchmark_file_is_found_before_anything_is_encoded(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", clean_pairs(2))
    keys = ["model.path=absent_model", f"data.train=[{data}]", "doctor.benchmarks=[absent.jsonl]"]
    with pytest.raises(DataError, match="benchmark prompts") as found:
        main(load_run_config(keys))
    assert (found.value.where, found.value.got) == (
        "doctor.benchmarks: absent.jsonl",
        "No such file or directory",
    )


def test_data_are_encoded_by_the_tokenizer_of_the_adapter_that_the_policy_starts_from(tmp_path: Path) -> None:
    """As training encodes them: the base has no chat template, the adapter's folder has one."""
    tokenizer = tiny.qwen()
    model, sft = write_model(tmp_path / "base", tokenizer), tmp_path / "sft"
    write_sft_adapter(model, sft)
    tokenizer.save_pretrained(sft)
    (model / "chat_template.jinja").unlink()
    message = [{"role": "user", "content": "Say hello."}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    data = write(tmp_path / "a.jsonl", [{"prompt": message, **answers}] * 3)
    keys = [f"model.path={model}", f"data.train=[{data}]", f"data.cache={tmp_path}/encoded"]
    found = examine.diagnose(load_run_config([*keys, f"model.adapter={{path: {sft}}}"]), silent)
    assert found.model == sft
    with pytest.raises(ConfigError, match="no chat template"):
        examine.diagnose(load_run_config(keys), silent)
