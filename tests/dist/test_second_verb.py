"""Several verbs in the same processes of a launcher, one after the other."""

import json
import os
from pathlib import Path

from tests.support import tiny
from tests.support.launch import environment
from tests.support.tiny_model import write_model
from tests.support.warm import ENVIRONMENT, context, reserve_port, start_parent

PAIRS = [
    {"prompt": f"q{number}", "chosen": " right" * (1 + number % 3), "rejected": " wrong"}
    for number in range(8)
]


def train_twice(variables: dict[str, str], folder: Path) -> None:
    log = os.open(folder / f"rank-{variables['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(variables)
    from accelerate import PartialState

    from dpo_dist import api

    def on_step(done: api.StepDone) -> api.Ask | None:
        return {1: api.Ask.save, 2: api.Ask.log, 3: api.Ask.stop}.get(done.step)

    PartialState()  # as in scripts that load a model for each process
    words = [
        f"model.path={folder / 'model'}",
        f"run.dir={folder / 'run'}",
        f"data.cache={folder / 'cache'}",
        f"reference.store={folder / 'reference'}",
        "model.dtype=fp32",
        "trainer.global_batch_pairs=4",
        "trainer.max_steps=5",
        "trainer.log_every=5",
        "trainer.eval_every=5",
        "optim.lr=1e-3",
        "tracking=off",
    ]
    ends = [api.train(words, train=PAIRS, eval=PAIRS, on_step=asks)["exit"] for asks in (on_step, None)]
    steps = [(row["step"], "eval_loss" in row) for row in api.read_metrics(folder / "run")]
    (folder / f"rank-{variables['RANK']}.json").write_text(json.dumps([ends, steps]))


def test_two_processes_train_twice(tmp_path: Path) -> None:
    write_model(tmp_path / "model", tiny.qwen())
    start_parent()
    port, processes = reserve_port(), []
    for rank in map(str, range(2)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables = {**environment(), **ENVIRONMENT, **place}
        processes.append(context.Process(target=train_twice, args=(variables, tmp_path)))
        processes[-1].start()
    for process in processes:
        process.join(400)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    said = [(tmp_path / f"rank-{rank}.log").read_text()[-2000:] for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], said
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second, "every process has the same results"
    ends, rows = first
    assert ends == ["preempted", "completed"], "as the function of one process asked, then to the end"
    assert [2, False] in rows
