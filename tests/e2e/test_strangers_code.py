"""A run folder of somebody else, whose model has Python code and whose config.yaml asks to run it."""

import json
from pathlib import Path

import pytest

from dpo_dist.config.run_folder import STATE
from dpo_dist.config.schema import ModelConfig
from dpo_dist.distributed.checkpoint.saver import MANIFEST
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import content_digest
from dpo_dist.model.files.manifest import write_manifest
from dpo_dist.reference.digest import description_digest
from dpo_dist.tools.chat.conversation import open_conversation
from tests.e2e.conftest import small_run
from tests.support.launch import run_verb, train
from tests.support.own_code import ship_code
from tests.support.tiny_model import write_model

RUN, MODEL, CHECKPOINT = "{at}/run", "{at}/run/model", "{at}/run/checkpoints/step-000001"
COMPARE = ["data.eval=[{assets}/eval.jsonl]", "run.dir={at}/new", "sampling.max_new_tokens=2"]
PAIRS = [
    "pairs.method=samples",
    "data.train=[{assets}/train.jsonl]",
    "pairs.function=tests.support.own_judge:letter_shares",
]
SCORED = ["model.path={assets}/model", "data.eval=[{assets}/eval.jsonl]", "run.dir={at}/new"]
TRUSTS, REFUSED, ASKED = "model.trust_remote_code=true", "names Python code", "asks to run code"
# Verb, arguments, the end of its error; "": it needs no model.
COMMANDS = [
    ("chat", [RUN], REFUSED),
    ("chat", [CHECKPOINT], REFUSED),
    ("compare", [f"compare.models=[{{assets}}/model,{RUN}]", *COMPARE], REFUSED),
    ("compare", [f"compare.models=[{{assets}}/model,{CHECKPOINT}]", *COMPARE], REFUSED),
    ("doctor", [f"run.dir={RUN}"], ASKED),
    ("evaluate", [f"run.dir={RUN}"], ASKED),
    ("evaluate", [f"evaluation.model={RUN}", *SCORED], REFUSED),
    ("export", [f"run.dir={RUN}", "export.output={at}/out"], ASKED),
    ("pairs", [f"pairs.models=[{MODEL}]", *PAIRS, "run.dir={at}/new"], REFUSED),
    ("plan", [f"model.path={MODEL}", "plan.gpu=h100-80g"], REFUSED),
    ("precompute", [f"run.dir={RUN}"], ASKED),
    ("report", [RUN], ""),
    ("train", [f"model.path={MODEL}", "data.train=[{assets}/train.jsonl]", "run.dir={at}/new"], REFUSED),
]


@pytest.fixture(scope="module")
def at(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a model with code, which leaves a trace if it is run from now on."""
    at = tmp_path_factory.mktemp("stranger")
    base = ship_code(write_model(at / "base"))
    command = [*small_run(assets, at), f"model.path={base}", TRUSTS, "trainer.max_steps=1"]
    train(command)
    for folder in (base, at / "run/model"):
        own = folder / "own.py"
        own.write_text(f"{own.read_text()}\nopen({str(at / 'trace')!r}, 'a').close()\n")
    fit_digests(at, base)
    return at


def fit_digests(at: Path, base: Path) -> None:
    """Write digests of the changed files, as a stranger would who wants them to be read."""
    write_manifest(at / "run/model", None)
    checkpoint = Path(CHECKPOINT.format(at=at))
    state, manifest = checkpoint / STATE, checkpoint / MANIFEST
    content = json.loads(state.read_text())
    content["description"] = description_digest(ModelConfig(path=str(base)), base, None)
    state.write_text(json.dumps(content))
    digests = json.loads(manifest.read_text())
    digests[STATE] = content_digest([state])
    manifest.write_text(json.dumps(digests))


@pytest.mark.parametrize(("verb", "arguments", "error"), COMMANDS)
def test_no_verb_takes_code_from_a_run_folder(
    verb: str, arguments: list[str], error: str, at: Path, assets: Path
) -> None:
    ended = run_verb(verb, [word.format(at=at, assets=assets) for word in arguments])
    assert ended.code == (2 if error else 0), ended.output
    assert error in ended.output
    assert not (at / "trace").exists()


def test_a_command_may_trust_the_code_as_the_error_says(at: Path) -> None:
    for location in (MODEL, CHECKPOINT):
        with pytest.raises(ConfigError) as refused:
            open_conversation(location.format(at=at), print)
        assert refused.value.remedy.endswith(TRUSTS)
    assert not (at / "trace").exists()
    ended = run_verb("chat", [CHECKPOINT.format(at=at), TRUSTS])
    assert ended.code == 0, ended.output
    assert (at / "trace").exists()
    (at / "trace").unlink()
