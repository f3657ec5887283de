"""A run under ZeRO-3 that would leave gradients out of its updates ends with an error on all ranks."""

from pathlib import Path
from unittest import mock

from tests.e2e.conftest import Overrides
from tests.support import tiny
from tests.support.families import tiny_family
from tests.support.launch import run_verb


def mark_shared_blocks() -> None:
    """Have ZeRO-3 treat modules as a whole whose weights others share, as it did."""
    mock.patch("dpo_dist.distributed.zero.shared_weights", return_value=set()).start()


def test_lost_gradients_end_a_run_with_one_error(overrides: Overrides, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_family("zamba2", len(tiny.qwen())).save_pretrained(model)
    tiny.qwen().save_pretrained(model)
    command = overrides(f"model.path={model}", "loss=simpo", "trainer.max_steps=1")
    ended = run_verb("train", command, processes=2, prepare=mark_shared_blocks)
    assert ended.code == 2, ended.output
    assert ended.output.count("it reduces gradients before they are complete") == 1
    assert "shared_transformer.self_attn" in ended.output
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
