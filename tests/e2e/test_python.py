"""Verbs called from Python, several times in one process; docs/python.md runs as one notebook."""

import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Overrides
from tests.support.invented import write_pairs
from tests.support.launch import environment, history, run_verb, summary, train
from tests.support.pages import Block, blocks_of, in_process
from tests.support.tiny_model import write_model
from tests.support.warm import ENVIRONMENT


def call_verbs(variables: dict[str, str], data: Path, command: list[str]) -> None:
    """Precompute, train, fail and train again."""
    os.environ.clear()
    os.environ.update(variables)
    import torch

    from dpo_dist import train as verb
    from dpo_dist.config.load import load_run_config
    from dpo_dist.foundation.errors import DataError
    from dpo_dist.verbs import precompute

    def tensor_bytes() -> int:
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    before = tensor_bytes()
    linear, handler = torch.nn.functional.linear, signal.getsignal(signal.SIGTERM)
    hook, addresses = sys.excepthook, set[str]()

    def look() -> None:
        while True:
            sockets = psutil.Process().net_connections("tcp")
            addresses.update(one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN)
            time.sleep(0.02)

    threading.Thread(target=look, daemon=True).start()
    mine = logging.NullHandler()
    logging.getLogger().handlers[:] = [mine]
    assert precompute.main(load_run_config(command)) == 0
    verb.check(load_run_config(command))
    first = [*command, "parallelism=ddp", "loss.beta=0.3", f"run.dir={data.parent}/first"]
    assert verb.main(load_run_config(first)) == 0
    with pytest.raises(DataError):
        verb.main(load_run_config([*command, f"data.train=[{data}]", "data.max_bad_share=0.01"]))
    assert signal.getsignal(signal.SIGTERM) is handler, "a failed run does not leave SIGTERM ignored"
    assert verb.main(load_run_config(command)) == 0
    kept = tensor_bytes() - before
    assert kept < 10_000, f"{kept} bytes of weights, gradients or optimizer states are kept"
    assert torch.nn.functional.linear is linear, "a ZeRO-3 run does not change later unsharded models"
    assert logging.getLogger().handlers == [mine], "the caller's logging is restored"
    assert sys.excepthook is hook, "tracebacks of the caller get no prefix of a rank"
    assert addresses
    assert not addresses & {"0.0.0.0", "::"}, "nobody else's machine can connect"


def test_verbs_can_be_called_again_in_one_process(overrides: Overrides, assets: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text((assets / "train.jsonl").read_text() + '{"prompt": ')
    command = overrides("trainer.max_steps=2")
    in_process(call_verbs, {**environment(), **ENVIRONMENT}, broken, command)
    train([*command, f"run.dir={tmp_path}/fresh"])
    assert history(tmp_path / "run") == history(tmp_path / "fresh"), "equal to a run in a process of its own"


def from_memory(variables: dict[str, str], data: Path, words: list[str], said: Path) -> None:
    """Train on records in memory: refused, stopped by an exception, stopped by a row, to the end."""
    os.environ.clear()
    os.environ.update(variables)
    from datasets import Dataset

    from dpo_dist import api
    from dpo_dist.foundation.errors import ConfigError

    train, held_out = (
        [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    )
    for records, where in (([], "data.train"), ([train[0], {"prompt": data}], "data.train[1]")):
        with pytest.raises(ConfigError) as refused:
            api.train(words, train=records, eval=held_out)
        assert refused.value.where == where
    rows: list[dict[str, float]] = []

    def raise_after_2(row: dict[str, float]) -> bool | None:
        rows.append(row)
        if row["step"] == 2:
            raise ValueError("a bug in on_row")
        return None

    def stop_at_4(row: dict[str, float]) -> bool | None:
        rows.append(row)
        return row["step"] == 4 and "eval_loss" in row

    with pytest.raises(ValueError, match="a bug in on_row"):
        api.train(words, train=train, eval=held_out, on_row=raise_after_2)
    folder = words[-1].removeprefix("run.dir=")
    assert api.read_summary(folder)["steps"] == 2, "the evaluation of step 2 waits"
    stopped = api.train(words, train=train, eval=Dataset.from_list(held_out), on_row=stop_at_4)
    assert [stopped[key] for key in ("exit", "stopped_by", "run_dir")] == ["preempted", "on_row", folder]
    steps: list[tuple[int, int]] = []
    done = api.train(
        words,
        train=train,
        eval=held_out,
        on_row=rows.append,
        on_step=lambda step: steps.append((step.step, step.steps)),
    )
    assert steps[-1] == (7, 7)
    assert (done["exit"], done["steps"]) == ("completed", 7)
    said.write_text(json.dumps(rows))


def test_records_in_memory_are_those_of_a_file(overrides: Overrides, assets: Path, tmp_path: Path) -> None:
    """Metrics, log-probs in the store and the model, also of a run that was stopped three times."""
    options = ["trainer.max_steps=7", "trainer.eval_every=2"]
    files = overrides(f"data.eval=[{assets}/eval.jsonl]", *options, f"run.dir={tmp_path}/files")
    train(files)
    memory = overrides(*options, f"run.dir={tmp_path}/memory")
    memory = [word for word in memory if not word.startswith("data.train=")]
    in_process(from_memory, {**environment(), **ENVIRONMENT}, assets, memory, tmp_path / "rows.json")
    assert history(tmp_path / "memory") == history(tmp_path / "files")
    model = "model/model.safetensors"
    assert (tmp_path / "memory" / model).read_bytes() == (tmp_path / "files" / model).read_bytes()
    assert summary(tmp_path / "memory")["reference"]["computed"] == 0, "the same store"
    recorded = json.loads((tmp_path / "memory/dpo_metrics/log_history.json").read_text())
    assert json.loads((tmp_path / "rows.json").read_text()) == recorded
    evaluated = run_verb("evaluate", [f"run.dir={tmp_path}/memory"])
    assert evaluated.code == 0, evaluated.output


def notebook(folder: Path, blocks: list[Block]) -> None:
    os.chdir(folder)
    cells = {"__name__": "notebook"}
    for block in blocks:
        if block.file:
            Path(block.file).write_text(block.text)
        else:
            exec(compile(block.text, "docs/python.md", "exec"), cells)


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 9, seed=1)
    elsewhere = blocks_of("docs/python.md", "Data for another trainer")  # tests/unit/data/test_data_alone.py
    blocks = [block for block in blocks_of("docs/python.md") if block not in elsewhere]
    assert {block.language for block in blocks} == {"python"}
    assert len(blocks) == 12
    in_process(notebook, tmp_path, blocks)
