"""An adapter from the command line: killed, resumed, written, and loaded by peft on the plain base."""

import importlib.util
from pathlib import Path

import pytest

from tests.e2e.conftest import Overrides, small_run
from tests.e2e.test_start_adapter import mean_logp, on_base, responses
from tests.support.launch import assert_same_history, history, summary, train

STEPS = [
    "model.adapter={r: 4, alpha: 8}",
    "reference.mode=adapter",
    "trainer.epochs=4",
    "trainer.save_every=2",
    "optim.lr=1e-2",
]


@pytest.fixture(scope="module")
def uninterrupted(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train([*small_run(assets, folder), f"data.eval=[{assets}/eval.jsonl]", *STEPS], processes=2)
    return folder / "run"


def test_the_written_adapter_gives_the_log_probs_that_training_saw(assets: Path, uninterrupted: Path) -> None:
    assert not (uninterrupted / "model/model.safetensors").exists()
    evaluated = [row for row in history(uninterrupted) if "eval_loss" in row][-1]
    adapted = on_base(assets, uninterrupted / "model")
    for which, name in enumerate(("chosen", "rejected")):
        pairs = responses(assets, which)
        logp = mean_logp(adapted, pairs)
        assert logp == pytest.approx(evaluated[f"eval_logps/{name}"], rel=1e-4)
        with adapted.disable_adapter():
            reward = 0.1 * (logp - mean_logp(adapted, pairs))
        assert reward == pytest.approx(evaluated[f"eval_rewards/{name}"], rel=1e-3, abs=1e-5)


def test_a_live_reference_is_the_base_that_the_adapter_leaves(
    overrides: Overrides, assets: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    options = ["reference.mode=live", "parallelism=ddp", f"data.eval=[{assets}/eval.jsonl]"]
    told = train(overrides(*STEPS, *options)).output
    assert "step-0 check passed" in told
    assert_same_history(history(tmp_path / "run"), history(uninterrupted), 2e-4)
    assert summary(tmp_path / "run")["reference"]["mode"] == "live"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_quantized_base_is_its_own_reference_switched_off_and_stored(
    overrides: Overrides, tmp_path: Path
) -> None:
    quantized = [*STEPS, "model.quantization=nf4", "parallelism=ddp", "trainer.max_steps=3"]
    train(overrides(*quantized, f"run.dir={tmp_path}/off"))
    stored = train(overrides(*quantized, "reference.mode=cached", "reference.quantization=nf4"))
    assert "step-0 check passed" in stored.output
    assert history(tmp_path / "off")[0]["rewards/margins"] == 0
    assert_same_history(history(tmp_path / "run"), history(tmp_path / "off"), 2e-4)
