"""Run directories of strangers: each verb that reads one ends with one plain error, at once."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.distributed.checkpoint.saver import find_faults
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import CheckpointError, ConfigError
from dpo_dist.tools.chat.speakers import open_speakers
from dpo_dist.tools.evaluation.models import check_origin
from dpo_dist.tools.evaluation.trained_prompts import count_trained
from dpo_dist.tools.external import write_alpaca_answers
from dpo_dist.tools.report.card import run_card
from dpo_dist.training.export import checkpoint_as_model, export_model
from dpo_dist.training.start.named_models import EvaluatedModel, find_export_paths, locate_model
from tests.support.loop_state import write_loop_state

pytestmark = pytest.mark.slow

NAME = "checkpoints/step-000001"
STATE, MANIFEST = f"{NAME}/state.json", f"{NAME}/manifest.json"
DEEP = "[" * 100_000
ALIAS = "model: {path: org/model}\ndata: {train: &a [a.jsonl], eval: *a}"


def export(run: Path) -> None:
    config = load_run_config(["model.path=org/model", "data.train=[a.jsonl]", f"run.dir={run}"])
    (checkpoint, *_), output = find_export_paths(config)
    export_model(config, checkpoint, output, Console(None), run_card)


def evaluate(run: Path) -> None:
    config = load_run_config(["model.path=org/model", "data.train=[a.jsonl]"])
    inputs: Any = SimpleNamespace(policy_files=SimpleNamespace(digest="m"))
    location = locate_model(str(run / NAME), "evaluation.model")
    check_origin(EvaluatedModel(location, is_checkpoint=True), config, inputs)


def compare(run: Path) -> None:
    checkpoint_as_model(Path(locate_model(str(run / NAME), "compare.models")), run / "written", print)


def chat(run: Path) -> None:
    open_speakers(str(run / NAME), None, print)


def alpaca(run: Path) -> None:
    write_alpaca_answers(SimpleNamespace(comparison_answers=run / "answers.jsonl"))  # type: ignore[arg-type]


PIPE = None
CONFIGS = [("config.yaml", text) for text in ("", "[" * 5000, "- 1", "model: 5", ALIAS, PIPE)]
VERBS: dict[Callable[[Path], None], list[tuple[str, str | None]]] = {
    export: [
        *((STATE, text) for text in ("[1]", "{}", DEEP, '{"model": "m", "step": "1"}', "\xff")),
        (STATE, PIPE),
        *(("environment.json", text) for text in ("{}", '{"packages": 5}', '{"packages": {"a": 1}}', DEEP)),
        (MANIFEST, PIPE),
    ],
    evaluate: [*((STATE, text) for text in ("[1]", "{}", "null", DEEP)), (MANIFEST, PIPE)],
    compare: [*CONFIGS, (MANIFEST, PIPE)],
    chat: [*CONFIGS, ("config.yaml", "absent"), (MANIFEST, PIPE)],
    alpaca: [("answers.jsonl", text) for text in ("[1]\n", '{"responses": 5}\n', "{\n", DEEP)],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has ended, with one checkpoint."""
    config = load_run_config(["model.path=org/model", "data.train=[a.jsonl]", f"run.dir={tmp_path}"])
    (tmp_path / NAME).mkdir(parents=True)
    write_loop_state(tmp_path / NAME)
    (tmp_path / MANIFEST).write_text('{"state.json": "0"}')
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "environment.json").write_text('{"packages": {}}')
    (tmp_path / "run_state.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(("verb", "name", "text"), [(v, *row) for v, rows in VERBS.items() for row in rows])
def test_a_file_that_no_run_writes_is_one_plain_error(
    verb: Callable[[Path], None], name: str, text: str | None, run: Path
) -> None:
    (run / name).unlink(missing_ok=True)
    if text is PIPE:
        os.mkfifo(run / name)
    elif text != "absent":
        (run / name).write_bytes(text.encode("latin-1"))
    with pytest.raises((ConfigError, CheckpointError)) as raised:
        verb(run)
    assert Path(name).name in str(raised.value)


@pytest.mark.parametrize("name", ["/dev/zero", "../pipe", "engine/../../pipe", "..", ""])
def test_a_manifest_names_files_of_its_own_checkpoint_only(run: Path, name: str) -> None:
    """A device elsewhere would be read for ever."""
    os.mkfifo(run / "checkpoints" / "pipe")
    (run / MANIFEST).write_text(f'{{"{name}": "0"}}')
    (fault,) = find_faults(run / NAME, 0, 1)
    assert fault.startswith("manifest.json")


def test_what_a_run_was_trained_on_is_not_known_without_its_configuration(run: Path) -> None:
    said: list[str] = []
    for text in ("model: 5", "[1]", PIPE):
        (run / "config.yaml").unlink()
        if text is PIPE:
            os.mkfifo(run / "config.yaml")
        else:
            (run / "config.yaml").write_text(text)
        assert count_trained(str(run), [1], "pair", said.append) is None
    assert len(said) == 3
    assert all("config.yaml" in line or "configuration" in line for line in said)
