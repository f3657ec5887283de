"""Two processes that share the tokens of each micro-batch make the same run as one process."""

from pathlib import Path

from safetensors.torch import load_file

from tests.e2e.conftest import Overrides
from tests.support.launch import assert_same_history, history, run_state, run_verb, summary, train

SHARED = "parallelism.sequence_parallel=2"


def test_a_run_with_shared_tokens_is_that_of_one_process_and_resumes_without_them(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Fill, step-0 check, coupled loss, evaluation, samples; then the same run goes on with one process."""
    steps = ["trainer.max_steps=2", "optim.lr=1e-3", "loss=beta_dpo", f"data.eval=[{assets}/eval.jsonl]"]
    steps += ["trainer.eval_every=1", "sampling.prompts=2", "sampling.max_new_tokens=4"]
    steps += ["trainer.micro_batch_tokens=128", "model.gradient_checkpointing=full"]
    alone = [f"run.dir={tmp_path}/alone", f"reference.store={tmp_path}/alone_store"]
    train(overrides(*steps, *alone))
    stopped = run_verb("train", overrides(*steps, SHARED, "trainer.stop_after_steps=1"), processes=2)
    assert run_state(tmp_path / "run")["step"] == 1, stopped.output
    assert "in groups of 2 for sequence parallelism" in stopped.output
    train(overrides(*steps))
    got, wanted = history(tmp_path / "run"), history(tmp_path / "alone")
    assert_same_history(got, wanted, relative=2e-4)
    computed = [summary(tmp_path / run)["reference"]["computed"] for run in ("run", "alone")]
    assert computed[0] == computed[1] > 0
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "alone")]
    for name, tensor in weights[1].items():
        assert (weights[0][name] - tensor).abs().max() <= 2e-4, name
