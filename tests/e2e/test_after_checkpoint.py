"""A run that its own command copies elsewhere continues from the copy after its disk is lost."""

import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import small_run
from tests.support.killed_runs import assert_same_run
from tests.support.launch import run_state, run_verb, train

STEPS = ["trainer.max_steps=6", "trainer.save_every=1", "optim.lr=1e-3", "model.adapter={r: 4}"]


@pytest.mark.parametrize(("processes", "keep_last"), [(1, 0), (2, 1)])
def test_a_run_whose_machine_is_lost_continues_from_its_copy(
    processes: int, keep_last: int, assets: Path, tmp_path: Path
) -> None:
    for name in ("whole", "machine"):
        (tmp_path / name).mkdir()
    options = [*STEPS, f"trainer.keep_last={keep_last}"]
    whole = tmp_path / "whole"
    train([*small_run(assets, whole), *options], processes=processes)
    machine = tmp_path / "machine"
    script = tmp_path / "copy.sh"
    script.write_text(
        f"set -e\nrm -rf {tmp_path}/new\nmkdir {tmp_path}/new\ncd $DPO_DIST_RUN_DIR\n"
        f"find . -name '*.tmp-*' -prune -o -type f -exec cp --parents -t {tmp_path}/new {{}} +\n"
        f"rm -rf {tmp_path}/copy\nmv {tmp_path}/new {tmp_path}/copy\n"
    )
    copy = f"sh {script}"
    command = [*small_run(assets, machine), *options, f"run.after_checkpoint={copy}"]
    stopped = run_verb("train", [*command, "trainer.stop_after_steps=3"], processes=processes)
    assert stopped.code == 75, stopped.output
    assert f"warning: run.after_checkpoint={copy}: this shell command is run" in stopped.output
    shutil.rmtree(machine / "run")
    shutil.copytree(tmp_path / "copy", machine / "run")
    again = train(command, processes=processes)
    assert "after step 3" in again.output
    assert "failed" not in again.output
    shutil.rmtree(machine / "run")
    shutil.copytree(tmp_path / "copy", machine / "run")
    shutil.rmtree(machine / "run/model", ignore_errors=True)  # the last command may have seen it
    train(command, processes=processes)
    if keep_last:
        assert_same_run(machine, whole)
    assert run_state(machine / "run")["outcome"] == "completed"
    assert bool(list((machine / "run/checkpoints").glob("step-*"))) == bool(keep_last)


def test_a_command_that_fails_ends_no_run_and_another_verb_does_not_run_it(
    assets: Path, tmp_path: Path
) -> None:
    command = [*small_run(assets, tmp_path), *STEPS, f"data.eval=[{assets}/eval.jsonl]"]
    failing = f"echo ran >> {tmp_path}/trace; echo no bucket >&2; exit 4"
    ended = train([*command, f"run.after_checkpoint='{failing}'"])
    assert "warning: run.after_checkpoint failed for step-000006: exit status 4: no bucket" in ended.output
    (tmp_path / "trace").unlink()
    for verb, words in (("evaluate", []), ("export", [f"export.output={tmp_path}/out"])):
        done = run_verb(verb, [f"run.dir={tmp_path}/run", *words])
        assert done.code == 0, done.output
        assert "after_checkpoint" not in done.output
    assert not (tmp_path / "trace").exists()
